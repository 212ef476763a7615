"""What stands around a quantized product: multipliers, rotations, low-rank branches, scales from a calibration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.mm.linear import QuantLinear
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import plan_layer
from lightx2v.mm.static import StepScales
from lightx2v.mm.together import project
from lightx2v.platform import DeviceInfo
from lightx2v.quant.around import AROUND_LEAVES, fold_around
from lightx2v.quant.formats import quantize_leaves, written_leaves
from lightx2v.quant.hadamard import hadamard, rotate, rotation_size

CPU = DeviceInfo("cpu", 0, "a CPU", None, 1, 1)
N, K, R = 136, 256, 8


def made(mm_type: str, leaves: dict[str, Tensor], bias: bool = False) -> QuantLinear:
    plan = plan_layer("a", mm_type, parse(mm_type), N, K, device=CPU, fallback=False)
    layer = QuantLinear(K, N, bias, plan.scheme, plan.library, torch.float32, name="a")
    for leaf, tensor in leaves.items():
        layer.load_tensor(leaf, tensor)
    layer.finish()
    return layer


def outlying(rows: int = 12) -> Tensor:
    """Inputs of which a few channels are large."""
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(1))
    x[:, ::37] *= 60
    return x


def stored(mm_type: str, weight: Tensor) -> dict[str, Tensor]:
    spec = parse(mm_type).weight
    assert spec is not None
    return written_leaves(quantize_leaves(weight, spec), spec)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / 16


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("mm_type", ["int8", "fp8", "int4-w4a4", "nvfp4", "int4-g64-asym", "nf4"])
def test_each_part_is_undone_by_the_weight(mm_type: str, weight: Tensor) -> None:
    """The result is that of the float layer, and closer to it than without what takes outliers away."""
    x = outlying()
    wanted = x @ weight.T
    multiplier = (weight.abs().amax(0) / x.abs().amax(0)).sqrt()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    down, up = v[:R], u[:, :R] * s[:R]
    plain = error(made(mm_type, stored(mm_type, weight))(x), wanted)
    smooth = made(mm_type, {**stored(mm_type, fold_around(weight, multiplier, 0)), "input_multiplier": multiplier})
    turned = {**stored(mm_type, fold_around(weight, None, 256)), "input_rotation": torch.tensor(256).int()}
    rotated = made(mm_type, turned)
    branch = made(mm_type, {**stored(mm_type, weight - up @ down), "lowrank_down": down, "lowrank_up": up})
    found = [error(layer(x), wanted) for layer in (smooth, rotated, branch)]
    assert max(found) < 0.2
    if mm_type == "int4-w4a4":
        assert found[0] < plain / 1.5 and found[1] < plain and found[2] < plain
    # What is stored is what came, and all of it moves with the layer.
    state = branch.state_dict()
    assert set(state) >= {"weight", "weight_scale", "lowrank_down", "lowrank_up"}
    assert torch.equal(state["lowrank_up"], up) and smooth.state_dict()["input_multiplier"].equal(multiplier)
    assert int(rotated.state_dict()["input_rotation"]) == 256
    assert made(mm_type, dict(smooth.state_dict()))(x).equal(smooth(x))
    assert all(buffer.is_meta for buffer in branch.to("meta").buffers())


def test_the_parts_together_are_their_definition(weight: Tensor) -> None:
    x, generator = outlying(), torch.Generator().manual_seed(3)
    multiplier = torch.rand(K, generator=generator) + 0.5
    down, up = torch.randn(R, K, generator=generator) / 16, torch.randn(N, R, generator=generator)
    folded = fold_around(weight, multiplier, 128)
    leaves = {**stored("int8", folded), "input_multiplier": multiplier, "input_rotation": torch.tensor(128).int()}
    bare = made("int8", stored("int8", folded))
    layer = made("int8", {**leaves, "lowrank_down": down, "lowrank_up": up})
    wanted = bare(rotate(x * multiplier, 128)) + x @ down.T @ up.T
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    gelu = torch.nn.functional.gelu(layer(x), approximate="tanh")
    torch.testing.assert_close(layer(x, gelu=True), gelu, rtol=1e-4, atol=1e-4)
    # Projections of the same tokens do not share what the others do not have.
    first, second = project(x, layer, bare)
    assert torch.equal(first, layer(x)) and torch.equal(second, bare(x))
    assert layer.weight_bytes > bare.weight_bytes


def test_projections_with_one_multiplier_share_its_quantization(
    weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, multiplier = outlying(), torch.rand(K, generator=torch.Generator().manual_seed(3)) + 0.5
    leaves = {**stored("int8", fold_around(weight, multiplier, 0)), "input_multiplier": multiplier}
    down, up = torch.randn(R, K) / 16, torch.randn(N, R)
    first, second = made("int8", leaves), made("int8", {**leaves, "lowrank_down": down, "lowrank_up": up})
    other = made("int8", {**leaves, "input_multiplier": multiplier * 2})
    wanted = [first(x), second(x), other(x)]
    calls, quantize = [], QuantLinear.quantize
    monkeypatch.setattr(QuantLinear, "quantize", lambda self, x: calls.append(1) or quantize(self, x))
    for got, want in zip(project(x, first, second), wanted, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    assert len(calls) == 1 and not first.quantizes_as(other)
    assert torch.equal(project(x, first, other)[1], wanted[2])


def test_what_stands_around_is_checked(weight: Tensor) -> None:
    plain = stored("int8", weight)
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"input_multiplier": torch.ones(K + 1)}, "shape"),
        ({"input_rotation": torch.tensor(96).int()}, "power of two"),
        ({"lowrank_down": torch.ones(R, K)}, "missing"),
        ({"lowrank_down": torch.ones(R, K), "lowrank_up": torch.ones(N, R + 1)}, "ranks"),
    ]
    for extra, said in cases:
        assert set(extra) <= set(AROUND_LEAVES)
        with pytest.raises(CheckpointError, match=said):
            made("int8", {**plain, **extra})


@pytest.mark.parametrize("size", [1, 2, 32, 64, 128, 256, 4096])
def test_the_rotation_is_hadamards(size: int) -> None:
    x = torch.randn(3, 2 * size, dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    wanted = (x.view(3, 2, size) @ matrix / size**0.5).view(3, -1)
    torch.testing.assert_close(rotate(x.float(), size).double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate(rotate(x.float(), size), size), x.float(), rtol=1e-4, atol=1e-4)
    if size <= 64:
        torch.testing.assert_close(hadamard(size, torch.device("cpu")).double(), matrix / size**0.5)


def test_the_largest_rotation_of_a_width() -> None:
    assert [rotation_size(k) for k in (1536, 5120, 13824, 8960, 8192)] == [512, 1024, 512, 256, 4096]


@pytest.mark.parametrize("mm_type", ["int8-static", "int8-static-asym"])
@pytest.mark.parametrize("library", ["", "-torch", "-reference"])
def test_static_scales_are_the_checkpoints(mm_type: str, library: str, weight: Tensor) -> None:
    x, bias = torch.randn(7, K) + 0.8, torch.randn(N)
    affine = mm_type.endswith("asym")
    low, high = (float(x.min()), float(x.max())) if affine else (-float(x.abs().max()), float(x.abs().max()))
    scale = (high - low) / (255 if affine else 254)
    zero = float(round(-128 - low / scale)) if affine else 0.0
    leaves = {**stored("int8", weight), "bias": bias, "input_scale": torch.tensor([scale])}
    leaves |= {"input_zero": torch.tensor([zero])} if affine else {}
    layer = made(mm_type + library, leaves, bias=True)
    codes = (x.double() / scale).round().add(zero).clamp(-128, 127)
    values = leaves["weight"].double() * leaves["weight_scale"].double()
    wanted = (codes - zero) * scale @ values.T + bias.double()
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-4)
    assert error(layer(x), x @ weight.T + bias) < 0.02
    assert torch.equal(layer(x[2:3]), layer(x)[2:3]), "no other token counts"
    assert dict(layer.state_dict()).keys() == leaves.keys()
    far = layer(x * 100)
    assert float(far.abs().max()) <= float(wanted.abs().max()) * 40, "what is out of range saturates"


def test_static_scales_must_be_there(weight: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"missing: input_scale.*\n.*lightx2v calibrate"):
        made("int8-static", stored("int8", weight))
    with pytest.raises(CheckpointError, match="missing: input_zero"):
        made("int8-static-asym", {**stored("int8", weight), "input_scale": torch.ones(1)})
    stepwise = {"input_scale": torch.ones(2), "input_zero": torch.zeros(2)}
    for steps in ([10, 5], [10, 7, 5], [0, 1, 2]):
        with pytest.raises(CheckpointError, match="first step"):
            made("int8-timestep", {**stored("int8", weight), **stepwise, "input_steps": torch.tensor(steps).int()})


def test_scales_change_with_the_step(weight: Tensor) -> None:
    x = torch.randn(9, K)
    scales, zeros = torch.tensor([0.03, 0.1]), torch.tensor([0.0, 5.0])
    leaves = {**stored("int8", weight), "input_scale": scales, "input_zero": zeros}
    layer = made("int8-timestep", {**leaves, "input_steps": torch.tensor([20, 10, 15]).int()})
    dynamic = made("int8", stored("int8", weight))(x)
    static = [
        made("int8-static-asym", {**leaves, "input_scale": scales[i : i + 1], "input_zero": zeros[i : i + 1]})(x)
        for i in (0, 1)
    ]
    assert torch.equal(layer(x), dynamic), "at first"
    steps = StepScales(torch.nn.ModuleList([layer]), 40)
    for step, wanted in (
        (0, dynamic),
        (19, dynamic),
        (20, static[0]),
        (29, static[0]),
        (30, static[1]),
        (39, static[1]),
    ):
        steps.at(step)
        assert torch.equal(layer(x), wanted), step
    state = layer.state_dict()
    assert state["input_steps"].tolist() == [20, 10, 15] and state["input_scale"].equal(scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outliers_stay_in_floating_point(dtype: torch.dtype, weight: Tensor) -> None:
    x = torch.randn(12, K).clamp(-5, 5)
    x[3, 40], x[5, 90] = 300.0, -80.0
    x = x.to(dtype)
    leaves = stored("int8", weight)
    layer, plain = made("llm-int8", leaves), made("int8", leaves)
    values = leaves["weight"].double() * leaves["weight_scale"].double()
    outside = torch.zeros(K, dtype=torch.bool)
    outside[[40, 90]] = True
    inside = x.double().masked_fill(outside, 0)
    scale = inside.abs().amax(1, keepdim=True) / 127
    wanted = (inside / scale).round() * scale @ values.T + x.double()[:, outside] @ values[:, outside].T
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(layer(x).double(), wanted, rtol=tolerance, atol=tolerance * 10)
    exact = x.float() @ weight.T
    assert error(layer(x).float(), exact) < error(plain(x).float(), exact) / 2
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=tolerance, atol=tolerance * 10)


def test_a_plan_refuses_what_was_not_calibrated(tmp_path: Path, weight: Tensor) -> None:
    from lightx2v.io.weights import Checkpoint, write_safetensors
    from lightx2v.plan.layers import plan_component

    def planned(leaves: dict[str, Tensor], mm_type: str, auto_quant: bool = False) -> str:
        path = tmp_path / "w.safetensors"
        write_safetensors(path, {f"a.{leaf}": tensor for leaf, tensor in leaves.items()}, {})
        opened = Checkpoint.open(path)
        found = plan_component(
            "dit",
            opened,
            path,
            {"a": (N, K)},
            rename=None,
            mm_type=mm_type,
            rules=(),
            auto_quant=auto_quant,
            fallback=False,
            device=CPU,
            dtype_bytes=2,
        )
        return found.layers[0].mm_type

    plain, scale = stored("int8", weight), {"input_scale": torch.ones(1)}
    steps = {"input_zero": torch.zeros(1), "input_steps": torch.tensor([20, 10]).int()}
    assert planned(plain, "auto") == "int8"
    assert planned({**plain, **scale}, "auto") == "int8-static"
    assert planned({**plain, **scale, "input_zero": torch.zeros(1)}, "auto") == "int8-static-asym"
    assert planned({**plain, **scale, **steps}, "auto") == "int8-timestep"
    assert planned({**plain, **scale}, "int8") == "int8", "a static file may run with its own scales for each token"
    for leaves, auto_quant in ((plain, False), ({"weight": weight}, True)):
        with pytest.raises(CheckpointError, match=r"a.input_scale' is missing.*\n.*lightx2v calibrate"):
            planned(leaves, "int8-static", auto_quant)
