"""nunchaku's layers: what their formulas give in float64 is what the loaded layers compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.dialects.base import Wanted
from lightx2v.io.dialects.open import open_any
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.linear import build_linear
from lightx2v.plan.layers import ComponentPlan, plan_component
from tests.interop import nunchaku_files as files
from tests.interop.stored import CPU, relative_error

N, K = 256, 384
LAYER = "layers.0.attention.to_q"
IN_FLOAT32 = {
    "int4-w4a4": "W-int4-group64-sym-A-int4-channel-group64-sym-dynamic-Reference",
    "nvfp4": "nvfp4-reference",
}
"""Those whose products are not in bfloat16."""
WTSCALE = 0.75
Leaves = dict[str, Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, X = random(N, K), random(9, K, seed=2)
BIAS, SMOOTH = random(N, seed=1).bfloat16(), (random(K, seed=3).abs() + 0.5).bfloat16()


def branch(ranks: int) -> tuple[Tensor, Tensor]:
    """Down [R, K] and up [N, R]."""
    return (random(ranks, K, seed=4) / 16).bfloat16(), (random(N, ranks, seed=5) / 16).bfloat16()


def around(ranks: int) -> Leaves:
    down, up = branch(ranks)
    return {
        "bias": files.packed_vector(BIAS),
        "smooth_factor": files.packed_vector(SMOOTH),
        "smooth_factor_orig": files.packed_vector(SMOOTH),
        "proj_down": files.packed_lowrank(down, down=True),
        "proj_up": files.packed_lowrank(up, down=False),
    }


def int4(ranks: int = 16) -> Leaves:
    codes, scale = files.int4_weight(WEIGHT)
    packed = {"qweight": files.packed_codes(codes & 15), "wscales": files.packed_scales(scale)}
    return packed | around(ranks)


def nvfp4(ranks: int = 16, of_rows: float = 0.0078125) -> Leaves:
    codes, scale = files.nvfp4_weight(WEIGHT, of_rows * WTSCALE)
    return {
        "qweight": files.packed_codes(codes),
        "wscales": files.packed_micro_scales(scale),
        "wcscales": torch.full((N,), of_rows, dtype=torch.bfloat16),
        "wtscale": torch.tensor([WTSCALE], dtype=torch.bfloat16),
    } | around(ranks)


def awq() -> Leaves:
    codes = torch.randint(16, (N, K), generator=torch.Generator().manual_seed(6))
    scale = (random(N, K // 64, seed=7).abs() + 0.1).bfloat16()
    filled = torch.zeros(2, N, dtype=torch.bfloat16)
    return {
        "qweight": files.packed_awq(codes),
        "wscales": torch.cat((scale.t(), filled)),
        "wzeros": torch.cat((-7 * scale.t(), filled)),
        "bias": BIAS,
    }


def outside(x: Tensor, ranks: int) -> Tensor:
    """What is added to the quantized product."""
    down, up = branch(ranks)
    return x.double() @ down.double().t() @ up.double().t() + BIAS.double()


def opened(tmp_path: Path, leaves: Leaves, layer: str = LAYER, metadata: dict[str, str] | None = None) -> Checkpoint:
    path = tmp_path / "model.safetensors"
    save_file({f"{layer}.{leaf}": tensor.contiguous() for leaf, tensor in leaves.items()}, path, metadata)
    return open_any(path, Wanted(lambda layer: True))


def planned(checkpoint: Checkpoint, mm_type: str = "auto") -> ComponentPlan:
    return plan_component(
        "dit",
        checkpoint,
        checkpoint.path,
        {LAYER: (N, K)},
        rename=None,
        mm_type=mm_type,
        rules=(),
        auto_quant=False,
        fallback=False,
        device=CPU,
        dtype_bytes=4,
    )


def result(checkpoint: Checkpoint, mm_type: str = "auto") -> Tensor:
    """Of the loaded layer, of X."""
    (layer,) = planned(checkpoint, mm_type).layers
    built = build_linear(layer, bias=True, dtype=torch.float32, auto_quant=False)
    for name, tensor in checkpoint.stream():
        built.load_tensor(name.rpartition(".")[2], tensor)  # type: ignore[operator]
    built.finish()  # type: ignore[operator]
    made: Tensor = built(X)
    return made


@pytest.mark.parametrize("ranks", [16, 32])
def test_int4(ranks: int, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, int4(ranks))
    assert planned(checkpoint).layers[0].mm_type == "int4-w4a4"
    codes, scale = files.int4_weight(WEIGHT)
    weight = codes.double() * scale.double().repeat_interleave(64, dim=1)
    groups = (X.double() / SMOOTH.double()).unflatten(1, (-1, 64))
    step = groups.abs().amax(dim=2, keepdim=True) / 7
    rounded = ((groups / step).round() * step).flatten(1)
    assert relative_error(result(checkpoint, IN_FLOAT32["int4-w4a4"]), rounded @ weight.t() + outside(X, ranks)) < 1e-5


@pytest.mark.parametrize("ranks", [16, 32])
def test_nvfp4(ranks: int, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, nvfp4(ranks))
    assert planned(checkpoint).layers[0].mm_type == "nvfp4"
    codes, scale = files.nvfp4_weight(WEIGHT, 0.0078125 * WTSCALE)
    weight = files.E2M1_CODES[codes] * scale.double().repeat_interleave(16, dim=1) * 0.0078125 * WTSCALE
    groups = (X.double() / SMOOTH.double()).unflatten(1, (-1, 16))
    step = (groups.abs().amax(dim=2, keepdim=True) / 6).float().to(torch.float8_e4m3fn).double()
    rounded = (files.E2M1_CODES[files.nearest_e2m1(groups / step)] * step).flatten(1)
    assert relative_error(result(checkpoint, IN_FLOAT32["nvfp4"]), rounded @ weight.t() + outside(X, ranks)) < 1e-5


def test_nvfp4_without_further_factors(tmp_path: Path) -> None:
    leaves = nvfp4()
    del leaves["wcscales"], leaves["wtscale"]
    checkpoint = opened(tmp_path, leaves)
    assert float(checkpoint.load(f"{LAYER}.weight_global_scale")) == 1


def test_awq(tmp_path: Path) -> None:
    leaves = awq()
    checkpoint = opened(tmp_path, leaves)
    assert planned(checkpoint).layers[0].mm_type == "int4-g64-asym"
    codes = torch.randint(16, (N, K), generator=torch.Generator().manual_seed(6))
    scale, zero = (leaves[leaf].t()[:, : K // 64].double() for leaf in ("wscales", "wzeros"))
    weight = codes * scale.repeat_interleave(64, dim=1) + zero.repeat_interleave(64, dim=1)
    assert relative_error(result(checkpoint), X.double() @ weight.t() + BIAS.double()) < 1e-5


def test_a_layer_without_low_rank_branch(tmp_path: Path) -> None:
    leaves = int4()
    del leaves["proj_down"], leaves["proj_up"]
    mm_type = IN_FLOAT32["int4-w4a4"]
    difference = result(opened(tmp_path, int4()), mm_type) - result(opened(tmp_path, leaves), mm_type)
    assert relative_error(difference, outside(X, 16) - BIAS.double()) < 1e-5


def test_layers_that_hold_no_codes_become_floats(tmp_path: Path) -> None:
    path = opened(tmp_path, int4()).path
    checkpoint = open_any(path, Wanted(lambda layer: False))
    codes, scale = files.int4_weight(WEIGHT)
    down, up = branch(16)
    weight = codes.double() * scale.double().repeat_interleave(64, dim=1) / SMOOTH.double()
    assert relative_error(checkpoint.load(f"{LAYER}.weight"), weight + up.double() @ down.double()) < 1e-6
    assert torch.equal(checkpoint.load(f"{LAYER}.bias"), BIAS)
    assert set(checkpoint.tensors) == {f"{LAYER}.weight", f"{LAYER}.bias"}


def without(leaf: str) -> Callable[[Leaves], None]:
    def change(leaves: Leaves) -> None:
        del leaves[leaf]

    return change


def put(leaf: str, make: Callable[[Leaves], Tensor]) -> Callable[[Leaves], None]:
    def change(leaves: Leaves) -> None:
        leaves[leaf] = make(leaves)

    return change


@pytest.mark.parametrize(
    ("made", "change", "says"),
    [
        (int4, without("wscales"), "lacks 'wscales'"),
        (int4, without("smooth_factor"), "lacks 'smooth_factor'"),
        (int4, without("proj_up"), "lacks 'proj_up'"),
        (int4, put("wcscales", lambda leaves: BIAS), "of int4 has a 'wcscales'"),
        (int4, put("lora_alpha", lambda leaves: BIAS), "has a 'lora_alpha'"),
        (int4, put("proj_down", lambda leaves: leaves["proj_down"][:, :8]), r"low-rank branch \[384, 8\]"),
        (int4, put("qweight", lambda leaves: leaves["qweight"][:100]), r"has a 'qweight' I8 \[100, 192\]"),
        (int4, put("wscales", lambda leaves: leaves["wscales"].float()), "has a 'wscales' F32"),
        (nvfp4, put("wtscale", lambda leaves: BIAS), "has a 'wtscale'"),
        (awq, without("wzeros"), "lacks 'wzeros'"),
        (awq, put("smooth_factor", lambda leaves: BIAS.clone()), "has a 'smooth_factor'"),
        (awq, put("wscales", lambda leaves: leaves["wscales"][:3]), r"has 'wscales' \[3, 256\] for a weight"),
    ],
)
def test_headers_tell(made: Callable[[], Leaves], change: Callable[[Leaves], None], says: str, tmp_path: Path) -> None:
    leaves = made()
    change(leaves)
    with pytest.raises(CheckpointError, match=says) as refused:
        opened(tmp_path, leaves)
    assert LAYER in str(refused.value)


def test_factors_of_rows_that_differ_are_refused(tmp_path: Path) -> None:
    leaves = nvfp4()
    leaves["wcscales"][5] = 0.5
    with pytest.raises(CheckpointError, match="'wcscales' that differ between rows"):
        result(opened(tmp_path, leaves))


def test_a_zero_that_no_scale_holds_is_refused(tmp_path: Path) -> None:
    leaves = awq()
    leaves["wscales"][1, 7] = 0
    with pytest.raises(CheckpointError, match="'wscales' of 0"):
        result(opened(tmp_path, leaves))


@pytest.mark.parametrize(
    ("layer", "metadata", "says"),
    [
        ("layers.0.attention.to_qkv", {}, "'layers.0.attention.to_qkv' is a layer of nunchaku's own"),
        (LAYER, {"model_class": "NunchakuZImageTransformer2DModel"}, "is of NunchakuZImageTransformer2DModel"),
    ],
)
def test_other_models_of_nunchaku_s_own_are_refused(
    layer: str, metadata: dict[str, str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=says):
        opened(tmp_path, int4(), layer, metadata)
