"""`convert_linear(scale=)`: where scales come from, what they do to weights that are codes and to others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.integrations.diffusers import DynamicDiTQuantizer
from lightx2v.integrations.linear import MovableLinear
from tests.unit.angelslim_nets import BLOCKS, TYPES, relative, seeded

Written = Callable[[dict[str, Tensor], Path], object]


def as_torch(scales: dict[str, Tensor], folder: Path) -> Path:
    torch.save(scales, folder / "scales.bin")
    return folder / "scales.bin"


def as_safetensors(scales: dict[str, Tensor], folder: Path) -> str:
    save_file(scales, folder / "own.safetensors")
    return str(folder / "own.safetensors")


def as_folder(scales: dict[str, Tensor], folder: Path) -> str:
    save_file(scales, folder / "fp8_scales.safetensors")
    torch.save({"blocks.0.up": torch.tensor(9.0)}, folder / "fp8_scales.pth")
    return str(folder)


def as_older_folder(scales: dict[str, Tensor], folder: Path) -> Path:
    torch.save(scales, folder / "fp8_scales.pth")
    return folder


def quantized(quant_type: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and its scales."""
    model, quantizer = seeded(), DynamicDiTQuantizer(quant_type)
    quantizer.convert_linear(model)
    return model, quantizer.fp8_scales_map


