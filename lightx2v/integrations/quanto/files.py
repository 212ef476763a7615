"""Folders of quantized models as optimum-quanto and diffusers' QuantoConfig write them.

config.json                           of the model; diffusers' has `quantization_config`
diffusion_pytorch_model.safetensors   or model.safetensors, or several with an index: the state dict
quanto_qmap.json                      or quantization_map.json: the types of each layer
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lightx2v.errors import CheckpointError
from lightx2v.foreign.index import read_json, weights_in
from lightx2v.integrations.models import unfilled
from lightx2v.integrations.quanto.model import quantization_map, requantize
from lightx2v.integrations.quanto.modules import QuantizedModule
from lightx2v.integrations.quanto.qtypes import type_of
from lightx2v.io.dialects.quanto import MAPS
from lightx2v.io.weights import Checkpoint, write_safetensors

_DATA = (".weight._data._data", ".weight._data")


def save_quantized(model: Any, folder: str | Path) -> None:
    """Write a frozen model as optimum-quanto's QuantizedDiffusersModel.save_pretrained does.

    Raises CheckpointError for a model without quantized layers, or with some that are not frozen, and ResourceError.
    """
    target = Path(folder).expanduser()
    layers = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    thawed = [layer.name for layer in layers if layer.spec is not None and not layer.frozen]
    if not layers or thawed:
        what = f"'{thawed[0]}' is not frozen" if thawed else "no layer of the model is quantized"
        raise CheckpointError(str(target), what, do="call quantize and freeze first")
    target.mkdir(parents=True, exist_ok=True)
    name = "model.safetensors"
    if hasattr(model, "save_config"):  # diffusers
        model.save_config(str(target))
        name = "diffusion_pytorch_model.safetensors"
    elif hasattr(getattr(model, "config", None), "save_pretrained"):  # transformers
        model.config.save_pretrained(str(target))
    write_safetensors(target / name, model.state_dict(), {"format": "pt"})
    (target / MAPS[0]).write_text(json.dumps(quantization_map(model), indent=4), "utf-8")


def load_quantized(model: Any, folder: str | Path, device: str = "cpu") -> nn.Module:
    """The model that optimum-quanto, diffusers with a QuantoConfig, or `save_quantized` wrote, in evaluation mode.

    `model` is a class of diffusers, whose config.json is read; any other class, called without arguments; or a module,
    which is filled. Raises CheckpointError for a folder that does not say what it holds, or that does not fit.
    """
    source = Path(folder).expanduser()
    found = weights_in(source)
    if found is None:
        raise CheckpointError(str(source), "has no weights", do="give the directory of a model")
    checkpoint = Checkpoint.open(found[0])
    kinds = _map_of(source, checkpoint.tensors)
    built = unfilled(model, source)
    requantize(built, dict(checkpoint.stream()), kinds, device)
    return built.eval()


def _map_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The types of each layer: of the file beside the weights, or by what config.json says of all of them."""
    for name in MAPS:
        if (folder / name).is_file():
            return read_json(folder / name)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    said = config.get("quantization_config") or {}
    if said.get("quant_method") != "quanto":
        raise CheckpointError(
            str(folder), "does not say which layers are quantized", allowed=f"{', '.join(MAPS)}, or diffusers' config"
        )
    kind = type_of(str(said.get("weights_dtype")), f"{folder}/config.json")
    layers = (name.removesuffix(_DATA[0]).removesuffix(_DATA[1]) for name in names if name.endswith(_DATA))
    return {layer: {"weights": str(kind), "activations": "none", "outputs": "none"} for layer in layers}
