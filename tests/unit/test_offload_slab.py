"""Tensors packed into one run of bytes, and seen in place again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightx2v.errors import ConfigError
from lightx2v.features.offload.slab import ALIGNMENT, Slab
from lightx2v.mm.base import Packed
from lightx2v.mm.custom import CustomLinear


def memory_of(slab: Slab) -> Tensor:
    return torch.zeros(slab.nbytes, dtype=torch.uint8)


def moved(module: nn.Module) -> Slab:
    """`module` with its tensors in a slab."""
    slab = Slab.of([("m", module)])
    memory = memory_of(slab)
    slab.pack(memory)
    slab.bind(slab.views(memory))
    return slab


def odd_tensors() -> dict[str, Tensor]:
    base = torch.arange(48, dtype=torch.float32).reshape(6, 8)
    return {
        "transposed": base.t(),
        "columns": base[:, 1:5],
        "expanded": torch.tensor([1.5, -2.0]).expand(3, 2),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 4),
        "codes": torch.randint(-128, 127, (5, 7), dtype=torch.int8),
        "fp8": torch.tensor([0x7F, 0xFF, 0x80, 0x01], dtype=torch.uint8).view(torch.float8_e4m3fn),
        "e8m0": torch.tensor([0, 255, 127], dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "nan": torch.tensor([0x7FC1, 0x7F81], dtype=torch.int16).view(torch.bfloat16),
        "flag": torch.tensor([True, False, True]),
        "float64": torch.tensor([torch.pi], dtype=torch.float64),
        "strange": torch.arange(3.0).as_strided((1, 3), (17, 1)),
    }


def test_every_dtype_and_stride_comes_back_bit_for_bit() -> None:
    tensors = odd_tensors()
    packed = Packed("codes", 1, 1, **{name: tensor.clone() for name, tensor in tensors.items()})
    for name, tensor in tensors.items():  # clone() makes some contiguous
        packed._buffers[name] = tensor
    slab = moved(packed)
    assert all(entry.offset % ALIGNMENT == 0 for entry in slab.entries)
    for name, before in tensors.items():
        after = packed._buffers[name]
        assert after is not None and after is not before
        assert (after.dtype, after.shape, after.stride()) == (before.dtype, before.shape, before.stride())
        raw = [t.reshape(-1).view(torch.uint8) for t in (after, before)]
        assert torch.equal(*raw)
        assert after.untyped_storage().nbytes() == slab.nbytes  # in the slab


def test_tied_parameters_lie_there_once_and_stay_tied() -> None:
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    other.weight = one.weight
    slab = moved(nn.ModuleList([one, other]))
    assert len(slab.entries) == 3 and one.weight is other.weight
    assert isinstance(one.weight, nn.Parameter) and not one.weight.requires_grad


def test_a_tensor_that_was_exchanged_meanwhile_is_left_alone() -> None:
    module = nn.Linear(2, 2)
    slab = moved(module)
    away, new = slab.bound, nn.Parameter(torch.ones(2))
    module.bias = new
    slab.bind(slab.blanks())
    assert module.bias is new and module.weight.is_meta
    slab.bind(away)
    assert module.bias is new and module.weight is away[0]


class Weight:
    """An mm_type from outside the package, with its tensors wherever it likes."""

    def __init__(self) -> None:
        self.weight = torch.randn(3, 4)
        self.more: dict[str, Any] = {"scale": torch.rand(3, 1), "list": [torch.rand(2), "text"]}
        self.inner = nn.Linear(2, 2)
        self.number = 7

    def set_config(self, mm_config: Any) -> None: ...

    def load(self, weight_dict: Any) -> None: ...

    def apply(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() * self.more["scale"].t() + self.more["list"][0].sum() + self.inner.bias.sum()


def test_an_object_of_a_user_is_searched_for_tensors() -> None:
    layer = CustomLinear("layer", custom := Weight(), {})
    x = torch.randn(2, 4)
    wanted = layer(x)
    slab = moved(layer)
    assert len(slab.entries) == 5
    assert torch.equal(layer(x), wanted)
    slab.bind(slab.blanks())
    assert custom.weight.is_meta and custom.more["list"][0].is_meta and custom.more["list"][1] == "text"


def test_what_cannot_be_moved_is_refused_by_name() -> None:
    custom = Weight()
    custom.more["pair"] = (torch.rand(2), torch.rand(2))
    with pytest.raises(ConfigError, match=r"layer \(Weight\).more.pair holds tensors in a tuple"):
        Slab.of([("layer", CustomLinear("layer", custom, {}))])
    opaque = Packed("onednn", 4, 4, weight=torch.rand(4, 4).to_mkldnn())
    with pytest.raises(ConfigError, match=r"'q.packed.weight' .*mkldnn"):
        Slab.of([("q.packed", opaque)])


def test_parts_can_be_left_out() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    slab = Slab.of([("m", module)], without=[module[0]])
    assert [entry.name for entry in slab.entries] == ["m.1.weight", "m.1.bias"]