def holding_codes(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The plain model with the codes of a quantized one as weights, as from_pretrained reads them."""
    plain, state = seeded(), model.state_dict()
    for name in BLOCKS:
        linear = plain.get_submodule(name)
        linear.weight = nn.Parameter(state[f"{name}.weight"].to(dtype), requires_grad=False)
    return plain


def outputs_equal(a: nn.Module, b: nn.Module) -> bool:
    x = torch.randn(2, 5, 200, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return torch.equal(a(x), b(x))


@pytest.mark.parametrize("write", [lambda scales, _: scales, as_torch, as_safetensors, as_folder, as_older_folder])
def test_scales_come_from_a_dict_a_file_or_a_folder(write: Written, tmp_path: Path) -> None:
    model, scales = quantized("fp8-per-tensor")
    plain = holding_codes(model, torch.float32)
    DynamicDiTQuantizer("fp8-per-tensor").convert_linear(plain, scale=write(scales, tmp_path))
    assert outputs_equal(plain, model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
def test_weights_that_hold_codes_take_the_scale_as_it_is(quant_type: str, dtype: torch.dtype) -> None:
    model, scales = quantized(quant_type)
    plain, quantizer = holding_codes(model, dtype), DynamicDiTQuantizer(quant_type)
    quantizer.convert_linear(plain, scale=scales)
    assert outputs_equal(plain, model)
    assert quantizer.fp8_scales_map.keys() == scales.keys()


@pytest.mark.parametrize("quant_type", TYPES)
def test_defect_5_scales_of_channels_and_blocks_work(quant_type: str) -> None:
    """AngelSlim asks a tensor for its truth, so that any scale but a single number raises."""
    model, scales = quantized(quant_type)
    shapes: list[Callable[[Tensor], Tensor]] = [lambda scale: scale]
    if quant_type.startswith("fp8-per-token"):
        shapes += [lambda scale: scale.t(), lambda scale: scale.flatten(), lambda scale: scale.double()]
    for shape in shapes:
        plain = holding_codes(model, torch.bfloat16)
        given = {name.removesuffix(".weight_scale"): shape(scale) for name, scale in scales.items()}
        DynamicDiTQuantizer(quant_type).convert_linear(plain, scale=given)
        assert outputs_equal(plain, model)


def test_a_scale_for_each_channel_goes_with_a_type_of_whole_tensors() -> None:
    rows, _ = quantized("fp8-per-token")
    scales = {f"{name}.weight_scale": rows.state_dict()[f"{name}.weight_scale"] for name in BLOCKS}
    for quant_type in ("fp8-per-tensor", "fp8-per-tensor-weight-only"):
        model = holding_codes(rows, torch.float32)
        DynamicDiTQuantizer(quant_type).convert_linear(model, scale=scales)
        for name in BLOCKS:
            assert torch.equal(model.get_submodule(name).weight, rows.get_submodule(name).weight)


@pytest.mark.parametrize("quant_type", TYPES)
def test_defect_6_unquantized_weights_are_divided_by_the_scale(quant_type: str) -> None:
    """AngelSlim casts such a weight as it is and multiplies by the scale when it runs."""
    model, scales = quantized(quant_type)
    plain = seeded()
    DynamicDiTQuantizer(quant_type).convert_linear(plain, scale=scales)
    exact = seeded()
    for name in BLOCKS:
        got = plain.get_submodule(name).weight
        assert relative(got, exact.get_submodule(name).weight) < 0.03
        # Codes of whole tensors differ by the rounding of the multiplier to bfloat16.
        limit = 0.02 if "tensor" in quant_type else 1e-6
        assert relative(got, model.get_submodule(name).weight) < limit


def test_weights_that_happen_to_be_codes_are_told_apart_by_their_scale() -> None:
    model = nn.ModuleDict({"block": nn.Linear(64, 64, bias=False)})
    with torch.no_grad():
        model["block"].weight.copy_(torch.eye(64) * 1.5)
    for scale, factor in ((1.5 / 448, 1.0), (0.25, 0.25)):
        made = copy.deepcopy(model)
        DynamicDiTQuantizer().convert_linear(made, scale={"block": torch.tensor(scale)})
        assert torch.allclose(made["block"].weight, torch.eye(64) * 1.5 * factor)


def test_layers_without_a_scale_stay_and_scales_without_a_layer_are_told() -> None:
    _, scales = quantized("fp8-per-tensor")
    some = {name: scale for name, scale in scales.items() if "blocks.1" not in name} | {"gone": torch.tensor(1.0)}
    model, quantizer = seeded(), DynamicDiTQuantizer()
    quantizer.convert_linear(model, scale=some)
    assert [name for name in BLOCKS if isinstance(model.get_submodule(name), MovableLinear)] == BLOCKS[:2]
    report = quantizer.report
    assert report is not None
    assert report.skipped["blocks.1.up"] == "no scale is given for it" and report.unused == ("gone",)


NO_SCALES: list[tuple[Any, str]] = [
    ({}, "is empty"),
    (0.5, "is a float"),
    (torch.ones(3), "is a Tensor"),
    ("no/such/file.safetensors", "no such"),
    ({"other": torch.tensor(1.0)}, "fits no linear layer"),
]
BAD: list[tuple[str, Tensor, str]] = [
    ("fp8-per-tensor", torch.ones(7), r"shape \[7\]"),
    ("fp8-per-token", torch.ones(136, 1), r"shape \[136, 1\]"),
    ("fp8-per-block", torch.ones(1, 2), r"shape \[1, 2\]"),
    ("fp8-per-block", torch.ones(2), r"shape \[2\]"),
    ("fp8-per-tensor", torch.tensor(float("nan")), "inf or NaN"),
    ("fp8-per-tensor", torch.tensor(-1.0), "negative"),
    ("fp8-per-tensor", torch.tensor(0.0), "beyond the largest code"),
    ("fp8-per-tensor", torch.tensor(1e-6), "beyond the largest code"),
    ("fp8-per-tensor", torch.tensor(3), "its scale is int64"),
]


def unchanged(model: nn.Module) -> bool:
    return not any(isinstance(module, MovableLinear) for module in model.modules())


@pytest.mark.parametrize(("scale", "said"), NO_SCALES)
def test_what_has_no_scales_is_refused(scale: Any, said: str) -> None:
    model = seeded()
    with pytest.raises((ConfigError, CheckpointError), match=said):
        DynamicDiTQuantizer().convert_linear(model, scale=scale)
    assert unchanged(model)


@pytest.mark.parametrize(("quant_type", "bad", "said"), BAD)
def test_a_scale_that_cannot_be_is_refused_before_any_layer_is_exchanged(
    quant_type: str, bad: Tensor, said: str
) -> None:
    _, scales = quantized(quant_type)
    model = seeded()
    with pytest.raises(CheckpointError, match=rf"blocks\.1\.down.*{said}"):
        DynamicDiTQuantizer(quant_type).convert_linear(model, scale=scales | {"blocks.1.down.weight_scale": bad})
    assert unchanged(model)


def test_a_scale_of_zero_is_no_missing_scale() -> None:
    model, scales = quantized("fp8-per-tensor")
    plain = holding_codes(model, torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="would be lost"):
        DynamicDiTQuantizer().convert_linear(plain, scale=scales | {"blocks.0.up.weight_scale": torch.tensor(0.0)})
    zeros = nn.ModuleDict({"block": nn.Linear(8, 8)})
    with torch.no_grad():
        zeros["block"].weight.zero_()
    DynamicDiTQuantizer().convert_linear(zeros, scale={"block": torch.tensor(0.0)})
    assert isinstance(zeros["block"], MovableLinear)


def test_torch_files_that_hold_code_are_not_run(tmp_path: Path) -> None:
    path = tmp_path / "scales.pth"
    torch.save({"block": nn.Linear(2, 2)}, path)
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        DynamicDiTQuantizer().convert_linear(seeded(), scale=str(path))


def test_a_folder_without_scales_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"fp8_scales\.safetensors"):
        DynamicDiTQuantizer().convert_linear(seeded(), scale=tmp_path)
