"""Projections put together, quantizations shared, blocks compiled: the same results as layer by layer."""

from __future__ import annotations

import functools
import weakref
from fnmatch import fnmatchcase

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightx2v.features.compile import compile_blocks
from lightx2v.mm.fused import FusedPart, fuse_projections
from lightx2v.mm.linear import QuantLinear, swap_linears
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import plan_layer
from lightx2v.mm.together import feed_forward, project
from lightx2v.models.wan.dit import WanDiT
from lightx2v.models.wan.spec import WAN
from lightx2v.platform import select_device
from tests.models import tiny_checkpoints as tiny

CPU = select_device("cpu")
SHAPE = (1, (2, 4, 4))


def quantized(model: WanDiT, mm_types: dict[str, str]) -> WanDiT:
    """`model` with every linear of its blocks in the mm_type of the last glob that matches its name."""
    tensors = model.state_dict()
    plans = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and any(fnmatchcase(name, glob) for glob in WAN.quantized):
            mm_type = [kind for glob, kind in mm_types.items() if fnmatchcase(name, glob)][-1]
            shape = (layer.out_features, layer.in_features)
            plans[name] = plan_layer(name, mm_type, parse(mm_type), *shape, device=CPU, fallback=False)
    swap_linears(model, plans, torch.float32, auto_quant=True)
    for name in plans:
        layer = model.get_submodule(name)
        if isinstance(layer, QuantLinear):
            for leaf in ("weight", "bias"):
                layer.load_tensor(leaf, tensors[f"{name}.{leaf}"])
            layer.finish()
    return model


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("mm_type", ["Default", "int8", "fp8", "int8-reference"])
@torch.no_grad()
def test_fused_projections_compute_the_same(task: str, mm_type: str) -> None:
    model = quantized(tiny.tiny_dit(task), {"*": mm_type})
    inputs = tiny.random_inputs(model.arch, *SHAPE)
    before, names = model(*inputs), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = fuse_projections(model)
    assert groups == model.arch.num_layers * (3 if task == "i2v" else 2)
    assert tiny.relative_error(model(*inputs), before) < 1e-6
    after = model.state_dict()
    assert after.keys() == names.keys()
    assert all(torch.equal(after[name].float(), names[name].float()) for name in names)
    assert len({id(tensor) for tensor in model.buffers()}) == len(list(model.buffers()))


@torch.no_grad()
def test_what_does_not_agree_is_left_alone() -> None:
    model = quantized(tiny.tiny_dit("t2v"), {"*": "int8", "*.v": "fp8", "blocks.1.*": "Default"})
    inputs = tiny.random_inputs(model.arch, *SHAPE)
    before = model(*inputs)
    assert fuse_projections(model) == 2  # both of the block that is not quantized
    assert not isinstance(model.blocks[0].self_attn.q, FusedPart)
    assert tiny.relative_error(model(*inputs), before) < 1e-6


def test_a_part_alone_gives_its_own_channels() -> None:
    model = tiny.tiny_dit("t2v")
    attention = model.blocks[0].self_attn
    x = torch.randn(1, 5, model.arch.dim)
    with torch.no_grad():
        wanted = [layer(x) for layer in (attention.q, attention.k, attention.v)]
        fuse_projections(model)
        got = [layer(x) for layer in (attention.q, attention.k, attention.v)]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def layer(mm_type: str, out_features: int) -> QuantLinear:
    plan = plan_layer("a", mm_type, parse(mm_type), out_features, 128, device=CPU, fallback=False)
    made = QuantLinear(128, out_features, True, plan.scheme, plan.library, torch.float32, True)
    made.load_tensor("weight", torch.randn(out_features, 128))
    made.load_tensor("bias", torch.randn(out_features))
    made.finish()
    return made


