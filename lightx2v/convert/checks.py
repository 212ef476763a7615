"""Whether the flags that name layers fit the tensors of a source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from lightx2v.convert.options import LayerRule, Options
from lightx2v.errors import CheckpointError, ConfigError, suggestion
from lightx2v.io.headers import TensorInfo
from lightx2v.quant.layouts import SCALE_LEAVES


def check_rule(options: Options, tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Refuse target keys that no layer has: typing errors, and checkpoints of another model."""
    if options.spec is None:
        return
    rule = options.rule
    check_keys("--ignore-quant-keys", options.ignore_quant_keys, tensors)
    if not _targets(rule, tensors) and _targets(replace(rule, ignore_quant_keys=()), tensors):
        raise ConfigError("--ignore-quant-keys", "leaves no layer to quantize", do="leave out --quantized")
    found = _targets(replace(rule, ignore_quant_keys=()), tensors)
    missing = [key for key in rule.target_keys if key not in found]
    if not missing:
        return
    what = f"no 2-D weight has '{missing[0]}' as component {rule.key_idx} of its name"
    if options.target_keys or options.key_idx is not None:
        there = sorted({part for name in tensors if (part := rule.component(name)) and not part.isdigit()})
        raise ConfigError("--target-keys", what + suggestion(missing[0], there), allowed=", ".join(there[:20]))
    do = "give a whole model, or name its layers with --target-keys"
    raise CheckpointError(where, f"is not a {options.model_type}: {what}", do=do)


def _targets(rule: LayerRule, tensors: Mapping[str, TensorInfo]) -> set[str]:
    """The target keys that some layer has."""
    return {rule.component(name) for name, info in tensors.items() if rule.quantizes(name, info.shape)}


def check_keys(flag: str, keys: Iterable[str], originals: Iterable[str]) -> None:
    """Refuse keys that no name contains."""
    components = {part for name in originals for part in name.split(".") if not part.isdigit()}
    for key in keys:
        if not any(key in name for name in originals):
            raise ConfigError(flag, f"no tensor's name contains '{key}'{suggestion(key, components)}")


def check_names(unknown: list[str], where: str) -> None:
    if unknown:
        shown = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        raise CheckpointError(
            where, f"{len(unknown)} tensors have no name in diffusers: {shown}", do="drop them with --ignore-keys"
        )


def check_whole(tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse quantized layers, which are not taken apart."""
    for name, info in tensors.items():
        if name.rpartition(".")[2] in SCALE_LEAVES:
            layer = name.rpartition(".")[0]
            raise CheckpointError(
                str(info.file), f"'{layer}' is quantized already", do="convert the checkpoint that it was made from"
            )
