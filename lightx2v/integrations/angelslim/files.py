"""AngelSlim's export: the model's own file with fp8 weights and their scales, and the scales in a second file.

    diffusion_pytorch_model.safetensors   `<layer>.weight` float8_e4m3fn [N, K], `<layer>.weight_scale`, `<layer>.bias`,
        or model.safetensors              and everything else as it is
    fp8_scales.safetensors                `<layer>.weight_scale` float32: [], [N, 1] or [N/128, K/128]

AngelSlim writes the first kind of scales alone, and nothing that says what they are. Here the second file's metadata
does: `quantization`, JSON with `quant_type` and the mm_type of each layer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from lightx2v import __version__
from lightx2v.errors import CheckpointError, LightX2VError
from lightx2v.foreign.index import weights_in
from lightx2v.integrations.angelslim.scales import SCALES_FILE, fit
from lightx2v.integrations.angelslim.types import NAMES, Planner, QuantType, Rounding, find_type
from lightx2v.integrations.linear import MovableLinear, replace_module
from lightx2v.integrations.models import unfilled
from lightx2v.io.dtypes import FLOAT_NAMES, TORCH_DTYPES
from lightx2v.io.weights import Checkpoint, stream_into, write_safetensors

MODEL_FILE = "model.safetensors"
_FORMAT_VERSION = "1"
_SCALE = ".weight_scale"


def weight_scales(model: nn.Module) -> dict[str, Tensor]:
    """`<layer>.weight_scale` of every quantized layer, as it is written."""
    return {
        name + _SCALE: module.state_dict()["weight_scale"]
        for name, module in model.named_modules()
        if isinstance(module, MovableLinear)
    }


def write_export(model: Any, folder: Path, kind: QuantType) -> None:
    """Write a quantized model. Raises CheckpointError and ResourceError where that fails."""
    layers = [name for name, module in model.named_modules() if isinstance(module, MovableLinear)]
    if not layers:
        raise CheckpointError(str(folder), "no layer of the model is quantized", do="see the quantizer's report")
    if folder.is_file():
        raise CheckpointError(str(folder), "is a file", do="give a directory")
    metadata = {
        "format": "pt",
        "format_version": _FORMAT_VERSION,
        "tool": f"lightx2v {__version__}",
        "quantization": json.dumps({"quant_type": kind.name, "layers": dict.fromkeys(layers, kind.scheme.name)}),
    }
    if hasattr(model, "save_pretrained"):
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(str(folder))
    else:
        write_safetensors(folder / MODEL_FILE, model.state_dict(), metadata)
    write_safetensors(folder / SCALES_FILE, weight_scales(model), metadata)
    logger.info("{}: {} layers of {}, written", folder, len(layers), kind.name)


def load_quantized_model(
    model: Any,
    save_path: str | Path,
    device: str | torch.device = "cpu",
    *,
    quant_type: str | None = None,
    native_fp8_support: bool | None = None,
    rounding: Rounding = "angelslim",
) -> nn.Module:
    """The model of an export of any of the five kinds, AngelSlim's or ours, on `device` and in evaluation mode.

    `model` is a class of diffusers or transformers, whose config.json is read; any other class, called without
    arguments; or a module, which is filled. Every tensor keeps the dtype that it has in the file. `quant_type` is what
    the file says, and what the shapes of the scales allow where it says nothing: AngelSlim's weight-only files are
    named by the caller.
    Raises CheckpointError for files and models that do not belong together, ConfigError for an unknown quant_type.
    """
    folder, place = Path(save_path).expanduser(), torch.device(device)
    checkpoint = Checkpoint.open(_weights_file(folder))
    scales, said = _scales(folder)
    built = unfilled(model, folder)
    layers = {name.removesuffix(_SCALE) for name in (*checkpoint.tensors, *scales) if name.endswith(_SCALE)}
    if not layers:
        raise CheckpointError(str(folder), "holds no quantized layers", do="load it with its own library")
    scaled = {name: _scale_of(checkpoint, scales, name) for name in sorted(layers)}
    kind = find_type(quant_type or said or _guess(built, scaled, folder), rounding)
    planner = Planner(kind, native_fp8_support)
    for name, scale in scaled.items():
        layer = _linear(built, name, folder)
        plan = partial(planner.plan, name, layer.out_features, layer.in_features)
        replace_module(built, name, MovableLinear(name, layer.bias is not None, plan, place, _dtype(checkpoint, name)))
        scaled[name] = fit(scale, kind.spec, layer.out_features, layer.in_features, name)
    rest = (item for item in checkpoint.stream() if not item[0].endswith(_SCALE))
    stream_into(
        built,
        chain(rest, ((name + _SCALE, scale) for name, scale in scaled.items())),
        device=place,
        dtype_of=lambda name: TORCH_DTYPES[checkpoint.tensors[name].dtype],
        where=str(folder),
    )
    return built.eval()


def _weights_file(folder: Path) -> Path:
    found = weights_in(folder)
    if found is None:
        raise CheckpointError(str(folder), "has no weights", do="give the directory of an export")
    return found[0]


def _scales(folder: Path) -> tuple[Mapping[str, Tensor], str | None]:
    """The scales of the second file, and the quant_type that it names, if any."""
    path = folder / SCALES_FILE
    if not path.is_file():
        return {}, None
    checkpoint = Checkpoint.open(path)
    try:
        said = json.loads(checkpoint.metadata.get("quantization", "{}")).get("quant_type")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(str(path), f"its metadata is damaged: {error}", do="export the model again") from error
    return {name: tensor.clone() for name, tensor in checkpoint.stream()}, said


def _scale_of(checkpoint: Checkpoint, scales: Mapping[str, Tensor], name: str) -> Tensor:
    """The scale in the model's own file, or else in the second one."""
    key = name + _SCALE
    return checkpoint.load(key) if key in checkpoint.tensors else scales[key]


def _dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """What a layer's weight was before it was quantized, as far as the file tells: as its bias or as most tensors."""
    bias = checkpoint.tensors.get(f"{name}.bias")
    if bias is not None:
        return TORCH_DTYPES[bias.dtype]
    plain = Counter(
        info.dtype for key, info in checkpoint.tensors.items() if info.dtype in FLOAT_NAMES and not key.endswith(_SCALE)
    )
    return TORCH_DTYPES[plain.most_common(1)[0][0]] if plain else torch.bfloat16


def _linear(model: nn.Module, name: str, folder: Path) -> nn.Linear:
    layer: nn.Module | None
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise CheckpointError(str(folder), f"has a scale for '{name}', which is no linear layer of the model")
    return layer


def _guess(model: nn.Module, scales: Mapping[str, Tensor], folder: Path) -> str:
    """The first kind that every scale has the shape of."""
    for name in NAMES:
        if all(_fits(find_type(name), _linear(model, layer, folder), scale) for layer, scale in scales.items()):
            return name
    shapes = ", ".join(sorted({str(list(scale.shape)) for scale in scales.values()})[:5])
    raise CheckpointError(
        str(folder), f"its scales have shapes {shapes}, as none of them has", allowed=", ".join(NAMES)
    )


def _fits(kind: QuantType, layer: nn.Linear, scale: Tensor) -> bool:
    if kind.spec.granularity == "tensor":
        return scale.numel() == 1
    if scale.numel() == 1 and layer.weight.shape.numel() > 1 and kind.spec.granularity == "channel":
        return False
    try:
        fit(scale, kind.spec, layer.out_features, layer.in_features, "")
    except LightX2VError:
        return False
    return True
