"""`DynamicDiTQuantizer`: AngelSlim's interface to fp8 linears in any model, computed by this engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.foreign.build import is_fp32
from lightx2v.integrations.angelslim.files import load_quantized_model, weight_scales, write_export
from lightx2v.integrations.angelslim.patterns import EXCLUDE, INCLUDE, NameFilter, Pattern
from lightx2v.integrations.angelslim.report import Report
from lightx2v.integrations.angelslim.scales import Scales, key_of, read_scales, with_scale
from lightx2v.integrations.angelslim.types import Planner, Rounding, find_type, has_fp8, quantize
from lightx2v.integrations.linear import MovableLinear, replace_module
from lightx2v.mm.select import LayerPlan
from lightx2v.platform import list_devices, trim_memory
from lightx2v.quant.layouts import FLOATS, short


class DynamicDiTQuantizer:
    """Exchanges linear layers of a model for fp8 ones; activations are quantized at each call.

    `quant_type`: fp8-per-tensor, fp8-per-tensor-weight-only, fp8-per-block, fp8-per-token, fp8-per-token-sgl.
    `layer_filter`: takes a layer's full name and replaces the patterns (`patterns.compile_pattern`), of which None is
    AngelSlim's own list and [] none. `native_fp8_support`: whether fp8 products of the hardware are used; None where it
    has them. `rounding`: whose scales whole tensors have, "angelslim" (bfloat16, bit by bit) or "float32" (nearer).
    Raises ConfigError for an unknown quant_type and for what is no pattern.
    """

    def __init__(
        self,
        quant_type: str = "fp8-per-tensor",
        layer_filter: Callable[[str], bool] | None = None,
        include_patterns: Sequence[Pattern] | None = None,
        exclude_patterns: Sequence[Pattern] | None = None,
        native_fp8_support: bool | None = None,
        *,
        rounding: Rounding = "angelslim",
    ) -> None:
        self._kind = find_type(quant_type, rounding)
        self.quant_type, self.rounding = quant_type, rounding
        self.include_patterns = list(INCLUDE) if include_patterns is None else include_patterns
        self.exclude_patterns = list(EXCLUDE) if exclude_patterns is None else exclude_patterns
        names = NameFilter.of(self.include_patterns, self.exclude_patterns)
        self.layer_filter: Callable[[str], bool] = names if layer_filter is None else layer_filter
        self._planner = Planner(self._kind, native_fp8_support)
        self.fp8_scales_map: dict[str, Tensor] = {}
        """`<layer>.weight_scale` of every layer that the last conversion quantized."""
        self.report: Report | None = None
        """What the last conversion did with each linear layer."""

    @property
    def native_fp8_support(self) -> bool:
        """The caller's word, or whether the best device here has fp8 products."""
        native = self._planner.native
        return has_fp8(list_devices()[0]) if native is None else native

    @torch.no_grad()
    def convert_linear(self, model: nn.Module, scale: Mapping[str, Any] | str | Path | None = None) -> None:
        """Exchange the linear layers that the filter names, in place, on the devices where they are.

        `scale` has the scales of weights that are quantized already, or shall be with these: a dict, a .safetensors or
        torch file, or a directory of an export; `<layer>.weight_scale` or `<layer>`. Layers without one stay as they
        are. A model of diffusers that is float32 throughout becomes bfloat16, save what diffusers keeps in float32;
        in any other nothing but these layers changes. Raises ConfigError and CheckpointError, before anything changes.
        """
        scales = None if scale is None else read_scales(scale)
        chosen, skipped = self._choose(model, scales)
        keys = {names[0]: key_of(scales or {}, names[0]) for names in chosen}
        if scales and not chosen:
            raise CheckpointError("scale", f"fits no linear layer of the model: {', '.join(list(scales)[:5])}")
        for name, key in keys.items():  # all of them before the first is exchanged
            self._check(name, model.get_submodule(name), scales[key] if scales and key else None)
        _halve(model)
        matched: dict[str, LayerPlan] = {}
        for names in chosen:
            key = keys[names[0]]
            new = self._quantized(names[0], model.get_submodule(names[0]), scales[key] if scales and key else None)
            for name in names:
                replace_module(model, name, new)
                matched[name] = new.plan
        unused = tuple(key for key in scales or () if key not in keys.values())
        self.report = Report(self.quant_type, matched, skipped, unused)
        self.fp8_scales_map = weight_scales(model)
        self.report.log()
        trim_memory()

    def export_quantized_weight(self, model: nn.Module, save_path: str | Path) -> None:
        """Convert `model` as `convert_linear` does, if it is not yet, and write it to the directory `save_path`.

        Two files: the weights, by the model's `save_pretrained` or as model.safetensors, and the scales once more in
        fp8_scales.safetensors, whose metadata says what they are. Raises ConfigError and CheckpointError.
        """
        there = {name: module.plan for name, module in model.named_modules() if isinstance(module, MovableLinear)}
        if not there:
            self.convert_linear(model)
        elif any(plan.scheme.weight != self._kind.spec for plan in there.values()):
            raise ConfigError("quant_type", f"the model is quantized already, not as {self.quant_type}")
        self.fp8_scales_map = weight_scales(model)
        write_export(model, Path(save_path).expanduser(), self._kind)

    @staticmethod
    def load_quantized_model(model_class: Any, save_path: str | Path, device: str = "cpu", **options: Any) -> nn.Module:
        """As the function `load_quantized_model`."""
        return load_quantized_model(model_class, save_path, device, **options)

    def _choose(self, model: nn.Module, scales: Scales | None) -> tuple[list[list[str]], dict[str, str]]:
        """The names of each linear layer that is quantized, more than one where a model ties it; why others are not."""
        names: dict[int, list[str]] = {}
        skipped: dict[str, str] = {}
        for name, layer in model.named_modules(remove_duplicate=False):
            if not isinstance(layer, nn.Linear):
                continue
            problem = self._against(name, layer)
            if problem is None and scales is not None and key_of(scales, name) is None:
                problem = "no scale is given for it"
            if problem is None:
                names.setdefault(id(layer), []).append(name)
            else:
                skipped[name] = problem
        return list(names.values()), skipped

    def _against(self, name: str, layer: nn.Linear) -> str | None:
        """Why a layer is not quantized."""
        chosen = self.layer_filter
        if not chosen(name):
            return chosen.against(name) if isinstance(chosen, NameFilter) else "layer_filter leaves it out"
        if type(layer) is not nn.Linear:
            return f"is a {type(layer).__name__}, which computes in a way of its own"
        return None

    def _check(self, name: str, layer: Any, scale: Tensor | None) -> None:
        """Raise CheckpointError for a weight that cannot become codes."""
        if layer.weight.is_meta:
            raise CheckpointError(name, "has no weight yet", do="load the weights first, or use load_quantized_model")
        if scale is not None:
            with_scale(layer.weight.detach(), scale, self._kind.spec, name)
        elif layer.weight.dtype not in FLOATS:
            raise CheckpointError(name, f"its weight is {short(layer.weight.dtype)}", do="give its scale")

    def _quantized(self, name: str, layer: Any, scale: Tensor | None) -> MovableLinear:
        weight = layer.weight.detach()
        if scale is None:
            leaves = quantize(weight, self._kind, self.rounding)
        else:
            leaves = with_scale(weight, scale, self._kind.spec, name)
        plan = partial(self._planner.plan, name, layer.out_features, layer.in_features)
        dtype = weight.dtype if weight.dtype in FLOATS else torch.bfloat16
        new = MovableLinear(name, layer.bias is not None, plan, weight.device, dtype)
        for leaf, tensor in leaves.items():
            new.load_tensor(leaf, tensor)
        if layer.bias is not None:
            new.load_tensor("bias", layer.bias.detach())
        new.finish()
        return new.train(layer.training)


def _halve(model: nn.Module) -> None:
    """What from_pretrained(torch_dtype=torch.bfloat16) would have made of a float32 model of diffusers.

    Its pipelines hand bfloat16 to the layers that are not quantized, whatever those hold.
    """
    # Not buffers outside of the state dict: tables of positions stay as they were computed.
    stored: dict[str, Tensor] = model.state_dict(keep_vars=True) if hasattr(model, "load_config") else {}
    held = {name: t for name, t in stored.items() if t.is_floating_point() and not is_fp32(model, name)}
    if all(tensor.dtype == torch.float32 for tensor in held.values()):
        for tensor in held.values():
            tensor.data = tensor.data.to(torch.bfloat16)
