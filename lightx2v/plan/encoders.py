"""Where the weights of an encoder are, and how its linears are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightx2v.config.schema import Config, EncoderConfig
from lightx2v.errors import ConfigError
from lightx2v.families.base import Part
from lightx2v.io.dtypes import DTYPE_BYTES
from lightx2v.mm.scheme import parse
from lightx2v.plan.layers import ComponentPlan, plan_component
from lightx2v.platform import DeviceInfo


def _quantized_encoder(part: Part, encoder: EncoderConfig, files: Any, original: Path) -> tuple[Path, str]:
    """Checkpoint and mm_type of an encoder. Without a path, LightX2V's conventional places are looked at.

    "auto" looks there for int8 and fp8, and takes the one that is there.
    """
    name = part.config
    if not encoder.quantized:
        if encoder.quantized_ckpt is not None:
            raise ConfigError(
                f"{name}.quantized_ckpt", f"is set while {name}.quantized is false", do=f"set {name}.quantized to true"
            )
        return original, "Default"
    scheme = encoder.quant_scheme
    if scheme is None:
        raise ConfigError(
            f"{name}.quant_scheme", f"is missing while {name}.quantized is true", allowed="int8, fp8, fp8-b128, ..."
        )
    if encoder.quantized_ckpt is not None:
        return Path(encoder.quantized_ckpt), scheme
    spec = None if scheme == "auto" else parse(scheme).weight
    kinds = ("int8", "fp8") if scheme == "auto" else (spec.dtype if spec else scheme,)
    places = {kind: [files.root / place.format(kind=kind) for place in part.converted] for kind in kinds}
    found = [there[0] for of_kind in places.values() if (there := [place for place in of_kind if place.exists()])]
    if len(found) == 1:
        return found[0], scheme
    if found:
        raise ConfigError(
            f"{name}.quantized_ckpt",
            "is not set, and several files could be meant: " + ", ".join(map(str, found)),
            do=f"set it, or name the scheme as {name}.quant_scheme",
        )
    looked = ", ".join(str(place) for of_kind in places.values() for place in of_kind)
    raise ConfigError(
        f"{name}.quantized_ckpt",
        "is not set" + (f", and no converted file lies in its usual places: {looked}" if looked else ""),
        do=f"convert one: lightx2v convert --quantized --model_type {part.model_type} ...",
    )


def plan_encoder(part: Part, config: Config, files: Any, device: DeviceInfo) -> ComponentPlan:
    assert part.shapes is not None
    encoder: EncoderConfig = getattr(config, part.config) if part.config else EncoderConfig()
    path, mm_type = _quantized_encoder(part, encoder, files, files.require(part.file))
    checkpoint = part.open(path, mm_type != "Default")
    shapes = part.shapes(checkpoint)
    # Quantized encoders come in the original layout; diffusers' own files are checked by name as they load.
    original_names = all(f"{layer}.weight" in checkpoint.tensors for layer in shapes)
    return plan_component(
        part.name,
        checkpoint,
        path,
        shapes,
        check=original_names or mm_type != "Default",
        rename=None,
        mm_type=mm_type,
        rules=(),
        auto_quant=False,
        fallback=config.mm_config.fallback,
        device=device,
        dtype_bytes=DTYPE_BYTES[config.dtype],
    )
