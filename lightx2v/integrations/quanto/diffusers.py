"""diffusers' QuantoConfig for models that are there already, however they were loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from loguru import logger
from torch import nn

from lightx2v.errors import ConfigError
from lightx2v.integrations.quanto.model import freeze, quantize
from lightx2v.integrations.quanto.qtypes import type_of

_NAMES = ("float8", "int8", "int4", "int2")


@dataclass(frozen=True)
class QuantoConfig:
    """`weights_dtype`: float8, int8, int4 or int2, as in diffusers.

    `modules_to_not_convert`: a name without a dot or a wildcard excludes every linear whose own name, the last part of
    its path, is exactly that, as in diffusers. Any other entry is a glob on full names, such as `blocks.0.*` or
    `*.proj_out`. Raises ConfigError for other types.
    """

    weights_dtype: str = "int8"
    modules_to_not_convert: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.weights_dtype not in _NAMES:
            raise ConfigError("weights_dtype", f"is '{self.weights_dtype}'", allowed=", ".join(_NAMES))
        if isinstance(self.modules_to_not_convert, str):
            raise ConfigError("modules_to_not_convert", "is one name", allowed="a list of names")

    def excludes(self, name: str) -> bool:
        """Whether the linear of this full name stays as it is."""
        local = name.rpartition(".")[2]
        return any(
            local == entry if is_local(entry) else fnmatchcase(name, entry)
            for entry in self.modules_to_not_convert or ()
        )


def is_local(entry: str) -> bool:
    """Whether an entry of `modules_to_not_convert` means the same to diffusers."""
    return not any(sign in entry for sign in ".*?[")


def quantize_diffusers(model: Any, config: QuantoConfig) -> nn.Module:
    """Quantize the weights of the linear layers of a model of diffusers for good, in place, and return it.

    Also one that `from_single_file` made. As in diffusers, names that it keeps in float32 are excluded too. Where the
    excluded names mean the same to diffusers, they are put into the model's config, so that both load what
    `save_pretrained` writes. Raises ConfigError where no layer is left.
    """
    linears = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    entries = [*(config.modules_to_not_convert or ()), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    whole = QuantoConfig(config.weights_dtype, entries)
    chosen = [name for name in linears if not whole.excludes(name)]
    quantize(model, weights=type_of(config.weights_dtype, "weights_dtype"), include=chosen)
    freeze(model)
    logger.info("{} of {} linear layers are {}", len(chosen), len(linears), config.weights_dtype)
    if hasattr(model, "register_to_config") and all(map(is_local, entries)):
        model.register_to_config(
            quantization_config={
                "quant_method": "quanto",
                "weights_dtype": config.weights_dtype,
                "modules_to_not_convert": entries,
            }
        )
    result: nn.Module = model
    return result
