"""Models of diffusers and transformers without weights, and with the weights of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from loguru import logger
from torch import nn
from torch.overrides import TorchFunctionMode

from lightx2v.errors import LightX2VError
from lightx2v.foreign.index import ModelPart
from lightx2v.io.dialects.base import Wanted
from lightx2v.io.dialects.open import open_any
from lightx2v.io.source import CheckpointSource
from lightx2v.io.weights import Checkpoint, stream_into
from lightx2v.mm.linear import build_linear, swap_linears
from lightx2v.mm.select import LayerPlan
from lightx2v.plan.layers import ComponentPlan
from lightx2v.platform import trim_memory


def empty_model(part: ModelPart, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of `part` without weights, in evaluation mode, as it is when diffusers loads it in `dtype`.

    Its parameters are on meta; what its constructor computes, such as tables of positions, is there.
    """
    with _default_dtype(dtype), _WeightsOnMeta():
        if hasattr(part.cls, "load_config"):  # diffusers
            model: nn.Module = part.cls.from_config(part.cls.load_config(part.folder))
        else:
            model = part.cls(part.cls.config_class.from_pretrained(part.folder))
    lost = [name for name, buffer in _computed_buffers(model) if buffer.is_meta]
    if lost:
        raise LightX2VError(
            str(part.folder), f"'{part.cls.__name__}' computes '{lost[0]}' in memory that it leaves unset"
        )
    return model.eval()


def load_denoiser(part: ModelPart, plan: ComponentPlan, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A transformer or UNet with its weights, one tensor at a time, and the linears that `plan` names exchanged.

    Raises CheckpointError for tensors that are missing or do not fit; ones without a place are left out, as diffusers
    does, and a warning names them.
    """
    model = empty_model(part, dtype)
    swap_linears(model, plan.by_name(), dtype, plan.auto_quant)
    sizes = {layer.name: (layer.out_features, layer.in_features) for layer in plan.layers}
    checkpoint = open_any(plan.checkpoint, Wanted(sizes.__contains__, sizes=sizes))
    unused = set(unplaced(model, checkpoint))
    if unused:
        logger.warning("{}: tensors without a place in the model: {}", plan.checkpoint, ", ".join(sorted(unused)[:10]))
    source = CheckpointSource(checkpoint, lambda name: name, unused.__contains__, plan.read_raw())
    stream_into(
        model,
        source.read(),
        device=device,
        dtype_of=lambda name: torch.float32 if is_fp32(model, name) else dtype,
        where=str(plan.checkpoint),
    )
    return model


def unplaced(model: nn.Module, checkpoint: Checkpoint) -> Iterator[str]:
    """Tensors of `checkpoint` that belong to no module of `model` that holds tensors."""
    own = set(dict(model.named_parameters()) | dict(model.named_buffers()))
    swapped = {name for name, module in model.named_modules() if hasattr(module, "load_tensor")}
    return (name for name in checkpoint.tensors if name not in own and name.rpartition(".")[0] not in swapped)


def quantize_linears(
    model: nn.Module, plans: Mapping[str, LayerPlan], device: torch.device, dtype: torch.dtype
) -> None:
    """Exchange the named linears of a model that has its weights, in place, for their quantized form on `device`."""
    for name, plan in plans.items():
        parent, _, leaf = name.rpartition(".")
        old: Any = model.get_submodule(name)
        new: Any = build_linear(plan, old.bias is not None, dtype, auto_quant=True)
        for key, tensor in old.named_parameters():
            new.load_tensor(key, tensor.detach().to(device))
        new.finish()
        setattr(model.get_submodule(parent), leaf, new)
    trim_memory()


def is_fp32(model: Any, name: str) -> bool:
    """Whether diffusers keeps the parameter `name` of its `model` in float32 when it loads it in another dtype."""
    return bool(set(getattr(model, "_keep_in_fp32_modules", None) or ()) & set(name.split(".")))


class _WeightsOnMeta(TorchFunctionMode):
    """Memory that is asked for without values, as all layers of torch do for their weights, is on meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _computed_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that no state dict holds."""
    for prefix, module in model.named_modules():
        for leaf in module._non_persistent_buffers_set:
            if (buffer := module._buffers[leaf]) is not None:
                yield f"{prefix}.{leaf}".lstrip("."), buffer
