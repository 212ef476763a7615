"""Linear layers that hold quantized weights, and their exchange for the nn.Linear of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.deferred import Tokens, tensor_of
from lightx2v.elementwise import gelu_tanh
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.mm.base import Packed, move_buffers
from lightx2v.mm.custom import CustomLinear
from lightx2v.mm.libraries import LIBRARIES
from lightx2v.mm.scheme import Scheme
from lightx2v.mm.select import LayerPlan
from lightx2v.mm.static import StaticInput
from lightx2v.quant.around import AROUND_LEAVES, Around, around_leaves, take_around
from lightx2v.quant.formats import needs_amax, quantize_leaves, read_leaves, rows_together, written_leaves
from lightx2v.quant.layouts import FLOATS, INPUT_LEAVES, Leaf, Stored, accepted, find_layout, layouts_of, misfit, short
from lightx2v.quant.numerics import NATIVE, Quantized, rounding_of
from lightx2v.quant.spec import gguf_kind


class TokenCodes(NamedTuple):
    """Codes of the rows of an input [M, K], rounded as `quant.numerics.NATIVE` does."""

    kind: str
    """"int8" or "fp8"."""
    multiplier: Tensor | None
    """Float32 [K]: the input is multiplied with it and rounded to its dtype first."""


class QuantLinear(nn.Module):
    """y = x W^T + b with quantized W [N, K] and activations quantized on the way. For inference.

    State-dict names are the checkpoint's, as `quant.layouts` lists them for the scheme, and `bias` (kept in float32
    and added before the result is rounded). `load_tensor` takes them one at a time, on the device where the layer is to
    run, and `finish` packs them: from then on only the packed form of the library is held. `state_dict` unpacks it, to
    the layout that the converter writes.
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
        self.accepted = accepted(self.spec, out_features, in_features)
        if bias:
            self.accepted["bias"] = Leaf(FLOATS, ((out_features,),))
        for leaf, stored in layouts_of(self.spec, out_features, in_features)[0].items():
            if stored.required:
                shape = stored.shapes[0] if stored.shapes else (0,)
                self.register_buffer(leaf, torch.empty(shape, dtype=stored.dtype, device="meta"))
        self.register_buffer("bias", torch.empty(out_features, device="meta") if bias else None)
        self.packed: Packed | None = None
        self.static: StaticInput | None = None
        """The scales of a calibrated input."""
        self.rotation, self.surrounded = 0, False
        self.input_key: tuple[int, bytes | None] = (0, None)
        """What tells whether the inputs of two layers are changed alike before they are quantized."""
        self._given: dict[str, Tensor] = {}
        self._made: dict[str, Tensor] = {}

    def load_tensor(self, leaf: str, tensor: Tensor) -> None:
        """Take `weight`, its scales or `bias` as the checkpoint has it.

        A float weight is quantized here when `weight_auto_quant` is set. Raises CheckpointError for a name, dtype
        or shape that is not this layer's, and for a tensor that was there already.
        """
        if leaf in self._given or self.packed is not None:
            raise CheckpointError(self.name, f"'{leaf}' is given twice")
        if leaf not in self.accepted:
            allowed = ", ".join(self.accepted)
            raise CheckpointError(self.name, f"tensor '{leaf}' is not part of this layer", allowed=allowed)
        form = self.accepted[leaf]
        if leaf == "weight" and tensor.dtype in FLOATS:
            self._check_float(tensor)
            made = quantize_leaves(tensor, self.spec)
            self._made, tensor = written_leaves(made, self.spec), made["weight"]
        elif not form.takes(tuple(tensor.shape)):
            wanted = " or ".join(str(list(shape)) for shape in form.shapes[:2])
            self._refuse(leaf, f"has shape {list(tensor.shape)}", wanted)
        elif tensor.dtype not in form.dtypes:
            kinds = "a floating-point type" if form.dtypes == FLOATS else " or ".join(map(short, form.dtypes))
            self._refuse(leaf, f"is {short(tensor.dtype)}", f"{kinds} for mm_type '{self.scheme.name}'")
        self._given[leaf] = tensor.detach()

    def _check_float(self, weight: Tensor) -> None:
        if not self.weight_auto_quant:
            raise CheckpointError(
                self.name,
                f"'weight' is {short(weight.dtype)}, the layer wants quantized ones for mm_type '{self.scheme.name}'",
                do="convert the checkpoint first, or set weight_auto_quant",
            )
        if weight.shape != (self.out_features, self.in_features):
            self._refuse("weight", f"has shape {list(weight.shape)}", f"[{self.out_features}, {self.in_features}]")

    def _refuse(self, leaf: str, got: str, wanted: str) -> None:
        raise CheckpointError(
            self.name, f"'{leaf}' {got}, the layer wants {wanted}", do="use the mm_type of the checkpoint"
        )

    def finish(self) -> None:
        """Pack the weight for the library. Raises CheckpointError that names what did not arrive."""
        if self.packed is not None:
            return
        bias = self._given.pop("bias", None)
        if self.bias is not None:
            if bias is None:
                raise CheckpointError(self.name, "missing: bias", do="convert the checkpoint again")
            self.bias = bias.float()
        leaves = self._leaves(self._given)
        if self.scheme.served is not self.scheme:
            assert self.scheme.activation is not None
            self.static = StaticInput(self.scheme.activation, leaves, self.name)
            self.static.weigh(leaves["weight"], leaves["weight_scale"])
        self.packed = self.kernels.prepare(self.scheme.served, leaves)
        self._given, self._made = {}, {}
        for leaf in self.accepted.keys() & self._buffers.keys() - {"bias"}:
            self._buffers[leaf] = None

    def _leaves(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What libraries compute with, from the tensors that came."""
        size = (self.spec, self.out_features, self.in_features)
        if self._made:
            if extra := [leaf for leaf in given if leaf not in ("weight", *INPUT_LEAVES, *AROUND_LEAVES)]:
                raise CheckpointError(self.name, f"has a '{extra[0]}' though its weight is not quantized")
            given = given | self._made
        stored = {leaf: Stored(tensor.dtype, tuple(tensor.shape)) for leaf, tensor in given.items()}
        if find_layout(*size, stored) is None:
            raise CheckpointError(self.name, misfit(*size, stored), do="convert the checkpoint again")
        self._surround(take_around(given, self.in_features, self.name))
        return read_leaves(given, *size, self.name)

    def _surround(self, around: Around) -> None:
        """Hold what stands around the product, where it moves with the layer."""
        for name in ("multiplier", "down", "up"):
            tensor = getattr(around, name)
            if tensor is not None:
                kept = tensor if name == "multiplier" else tensor.to(self.dtype)
                self.register_buffer(f"around_{name}", kept.contiguous(), persistent=False)
        self.rotation = around.rotation
        self.surrounded = around.before or around.down is not None
        multiplier = None if around.multiplier is None else around.multiplier.cpu().numpy().tobytes()
        self.input_key = (self.rotation, multiplier and hashlib.sha256(multiplier).digest())

    @property
    def around(self) -> Around:
        """What stands around the product."""
        held = (self._buffers.get(f"around_{name}") for name in ("multiplier", "down", "up"))
        multiplier, down, up = held
        return Around(multiplier, self.rotation, down, up)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x [..., K] of a floating-point dtype -> [..., N] in that dtype, after a GELU (tanh) if asked for."""
        packed, rows = self._ready(), x.reshape(-1, self.in_features)
        if rows.shape[0] == 0:
            return x.new_zeros((*x.shape[:-1], self.out_features))
        # Autocast would round the float32 parts of the arithmetic.
        with torch.autocast(x.device.type, enabled=False):
            if self.surrounded:
                around = self.around
                out = around.add(self._product(around.input(rows), packed, False), rows)
                out = gelu_tanh(out) if gelu else out
            else:
                out = self._product(rows, packed, gelu)
        return out.view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor, packed: Packed, gelu: bool) -> Tensor:
        """[M, K] -> [M, N]."""
        if self.static is None:
            return self.kernels.linear(self.scheme, x, packed, self.bias, gelu)
        if self.static.dynamic:
            return self.kernels.linear(self.scheme.served, x, packed, self.bias, gelu)
        codes = self.static.quantize(x)
        out = self.kernels.gemm(self.scheme.served, codes, packed, self.static.bias(self.bias), x.dtype)
        return gelu_tanh(out) if gelu else out

    def quantize(self, x: Tensor) -> Quantized:
        """The codes of x [..., K], for `multiply` of this layer and of all that it `quantizes_as`."""
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, self.in_features)
            rows = self.around.input(rows) if self.surrounded else rows
            return self.kernels.quantize(self.scheme, rows, self._ready())

    def multiply(self, codes: Quantized, x: Tokens) -> Tensor:
        """What `forward` gives for x [..., K] with at least one row, whose codes are there already."""
        with torch.autocast(codes.codes.device.type, enabled=False):
            out = self.kernels.gemm(self.scheme, codes, self._ready(), self.bias, x.dtype)
            if self.surrounded and self.around.down is not None:
                out = self.around.add(out, tensor_of(x).reshape(-1, self.in_features))
        return out.view(*x.shape[:-1], self.out_features)

    def quantizes_as(self, other: QuantLinear) -> bool:
        """Whether the codes of an activation are the same for both: the same scheme of it, with no stored scale."""
        ours, theirs = (
            (layer.scheme.activation, layer.scheme.act_library, layer.library, layer.in_features, layer.input_key)
            for layer in (self, other)
        )
        activation = self.scheme.activation
        alike = activation is not None and activation.dynamic and not activation.outliers
        return ours == theirs and alike and not (self._input_leaves() or other._input_leaves())

    @property
    def token_codes(self) -> TokenCodes | None:
        """The codes that its input may come as, quantized elsewhere token by token; None where it may not."""
        spec, around = self.scheme.activation, self.around
        if spec is None or spec.granularity != "token" or not spec.dynamic or spec.outliers:
            return None
        if around.rotation or around.down is not None or rounding_of(self.scheme.act_library, spec) != NATIVE:
            return None
        return TokenCodes(spec.dtype, around.multiplier)

    def stacks_with(self, other: QuantLinear) -> bool:
        """Whether the two weights, one under the other, are a weight of the same scheme."""
        activation, rows = self.scheme.activation, rows_together(self.spec)
        apart = needs_amax(self.spec) or gguf_kind(self.spec) or (activation is not None and not activation.dynamic)
        same = (self.scheme, self.library, self.in_features) == (other.scheme, other.library, other.in_features)
        apart = apart or self.surrounded or other.surrounded
        return same and not apart and self.out_features % rows == other.out_features % rows == 0

    @property
    def takes_rows(self) -> bool:
        """Whether the result for a row is the same beside any others: not where one scale is found for all of them."""
        activation = self.scheme.activation
        if activation is None or activation.is_calibrated:
            return True
        if activation.outliers:
            return False
        shared = activation.granularity == "tensor" or activation.dtype == "nvfp4"
        return not shared or bool(self._input_leaves())

    def _input_leaves(self) -> list[str]:
        """What the checkpoint has for the scale of this layer's input."""
        return [name for name in self._ready()._buffers if name in INPUT_LEAVES]

    def _ready(self) -> Packed:
        if self.packed is None:
            raise RuntimeError(f"{self.name}: finish() was not called after loading")
        return self.packed

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight and its scales as they are held now."""
        if self.packed is not None:
            around = sum(t.nbytes for t in (self.around.multiplier, self.around.down, self.around.up) if t is not None)
            return self.packed.nbytes + around
        return sum(
            t.numel() * t.element_size() for leaf, t in self._buffers.items() if t is not None and leaf != "bias"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        for module in self.modules():
            move_buffers(module, fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            leaves = written_leaves(self.kernels.unpack(self.scheme.served, self.packed), self.spec)
            static = {} if self.static is None else self.static.leaves()
            for leaf, tensor in {**leaves, **static, **around_leaves(self.around)}.items():
                destination[prefix + leaf] = tensor

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme.name}"


class ForceFP32Linear(nn.Linear):
    """A linear layer with float32 weights and arithmetic whatever goes in; the result has the dtype of x."""

    name = "linear"

    def load_tensor(self, leaf: str, tensor: Tensor) -> None:
        """Take `weight` or `bias`. Raises CheckpointError for other names, shapes and non-floating dtypes."""
        expected = self._parameters.get(leaf)
        if expected is None or tensor.shape != expected.shape or tensor.dtype not in FLOATS:
            got = f"'{leaf}' {list(tensor.shape)} {short(tensor.dtype)} is not part of this layer"
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