@torch.no_grad()
def test_one_quantization_serves_layers_that_agree_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer("int8", 64), layer("int8", 96)]
    x, calls = torch.randn(2, 5, 128), []
    kernels, real = layers[0].kernels, type(layers[0].kernels).quantize

    def count(*args: object) -> object:
        calls.append(args)
        return real(kernels, *args)  # type: ignore[arg-type]

    wanted = [made(x) for made in layers]
    monkeypatch.setattr(kernels, "quantize", count, raising=False)
    assert all(torch.equal(one, other) for one, other in zip(project(x, *layers), wanted, strict=True))
    assert len(calls) == 1
    mixed = [layers[0], layer("fp8", 64)]
    assert all(torch.equal(one, made(x)) for one, made in zip(project(x, *mixed), mixed, strict=True))


EIGHT_BITS = ["int8", "fp8", "fp8-b128", "int8-torch", "int8-reference", "fp8-pertensor"]
BLOCKS = ["mxfp8", "mxfp6-mxfp8", "mxfp4", "nvfp4", "int4-g128", "gguf-Q4_0"]


@pytest.mark.parametrize("mm_type", ["Default", *EIGHT_BITS, *BLOCKS])
@torch.no_grad()
def test_one_compiled_graph_serves_all_blocks(mm_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    model = quantized(tiny.tiny_dit("t2v"), {"*": mm_type})
    fuse_projections(model)
    inputs: tuple[Tensor, ...] = tiny.random_inputs(model.arch, *SHAPE)
    before = model(*inputs)
    compile_blocks(model)
    assert tiny.relative_error(model(*inputs), before) < 1e-5
    assert model.arch.num_layers > 1 and counter.frame_count == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_what_no_step_changes_is_computed_once() -> None:
    model = tiny.tiny_dit("i2v")
    latents, _, conditions = tiny.random_inputs(model.arch, *SHAPE)
    projected: list[str] = []
    for name, child in model.named_modules():
        if isinstance(child, nn.Linear):
            child.register_forward_hook(lambda *_, name=name: projected.append(name))
    times = model.embed_time(torch.tensor([900.0, 500.0, 100.0]))
    prepared = model.prepare(conditions)
    outputs = []
    for step in range(3):
        stream, context = model.embed(latents, times.at(step), prepared, step=step)
        for block in model.blocks:
            stream = block(stream, context)
        outputs.append(model.head(stream, context))
    once = [
        n for n in projected if n.endswith(("cross_attn.k", "cross_attn.v_img", "text_embedding.0", "projection.1"))
    ]
    assert len(once) == len(set(once)) == 2 * model.arch.num_layers + 2
    assert tiny.relative_error(outputs[1], model(latents, torch.tensor([500.0]), conditions)) < 1e-6


@torch.no_grad()
def test_a_feed_forward_is_parted_only_where_rows_do_not_share_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightx2v.mm.together.CPU_ROWS", 4)
    x = torch.randn(1, 10, 128) * torch.arange(1, 11).view(1, 10, 1)
    for mm_type, parted in (("int8", True), ("mxfp8", True), ("nvfp4", False), ("fp8-pertensor", False)):
        up, down = layer(mm_type, 128), layer(mm_type, 128)
        assert up.takes_rows is parted
        whole = down(F.gelu(up(x), approximate="tanh"))
        assert tiny.relative_error(feed_forward(x, up, down), whole) < 1e-3
    up, down = nn.Linear(128, 256), nn.Linear(256, 128)
    assert tiny.relative_error(feed_forward(x, up, down), down(F.gelu(up(x), approximate="tanh"))) < 1e-6


@torch.no_grad()
def test_single_layers_are_freed_as_soon_as_they_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(tiny.tiny_dit("t2v"), {"*": "int8"})
    single = [weakref.ref(getattr(block.self_attn, name)) for block in model.blocks for name in "qkv"]
    alive: list[int] = []
    monkeypatch.setattr("lightx2v.mm.fused.trim_memory", lambda: alive.append(sum(ref() is not None for ref in single)))
    fuse_projections(model)
    assert alive == [3, 3, 0, 0]  # self-attention and cross-attention of two blocks
