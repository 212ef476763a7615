"""Linear layers that hold quantized weights, and their exchange for the nn.Linear of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.mm.base import Packed
from lightx2v.mm.custom import CustomLinear
from lightx2v.mm.libraries import LIBRARIES
from lightx2v.mm.scheme import Scheme
from lightx2v.mm.select import LayerPlan
from lightx2v.quant.formats import leaves_of, quantize_leaves
from lightx2v.quant.numerics import Quantized

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class QuantLinear(nn.Module):
    """y = x W^T + b with quantized W [N, K] and activations quantized on the way. For inference.

    State-dict names are the checkpoint's: `weight` (codes), `weight_scale` (float32), `bias` (kept in float32 and added
    before the result is rounded). `load_tensor` takes them one at a time, on the device where the layer is to run, and
    `finish` packs them: from then on only the packed form of the library is held, and `state_dict` unpacks it.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        library: str,
        dtype: torch.dtype,
        weight_auto_quant: bool = False,
        name: str = "linear",
    ) -> None:
        super().__init__()
        assert scheme.weight is not None
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.scheme, self.library, self.weight_auto_quant, self.name = scheme, library, weight_auto_quant, name
        self.spec = scheme.weight
        self.kernels = LIBRARIES[library]
        self.leaves = leaves_of(self.spec, out_features, in_features)
        for leaf, stored in self.leaves.items():
            self.register_buffer(leaf, torch.empty(stored.shape, dtype=stored.dtype, device="meta"))
        self.register_buffer("bias", torch.empty(out_features, device="meta") if bias else None)
        self.packed: Packed | None = None
        self._arrived: set[str] = set()

    def load_tensor(self, leaf: str, tensor: Tensor) -> None:
        """Take `weight`, `weight_scale` or `bias` as the checkpoint has it.

        A float weight is quantized here when `weight_auto_quant` is set. Raises CheckpointError for a name, dtype or
        shape that is not this layer's, for non-finite scales, and for a tensor that was there already.
        """
        expected = self._buffers.get(leaf)
        if leaf in self._arrived or self.packed is not None:
            raise CheckpointError(self.name, f"'{leaf}' is given twice, or a scale for a weight that is not quantized")
        if expected is None:
            allowed = ", ".join(self._wanted())
            raise CheckpointError(self.name, f"tensor '{leaf}' is not part of this layer", allowed=allowed)
        if leaf == "weight_scale" and self.spec.granularity == "channel" and tensor.shape == (self.out_features,):
            tensor = tensor.reshape(expected.shape)
        if tensor.shape != expected.shape:
            self._refuse(leaf, f"has shape {list(tensor.shape)}", f"{list(expected.shape)}")
        if leaf == "weight":
            self._load_weight(tensor)
        elif tensor.dtype not in _FLOATS:
            self._refuse(leaf, f"is {_short(tensor.dtype)}", "a floating-point type")
        else:
            self._set(leaf, tensor.float())
        if leaf == "weight_scale" and not torch.isfinite(tensor).all():
            raise CheckpointError(self.name, "'weight_scale' holds inf or NaN", do="convert the checkpoint again")

    def _load_weight(self, tensor: Tensor) -> None:
        wanted = self.leaves["weight"].dtype
        if tensor.dtype in _FLOATS and self.weight_auto_quant:
            if "weight_scale" in self._arrived:
                raise CheckpointError(self.name, "has a 'weight_scale' though its weight is not quantized")
            for leaf, made in quantize_leaves(tensor, self.spec).items():
                self._set(leaf, made)
        elif tensor.dtype != wanted:
            self._refuse("weight", f"is {_short(tensor.dtype)}", f"{_short(wanted)} for mm_type '{self.scheme.name}'")
        else:
            self._set("weight", tensor)

    def _set(self, leaf: str, tensor: Tensor) -> None:
        self._buffers[leaf] = tensor.detach()
        self._arrived.add(leaf)

    def _wanted(self) -> list[str]:
        return [leaf for leaf in (*self.leaves, "bias") if self._buffers[leaf] is not None]

    def _refuse(self, leaf: str, got: str, wanted: str) -> None:
        is_float = leaf == "weight" and got.removeprefix("is ") in map(_short, _FLOATS)
        do = (
            "convert the checkpoint first, or set weight_auto_quant"
            if is_float
            else "use the mm_type of the checkpoint"
        )
        raise CheckpointError(self.name, f"'{leaf}' {got}, the layer wants {wanted}", do=do)

    def finish(self) -> None:
        """Pack the weight for the library. Raises CheckpointError that names what did not arrive."""
        if self.packed is not None:
            return
        missing = [leaf for leaf in self._wanted() if leaf not in self._arrived]
        if missing:
            raise CheckpointError(self.name, f"missing: {', '.join(missing)}", do="convert the checkpoint again")
        held = {leaf: tensor for leaf in self.leaves if (tensor := self._buffers[leaf]) is not None}
        self.packed = self.kernels.prepare(self.scheme, held)
        for leaf in self.leaves:
            self._buffers[leaf] = None

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x [..., K] of a floating-point dtype -> [..., N] in that dtype, after a GELU (tanh) if asked for."""
        packed, rows = self._ready(), x.reshape(-1, self.in_features)
        if rows.shape[0] == 0:
            return x.new_zeros((*x.shape[:-1], self.out_features))
        # Autocast would round the float32 parts of the arithmetic.
        with torch.autocast(x.device.type, enabled=False):
            out = self.kernels.linear(self.scheme, rows, packed, self.bias, gelu)
        return out.view(*x.shape[:-1], self.out_features)

    def quantize(self, x: Tensor) -> Quantized:
        """The codes of x [..., K], for `multiply` of this layer and of all that it `quantizes_as`."""
        with torch.autocast(x.device.type, enabled=False):
            return self.kernels.quantize(self.scheme, x.reshape(-1, self.in_features), self._ready())

    def multiply(self, codes: Quantized, x: Tensor) -> Tensor:
        """What `forward` gives for x [..., K] with at least one row, whose codes are there already."""
        with torch.autocast(x.device.type, enabled=False):
            out = self.kernels.gemm(self.scheme, codes, self._ready(), self.bias, x.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def quantizes_as(self, other: QuantLinear) -> bool:
        """Whether the codes of an activation are the same for both: the same scheme of it, with no stored scale."""
        ours, theirs = (
            (layer.scheme.activation, layer.scheme.act_library, layer.library, layer.in_features)
            for layer in (self, other)
        )
        return ours == theirs and self.scheme.activation is not None and self.scheme.activation.dynamic

    def stacks_with(self, other: QuantLinear) -> bool:
        """Whether the two weights, one under the other, are a weight of the same scheme."""
        activation, rows = self.scheme.activation, self.spec.size if self.spec.granularity == "block" else 1
        static = self.spec.granularity == "tensor" or (activation is not None and not activation.dynamic)
        same = (self.scheme, self.library, self.in_features) == (other.scheme, other.library, other.in_features)
        return same and not static and self.out_features % rows == other.out_features % rows == 0

    def _ready(self) -> Packed:
        if self.packed is None:
            raise RuntimeError(f"{self.name}: finish() was not called after loading")
        return self.packed

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight and its scales as they are held now."""
        if self.packed is not None:
            return self.packed.nbytes
        return sum(t.numel() * t.element_size() for leaf in self.leaves if (t := self._buffers[leaf]) is not None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            for leaf, tensor in self.kernels.unpack(self.scheme, self.packed).items():
                destination[prefix + leaf] = tensor

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme.name}"


