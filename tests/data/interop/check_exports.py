"""Whether optimum-quanto loads what `lightx2v convert --to quanto` writes of stored files, and gives their results.

    python -m tests.data.interop.check_exports

Run it from the repository's root with the Python of an environment that has optimum-quanto, diffusers and lightx2v's
dependencies. It prints the relative difference from what the package of the source gave, and fails above 1e-5.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from optimum import quanto
from safetensors.torch import load_file
from torch.nn.functional import pad

from lightx2v.convert.cli import main
from lightx2v.io.dialects.quanto import MAPS
from tests.data.interop.tiny import TEXT_TOKENS

LIMIT = 1e-5
DATA = Path(__file__).parent
SOURCES = ("quanto/int8", "quanto/int4", "quanto/int2", "torchao/int8-weight-only", "torchao/float8-weight-only")


@torch.no_grad()
def error(source: Path, folder: Path) -> float:
    """Relative difference of the results of what is written to `folder` from those stored beside `source`."""
    if main(["--source", str(source), "--output", str(folder), "--to", "quanto"]):
        raise SystemExit(f"{source} was not written")
    model: Any = WanTransformer3DModel.from_config(json.loads((folder / "config.json").read_text()))
    types = json.loads((folder / MAPS[0]).read_text())
    quanto.requantize(model, load_file(folder / "diffusion_pytorch_model.safetensors"), types)
    example = load_file(source.with_name(f"{source.name}.example.safetensors"))
    text = pad(example["text"], (0, 0, 0, TEXT_TOKENS - example["text"].shape[1]))
    got = model.eval()(example["latents"], example["timestep"], text).sample
    return float((got - example["output"]).norm() / example["output"].norm())


if __name__ == "__main__":
    for name in SOURCES:
        with tempfile.TemporaryDirectory() as written:
            off = error(DATA / name, Path(written))
        print(f"{name:<32}{off:.1e}")
        if not off <= LIMIT:
            raise SystemExit(f"{name}: off by {off:.1e}")
