from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn

from lightx2v.attention.sdpa import torch_sdpa
from lightx2v.elementwise import modulated_norm, rotate
from lightx2v.errors import ConfigError
from lightx2v.features.compile import compile_blocks
from lightx2v.models.base import Stream, run_blocks, set_attention
from lightx2v.models.flux.arch import FluxArch
from lightx2v.models.flux.dit import FluxDiT, rope_table
from lightx2v.models.flux.spec import FLUX
from tests.models import tiny_flux as tiny

SIZES = [(2, (3, 4), None), (1, (5, 2), (2, 6))]
PUBLISHED = {"dev": (FluxArch(), 11_901_408_320), "schnell": (FluxArch(guidance=False), 11_891_178_560)}


@pytest.fixture(scope="module", params=[True, False], ids=["guidance", "no guidance"])
def twin(request: pytest.FixtureRequest) -> FluxTransformer2DModel:
    return tiny.tiny_transformer(request.param)


@pytest.fixture(scope="module")
def dit(twin: FluxTransformer2DModel) -> FluxDiT:
    return tiny.tiny_dit(twin.config.guidance_embeds)


@pytest.fixture(scope="module", params=tiny.LAYOUTS)
def path(
    request: pytest.FixtureRequest, twin: FluxTransformer2DModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return tiny.write_dit(twin, tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(("batch", "size", "reference"), SIZES)
@torch.no_grad()
def test_computes_as_diffusers(
    dit: FluxDiT,
    twin: FluxTransformer2DModel,
    path: Path,
    batch: int,
    size: tuple[int, int],
    reference: tuple[int, int] | None,
) -> None:
    inputs = tiny.random_inputs(dit.arch, batch, size, reference=reference)
    got = tiny.read_dit(path, dit.arch)(*inputs)
    assert got.shape == inputs[0].shape
    assert tiny.relative_error(got, tiny.run_twin(twin, *inputs)) < 1e-5


@torch.no_grad()
def test_bfloat16_is_closer_to_float32_than_diffusers(twin: FluxTransformer2DModel, dit: FluxDiT, path: Path) -> None:
    inputs = tiny.random_inputs(dit.arch, *SIZES[1])
    exact = dit(*inputs)
    error = tiny.relative_error(tiny.read_dit(path, dit.arch, torch.bfloat16)(*inputs), exact)
    half = tiny.tiny_transformer(twin.config.guidance_embeds).to(torch.bfloat16)
    assert error < min(0.01, tiny.relative_error(tiny.run_twin(half, *inputs), exact))


@torch.no_grad()
def test_the_reference_image_and_the_guidance_are_seen(dit: FluxDiT) -> None:
    latents, timestep, conditions = tiny.random_inputs(dit.arch, *SIZES[1])
    whole = dit(latents, timestep, conditions)
    assert not torch.allclose(whole, dit(latents, timestep, replace(conditions, latent=None)))
    stronger = dit(latents, timestep, replace(conditions, guidance=7.0))
    assert torch.allclose(whole, stronger) is not dit.arch.guidance


def test_trains_every_parameter_after_inference() -> None:
    dit = tiny.tiny_dit()
    inputs = tiny.random_inputs(dit.arch, *SIZES[0])
    with torch.inference_mode():
        dit(*inputs)
    dit(*inputs).square().mean().backward()
    still = [name for name, p in dit.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@torch.no_grad()
def test_embed_blocks_head_are_the_whole(dit: FluxDiT) -> None:
    inputs = tiny.random_inputs(dit.arch, *SIZES[1])
    latents, timestep, conditions = inputs
    steps = dit.embed_time(torch.cat([torch.zeros(2), timestep]))
    stream, context = dit.embed(latents, steps.at(2), dit.prepare(conditions), step=3, branch="uncond")
    assert (context.step, context.branch, context.grid) == (3, "uncond", (1, 5, 2))
    assert stream.txt is not None
    assert (stream.x.shape, stream.txt.shape) == ((1, 10 + 12, dit.arch.dim), (1, 7, dit.arch.dim))
    half = run_blocks(dit, stream, context, stop=3)
    assert isinstance(half, Stream) and half.txt is not None
    torch.testing.assert_close(dit.head(run_blocks(dit, half, context, start=3), context), dit(*inputs))
    assert [block.index for block in dit.blocks] == list(range(5))


@torch.no_grad()
def test_the_signal_is_what_the_first_block_attends_with(dit: FluxDiT) -> None:
    latents, timestep, conditions = tiny.random_inputs(dit.arch, *SIZES[0])
    stream, context = dit.embed(latents, dit.embed_time(timestep), dit.prepare(conditions))
    seen: list[Tensor] = []
    hook = dit.double_blocks[0].img_attn.qkv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run_blocks(dit, stream, context, stop=1)
    hook.remove()
    assert not dit.time_signal and torch.equal(dit.signal(stream, context), seen[0])


@torch.no_grad()
def test_recalling_a_branch_takes_it_out(dit: FluxDiT) -> None:
    """A block whose branches are all zeros gives back what it got: nothing else is added to the streams."""

    class Zero(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *inputs: object) -> Tensor:
            return torch.zeros_like(self.inner(*inputs))

    changed = tiny.tiny_dit(dit.arch.guidance)
    for block in changed.blocks:
        for names in block.recallable.values():
            for name in names:
                setattr(block, name, Zero(getattr(block, name)))
    latents, timestep, conditions = tiny.random_inputs(dit.arch, *SIZES[1])
    stream, context = changed.embed(latents, changed.embed_time(timestep), changed.prepare(conditions))
    after = run_blocks(changed, stream, context)
    assert after.txt is not None and stream.txt is not None
    assert torch.equal(after.x, stream.x) and torch.equal(after.txt, stream.txt)


@torch.no_grad()
def test_every_attention_goes_through_the_injected_function(dit: FluxDiT) -> None:
    lengths: list[int] = []

    def counting(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        lengths.append(k.shape[1])
        return torch_sdpa(q, k, v, mask=mask, scale=scale)

    inputs = tiny.random_inputs(dit.arch, *SIZES[0])
    plain = dit(*inputs)
    set_attention(dit, counting)
    assert torch.equal(dit(*inputs), plain)
    set_attention(dit, torch_sdpa)
    assert lengths == [7 + 12] * 5
    assert [(part.layer, part.part) for part in dit.attention_parts()] == [(index, "self") for index in range(5)]


@torch.no_grad()
def test_only_linears_and_attention_leave_float32(dit: FluxDiT, path: Path) -> None:
    dtypes: set[torch.dtype] = set()

    def noting(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        dtypes.update((q.dtype, k.dtype, v.dtype))
        return torch_sdpa(q, k, v, mask=mask, scale=scale)

    half = tiny.read_dit(path, dit.arch, torch.bfloat16)
    set_attention(half, noting)
    latents, timestep, conditions = tiny.random_inputs(dit.arch, *SIZES[0])
    stream, context = half.embed(latents, half.embed_time(timestep), half.prepare(conditions))
    assert (context.time.head.dtype, context.time.blocks.dtype) == (torch.float32, torch.bfloat16)
    stream = run_blocks(half, stream, context)
    assert stream.txt is not None
    assert {stream.x.dtype, stream.txt.dtype, half.head(stream, context).dtype} == {torch.float32}
    assert dtypes == {torch.bfloat16}


@torch.no_grad()
def test_one_compilation_serves_all_blocks_of_a_kind() -> None:
    compiled = tiny.tiny_dit()
    inputs = tiny.random_inputs(compiled.arch, *SIZES[0])
    plain = compiled(*inputs)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled)
    torch.testing.assert_close(compiled(*inputs), plain, atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    compiled(*inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_wrong_inputs_are_refused(dit: FluxDiT) -> None:
    latents, timestep, conditions = tiny.random_inputs(dit.arch, *SIZES[1])
    for wrong in (latents[:, 1:], latents.repeat(1, 1, 2, 1, 1)):
        with pytest.raises(ConfigError, match=r"\[B, 16, 1, h, w\]"):
            dit(wrong, timestep, conditions)
    with pytest.raises(ConfigError, match="pooled"):
        dit(latents, timestep, replace(conditions, pooled=None))
    if dit.arch.guidance:
        with pytest.raises(ConfigError, match="guidance"):
            dit(latents, timestep, replace(conditions, guidance=None))


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_sizes(model: str) -> None:
    arch, parameters = PUBLISHED[model]
    with torch.device("meta"):
        dit = FLUX.build_dit(arch)
    assert sum(p.numel() for p in dit.parameters()) == parameters
    shapes = {name: tuple(parameter.shape) for name, parameter in dit.named_parameters()}
    assert FluxArch.from_shapes(shapes, "file") == arch


def test_every_linear_is_quantized_or_kept(dit: FluxDiT) -> None:
    linears = {name for name, module in dit.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name in linears if any(fnmatch(name, glob) for glob in FLUX.quantized)}
    kept = {name for name in linears if any(fnmatch(name, glob) for glob in FLUX.keep)}
    assert quantized | kept == linears and not quantized & kept
    assert len(quantized) == 2 * 10 + 3 * 3


def test_float32_names_leave_only_linears_to_the_compute_dtype(dit: FluxDiT) -> None:
    free = [n for n, _ in dit.named_parameters() if not any(fnmatch(n, glob) for glob in FluxDiT.fp32_names)]
    linears = [f"{name}." for name, m in dit.named_modules() if isinstance(m, nn.Linear)]
    assert {n for n in free if not n.startswith(tuple(linears))} == set()
    used = {glob for glob in FluxDiT.fp32_names for n, _ in dit.named_parameters() if fnmatch(n, glob)}
    assert used == set(FluxDiT.fp32_names)


def test_what_is_read_once_are_modules_of_it(dit: FluxDiT) -> None:
    for name in FluxDiT.once:
        assert hasattr(dit, name)


def test_the_rotary_embedding_is_that_of_diffusers() -> None:
    table = rope_table((4, 14, 14), 3, ((1, 2, 3), (1, 2, 2)))
    image = [(0, row, column) for row in range(2) for column in range(3)]
    reference = [(1, row, column) for row in range(2) for column in range(2)]
    ids = torch.tensor([*[(0, 0, 0)] * 3, *image, *reference])
    x = torch.randn(2, len(ids), 4, 32)
    theirs = apply_rotary_emb(x, FluxPosEmbed(10000, [4, 14, 14])(ids), sequence_dim=1)
    torch.testing.assert_close(rotate(x, table), theirs)


def test_the_head_undoes_the_patches_of_the_input() -> None:
    dit = tiny.tiny_dit()
    latents = torch.randn(1, 16, 1, 6, 4)
    with torch.no_grad():
        tokens = dit._image_tokens(latents)
        patches = (tokens - dit.img_in.bias) @ torch.linalg.pinv(dit.img_in.weight).T
        layer, vec = dit.final_layer, torch.zeros(1, dit.arch.dim)
        layer.adaLN_modulation[1].bias.zero_()
        zero = torch.zeros(1, 1, dit.arch.dim)
        normed = modulated_norm(tokens, zero, zero, layer.eps, torch.float32)
        layer.linear.weight.copy_((torch.linalg.pinv(normed[0]) @ patches[0]).T)
        layer.linear.bias.zero_()
        torch.testing.assert_close(layer(tokens, vec, (1, 3, 2)), latents, atol=1e-4, rtol=1e-4)
