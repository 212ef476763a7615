"""Models of other libraries that are to be filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightx2v.errors import ConfigError
from lightx2v.foreign.build import empty_model
from lightx2v.foreign.index import ModelPart, read_json


def unfilled(model: Any, folder: Path) -> nn.Module:
    """The module that `model` says: itself, or one of that class.

    A class of diffusers or transformers is built from the folder's config.json with its parameters on meta, any other
    class without arguments. Raises ConfigError for what is neither.
    """
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, type):
        raise ConfigError("model", f"is a {type(model).__name__}", allowed="a class of models, or a module")
    if hasattr(model, "load_config") or hasattr(model, "config_class"):
        part = ModelPart(folder.name, model, folder, read_json(folder / "config.json"))
        return empty_model(part, torch.bfloat16)
    made: nn.Module = model()
    return made
