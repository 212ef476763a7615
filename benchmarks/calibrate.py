"""What calibrating a Wan-shaped model with random weights takes: minutes, and the peak memory of the process.

    PYTHONPATH=. python benchmarks/calibrate.py --set mm_config.mm_type=int8-static

The transformer has the widths of the model that is named; its encoder and VAE are tiny-wan's. Settings of `--set` go to
`lightx2v calibrate`, which runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from lightx2v.bench import work
from lightx2v.plan.resolve import EMBEDDED

_PARTS = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google")


def write_model(folder: Path, name: str, layers: int | None) -> int:
    """A model directory; returns the bytes of its transformer."""
    tiny = json.loads((EMBEDDED / "config.json").read_text())
    arch = work.arch_of(name)
    arch = replace(arch, text_dim=tiny["text_dim"], text_len=tiny["text_len"])
    arch = arch if layers is None else replace(arch, num_layers=layers)
    shapes, _ = work.dit_shapes(arch)
    widths = {key: getattr(arch, key) for key in ("dim", "ffn_dim", "num_heads", "num_layers")}
    (folder / "config.json").write_text(json.dumps({**tiny, **widths}))
    tensors = {name: tensor.clone() for name, tensor in work.RandomSource(shapes, torch.device("cpu")).read()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    for part in _PARTS:
        (folder / part).symlink_to(EMBEDDED / part)
    return sum(tensor.nbytes for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan-1.3b", choices=work.MODELS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    width, height = args.size.split("x")
    with TemporaryDirectory() as folder:
        model, output = Path(folder, "model"), Path(folder, "output")
        model.mkdir()
        weights = write_model(model, args.model, args.layers)
        settings = [f"video.width={width}", f"video.height={height}", f"video.frames={args.frames}"]
        settings += [f"sampling.steps={args.steps}", "sampling.cfg=false", f"calibration.forwards={args.steps}"]
        command = [sys.executable, "-m", "lightx2v", "calibrate", "--output", str(output), "--model_path", str(model)]
        command += ["--prompt", "a cat", *(word for one in [*settings, *args.set] for word in ("--set", one))]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        minutes = (time.perf_counter() - began) / 60
        made = sum(file.stat().st_size for file in output.glob("*.safetensors"))
        shutil.rmtree(output)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak, computed = used.ru_maxrss * 1024, (used.ru_utime + used.ru_stime) / 60
    print(f"{args.model}: {weights / 2**30:.2f} GiB of weights to {made / 2**30:.2f} GiB")
    print(f"{minutes:.1f} minutes, {computed:.1f} of processor time")
    print(f"peak memory of the process {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