class ForceFP32Linear(nn.Linear):
    """A linear layer with float32 weights and arithmetic whatever goes in; the result has the dtype of x."""

    name = "linear"

    def load_tensor(self, leaf: str, tensor: Tensor) -> None:
        """Take `weight` or `bias`. Raises CheckpointError for other names, shapes and non-floating dtypes."""
        expected = self._parameters.get(leaf)
        if expected is None or tensor.shape != expected.shape or tensor.dtype not in _FLOATS:
            got = f"'{leaf}' {list(tensor.shape)} {_short(tensor.dtype)} is not part of this layer"
            raise CheckpointError(self.name, got, allowed="float weight [N, K], bias [N]")
        self._parameters[leaf] = nn.Parameter(tensor.float(), requires_grad=False)

    def finish(self) -> None:
        """Raise CheckpointError that names what did not arrive."""
        if missing := [leaf for leaf, held in self._parameters.items() if held is not None and held.is_meta]:
            raise CheckpointError(self.name, f"missing: {', '.join(missing)}")

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight, self.bias).to(x.dtype)


def build_linear(plan: LayerPlan, bias: bool, dtype: torch.dtype, auto_quant: bool) -> nn.Module:
    """The layer that `plan` describes, without weights: it gets them by `load_tensor` and `finish`."""
    if plan.library == "custom":
        from lightx2v.mm.weight import MM_WEIGHT_REGISTER

        custom = MM_WEIGHT_REGISTER[plan.mm_type](f"{plan.name}.weight", f"{plan.name}.bias" if bias else None)
        return CustomLinear(plan.name, custom, {"mm_type": plan.mm_type, "weight_auto_quant": auto_quant})
    if plan.scheme.weight is None:
        forced = ForceFP32Linear(plan.in_features, plan.out_features, bias, device="meta", dtype=torch.float32)
        forced.name = plan.name
        return forced
    return QuantLinear(
        plan.in_features, plan.out_features, bias, plan.scheme, plan.library, dtype, auto_quant, plan.name
    )


def swap_linears(model: nn.Module, plans: Mapping[str, LayerPlan], dtype: torch.dtype, auto_quant: bool) -> None:
    """Replace the nn.Linear of each name in `plans` by the layer of its plan. "Default" leaves it as it is.

    The new layers are on meta and take their weights through `load_tensor`. Raises ConfigError when a name is no
    nn.Linear of the model or has another shape.
    """
    modules = dict(model.named_modules())
    for name, plan in plans.items():
        old, shape = modules.get(name), (plan.out_features, plan.in_features)
        if not isinstance(old, nn.Linear) or (old.out_features, old.in_features) != shape:
            raise ConfigError("model", f"'{name}' is no linear layer {list(shape)} of it")
        if plan.mm_type != "Default":
            parent, _, leaf = name.rpartition(".")
            setattr(modules[parent], leaf, build_linear(plan, old.bias is not None, dtype, auto_quant))
