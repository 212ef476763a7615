"""Quantized layers that are planned anew where their model goes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightx2v.integrations.linear import MovableLinear, replace_module
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import LayerPlan, plan_layer
from lightx2v.platform import select_device
from lightx2v.quant.formats import quantize_leaves
from tests.unit.angelslim_nets import relative

N, K = 136, 200
CPU = torch.device("cpu")


def made(dtype: torch.dtype = torch.bfloat16) -> tuple[MovableLinear, list[torch.device]]:
    """A layer on torch's kernels that is on the reference after a move, and the devices that it was planned for."""
    asked: list[torch.device] = []

    def plan(place: torch.device) -> LayerPlan:
        asked.append(place)
        mm_type = "fp8-torch" if len(asked) == 1 else "fp8-reference"
        return plan_layer("block", mm_type, parse(mm_type), N, K, device=select_device("cpu"), fallback=False)

    layer = MovableLinear("block", True, plan, CPU, dtype)
    torch.manual_seed(0)
    spec = parse("fp8").weight
    assert spec is not None
    for leaf, tensor in quantize_leaves(torch.randn(N, K), spec).items():
        layer.load_tensor(leaf, tensor)
    layer.load_tensor("bias", torch.randn(N).to(dtype))
    layer.finish()
    return layer, asked


@torch.no_grad()
def test_a_move_packs_the_weight_for_the_library_of_the_new_device() -> None:
    layer, asked = made()
    before, x = layer.state_dict(), torch.randn(3, K)
    wanted = layer(x)
    layer.device = torch.device("cpu", 0)  # another name, as if it had been elsewhere
    layer.to("cpu")
    assert asked == [CPU, CPU] and layer.plan.library == "reference" and layer.device == CPU
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[leaf].float(), before[leaf].float()) for leaf in before)
    assert after["bias"].dtype == torch.bfloat16 and after["weight"].dtype == torch.float8_e4m3fn
    assert relative(layer(x), wanted) < 0.004


def test_a_cast_plans_nothing_and_a_move_to_meta_keeps_the_dtypes() -> None:
    layer, asked = made()
    layer.half()
    assert len(asked) == 1 and layer.inner.bias is not None and layer.inner.bias.dtype == torch.float32
    layer.to("meta")
    assert len(asked) == 1 and {t.dtype for t in layer.buffers()} == {torch.bfloat16, torch.float32}
    assert all(tensor.is_meta for tensor in layer.buffers())


def test_its_state_dict_inside_a_model_has_the_names_of_a_linear() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"q": nn.Identity()}))
    layer, _ = made(torch.float16)
    replace_module(model, "1.q", layer)
    state = model.state_dict()
    assert list(state)[2:] == ["1.q.bias", "1.q.weight", "1.q.weight_scale"]
    assert state["1.q.bias"].dtype == torch.float16 and state["1.q.weight"].shape == (N, K)
    assert layer.bias is not None and layer.bias.dtype == layer.weight.dtype == torch.float16


def test_a_layer_without_weights_says_so() -> None:
    layer, _ = made()
    empty = MovableLinear("block", True, lambda _: layer.plan, CPU, torch.bfloat16)
    with pytest.raises(RuntimeError, match="finish"):
        empty(torch.zeros(1, K))
