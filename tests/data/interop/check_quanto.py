"""Whether optimum-quanto loads what `lightx2v.integrations.quanto` writes, and the other way round, with equal results.

    python -m tests.data.interop.check_quanto

Run it from the repository's root with the Python of an environment that has optimum-quanto, diffusers and lightx2v's
dependencies. It prints the relative difference of the two packages' results of one model, and fails above 1e-3.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import QuantoConfig, WanTransformer3DModel
from optimum import quanto as theirs
from safetensors.torch import load_file
from torch import Tensor, nn

from lightx2v.integrations import quanto as ours
from tests.data.interop.tiny import save_state, wan

LIMIT = 1e-3
WEIGHTS = ("qfloat8", "qint8", "qint4", "qint2")


def run(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, 1, 6, 8, generator=generator), torch.randn(1, 8, 16, generator=generator)
    with torch.no_grad():
        output: Tensor = model(latents, torch.tensor([611.0]), text).sample
    return output


def say(what: str, got: Tensor, wanted: Tensor) -> None:
    off = float((got - wanted).norm() / wanted.norm())
    print(f"{what:<60}{off:.2e}")
    if not off <= LIMIT:
        raise SystemExit(f"{what}: off by {off:.2e}")


def written_by_us(weights: str, folder: Path) -> None:
    model = wan(256)
    ours.quantize(model, weights=weights)
    ours.freeze(model)
    ours.save_quantized(model, folder)
    loaded = wan(256)
    theirs.requantize(
        loaded,
        load_file(folder / "diffusion_pytorch_model.safetensors"),
        json.loads((folder / "quanto_qmap.json").read_text()),
    )
    say(f"{weights}, ours loaded by optimum-quanto", run(loaded), run(model))


def written_by_them(weights: str, folder: Path) -> None:
    model: Any = wan(256)
    theirs.quantize(model, weights=getattr(theirs, weights))
    theirs.freeze(model)
    save_state(folder, model, model.state_dict())
    (folder / "quantization_map.json").write_text(json.dumps(theirs.quantization_map(model)))
    loaded = ours.load_quantized(WanTransformer3DModel, folder)
    say(f"{weights}, optimum-quanto's loaded by us", run(loaded), run(model))
    again = wan(256)
    ours.quantize(again, weights=weights)
    ours.freeze(again)
    compare_tensors(weights, again.state_dict(), model.state_dict())


def compare_tensors(weights: str, ours_there: Mapping[str, Tensor], theirs_there: Mapping[str, Tensor]) -> None:
    """Bit by bit, but for shifts: here they are a zero point times a scale, which may round in the last bit."""
    if ours_there.keys() != theirs_there.keys():
        raise SystemExit(f"{weights}: other tensors, {sorted(ours_there.keys() ^ theirs_there.keys())}")
    equal, furthest = 0, 0.0
    for name, wanted in theirs_there.items():
        got = ours_there[name]
        same = got.dtype == wanted.dtype and torch.equal(got.float(), wanted.float())
        if not (same or name.endswith("._shift")):
            raise SystemExit(f"{weights}: '{name}' is another one")
        equal += same
        if not same:
            furthest = max(furthest, float(((got - wanted).abs() / wanted.abs()).max()))
    print(f"{weights}, tensors equal bit by bit: {equal} of {len(theirs_there)}, shifts off by {furthest:.1e}")
    if furthest > 2**-22:
        raise SystemExit(f"{weights}: a shift is off by {furthest:.1e}")


def through_diffusers(weights: str, folder: Path) -> None:
    model = ours.quantize_diffusers(wan(256), ours.QuantoConfig(weights, ["proj_out"]))
    model.save_pretrained(folder)  # type: ignore[operator]
    say(f"{weights}, ours loaded by diffusers", run(WanTransformer3DModel.from_pretrained(folder)), run(model))
    say(f"{weights}, and by us", run(ours.load_quantized(WanTransformer3DModel, folder)), run(model))
    source = folder / "float"
    wan(256).save_pretrained(source)
    config = QuantoConfig(weights_dtype=weights, modules_to_not_convert=["proj_out"])
    peer = WanTransformer3DModel.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    say(f"{weights}, quantized by diffusers", run(model), run(peer))
    peer.save_pretrained(folder / "theirs")
    loaded = ours.load_quantized(WanTransformer3DModel, folder / "theirs")
    say(f"{weights}, diffusers' loaded by us", run(loaded), run(peer))


class Small(nn.Sequential):
    """Linear layers alone: what follows them, optimum-quanto would give tensors of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(96, 64), nn.Linear(64, 64), nn.Linear(64, 32))


def with_activations(weights: str, activations: str, streamline: bool) -> None:
    x = torch.randn(4, 20, 96, generator=torch.Generator().manual_seed(2))
    mine, peer = Small(), Small()
    ours.quantize(mine, weights=weights, activations=activations)
    theirs.quantize(peer, weights=getattr(theirs, weights), activations=getattr(theirs, activations))
    with torch.no_grad():
        with ours.Calibration(streamline=streamline):
            [mine(part) for part in x]
        with theirs.Calibration(streamline=streamline):
            [peer(part) for part in x]
        ours.freeze(mine)
        theirs.freeze(peer)
        wanted = peer(x[0])
        wanted = wanted.dequantize() if hasattr(wanted, "dequantize") else wanted
        say(f"{weights} and {activations}, streamline {streamline}", mine(x[0]), wanted)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for kind in WEIGHTS:
            for number, check in enumerate((written_by_us, written_by_them)):
                place = Path(temporary, f"{kind}{number}")
                place.mkdir()
                check(kind, place)
        for name in ("float8", "int8", "int4", "int2"):
            through_diffusers(name, Path(temporary, name))
    for kind in WEIGHTS:
        for activation in ("qint8", "qfloat8"):
            for streamlined in (True, False):
                with_activations(kind, activation, streamlined)
