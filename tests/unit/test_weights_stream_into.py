"""Filling a meta model tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightx2v.errors import CheckpointError
from lightx2v.io.weights import Checkpoint, stream_into, write_safetensors

CPU = torch.device("cpu")


class SelfLoading(nn.Module):
    """Loads itself, as a quantized linear does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 2, device="meta"))
        self.got: dict[str, Tensor] = {}
        self.finished = 0

    def load_tensor(self, leaf: str, tensor: Tensor) -> None:
        self.got[leaf] = tensor

    def finish(self) -> None:
        self.finished += 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.tied = nn.Linear(3, 2, bias=False)
        self.tied.weight = self.linear.weight
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int32))
        self.register_buffer("cache", torch.ones(1, device=CPU), persistent=False)


def meta_model() -> Model:
    with torch.device("meta"):
        return Model()


def source() -> dict[str, Tensor]:
    return {
        "linear.weight": torch.arange(6.0).reshape(3, 2).T,
        "linear.bias": torch.tensor([1.0, 0.1]),
        "steps": torch.tensor([3, 4]),
    }


def fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32) -> None:
    stream_into(model, tensors, device=CPU, dtype_of=lambda name: dtype, where="here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_fills_parameters_buffers_and_tied_weights(dtype: torch.dtype) -> None:
    model = meta_model()
    fill(model, source().items(), dtype)
    assert model.linear.weight.equal(source()["linear.weight"].to(dtype))
    assert model.linear.weight.is_contiguous()
    assert model.tied.weight is model.linear.weight
    assert model.steps.dtype == torch.int32
    assert model.steps.tolist() == [3, 4]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.cache.is_meta


def test_dtype_is_asked_by_name() -> None:
    model = meta_model()
    stream_into(
        model, source().items(), device=CPU, where="here",
        dtype_of=lambda name: torch.float32 if name.endswith("bias") else torch.bfloat16,
    )  # fmt: skip
    assert (model.linear.weight.dtype, model.linear.bias.dtype) == (torch.bfloat16, torch.float32)


def test_never_keeps_the_memory_of_the_file(tmp_path: Path) -> None:
    path, model = tmp_path / "w.safetensors", nn.Sequential(nn.Linear(64, 64, device="meta"), SelfLoading())
    tensors = {"0.weight": torch.ones(64, 64), "0.bias": torch.ones(64), "1.weight": torch.ones(2, 2)}
    write_safetensors(path, tensors, {})
    fill(model, Checkpoint.open(path).stream())
    with path.open("r+b") as stream:
        size = path.stat().st_size
        stream.seek(size - sum(tensor.nbytes for tensor in tensors.values()))
        stream.write(bytes(sum(tensor.nbytes for tensor in tensors.values())))
    assert model[0].weight.eq(1).all()
    assert model[1].got["weight"].eq(1).all()


def test_modules_that_load_themselves() -> None:
    model = nn.Sequential(SelfLoading(), nn.Linear(2, 2, bias=False, device="meta"))
    scale = torch.ones(2, 1)
    fill(
        model,
        [("0.weight", torch.zeros(2, 2, dtype=torch.int8)), ("0.weight_scale", scale), ("1.weight", scale @ scale.T)],
    )
    assert model[0].got.keys() == {"weight", "weight_scale"}
    assert model[0].got["weight"].dtype == torch.int8
    assert model[0].finished == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear.bias": None}, r"1 tensors missing: linear.bias"),
        ({"extra": torch.ones(1)}, r"1 tensors without a place in the model: extra"),
        ({f"x{i}": torch.ones(1) for i in range(12)}, r"12 tensors without a place in the model: x0, .*x9, \.\.\."),
        ({"linear.bias": torch.ones(3)}, r"'linear.bias' has shape \[3\], the model wants \[2\]"),
        ({"linear.bias": torch.ones(2, dtype=torch.int8)}, r"'linear.bias' is int8, the model wants float32\n  do: "),
        ({"steps": torch.ones(2)}, r"'steps' is float32, the model wants int32"),
        ({"cache": torch.ones(1)}, r"without a place in the model: cache"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    tensors = {**source(), **change}
    with pytest.raises(CheckpointError, match=message) as caught:
        fill(meta_model(), [(name, tensor) for name, tensor in tensors.items() if tensor is not None])
    assert str(caught.value).startswith("here: ")


def test_missing_and_unknown_are_told_together() -> None:
    with pytest.raises(CheckpointError, match=r"1 tensors without a place in the model: y\n  3 tensors missing: "):
        fill(nn.Sequential(nn.Linear(2, 2), SelfLoading()), [("y", torch.ones(1))])


def test_given_twice() -> None:
    with pytest.raises(CheckpointError, match=r"1 tensors given twice: linear.bias"):
        fill(meta_model(), [*source().items(), ("linear.bias", torch.ones(2))])
