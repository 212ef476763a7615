from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from lightx2v.attention.sdpa import torch_sdpa
from lightx2v.elementwise import rotate
from lightx2v.errors import ConfigError
from lightx2v.models.base import Conditions, run_blocks, set_attention
from lightx2v.models.wan.arch import WanArch
from lightx2v.models.wan.dit import WanDiT, rope_table
from lightx2v.models.wan.layout import detect
from lightx2v.models.wan.spec import WAN
from tests.models import tiny_checkpoints as tiny

SHAPES = [(2, (3, 4, 6)), (1, (1, 10, 4))]
PUBLISHED = {
    "t2v-1.3B": (WanArch(1536, 8960, 12, 30), 1_418_996_800),
    "t2v-14B": (WanArch(5120, 13824, 40, 40), 14_288_491_584),
}


@pytest.fixture(scope="module", params=["t2v", "i2v"])
def dit(request: pytest.FixtureRequest) -> WanDiT:
    return tiny.tiny_dit(request.param)


@pytest.fixture(scope="module", params=["original", "diffusers"])
def loaded(request: pytest.FixtureRequest, dit: WanDiT, tmp_path_factory: pytest.TempPathFactory) -> WanDiT:
    task = dit.arch.model_type
    return tiny.read_dit(detect(tiny.write_dit(dit, tmp_path_factory.mktemp(task), request.param), task))


@pytest.mark.parametrize(("batch", "grid"), SHAPES)
@torch.no_grad()
def test_computes_as_diffusers(dit: WanDiT, loaded: WanDiT, batch: int, grid: tuple[int, int, int]) -> None:
    inputs = tiny.random_inputs(dit.arch, batch, grid)
    got = loaded(*inputs)
    assert got.shape == inputs[0].shape
    assert tiny.relative_error(got, tiny.run_twin(tiny.diffusers_twin(dit), *inputs)) < 1e-5


@torch.no_grad()
def test_bfloat16_is_closer_to_float32_than_diffusers(dit: WanDiT, tmp_path: Path) -> None:
    inputs = tiny.random_inputs(dit.arch, *SHAPES[0])
    exact = dit(*inputs)
    files = detect(tiny.write_dit(dit, tmp_path, "diffusers"), dit.arch.model_type)
    error = tiny.relative_error(tiny.read_dit(files, torch.bfloat16)(*inputs), exact)
    twin = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.bfloat16)
    twin_error = tiny.relative_error(tiny.run_twin(twin, *inputs), exact)
    assert error < min(0.01, twin_error)


@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
def test_trains_every_parameter_after_inference(model_type: str) -> None:
    dit = tiny.tiny_dit(model_type)
    inputs = tiny.random_inputs(dit.arch, *SHAPES[0])
    with torch.inference_mode():
        dit(*inputs)
    dit(*inputs).square().mean().backward()
    still = [name for name, p in dit.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@torch.no_grad()
def test_text_is_padded_with_zeros_and_not_masked(dit: WanDiT) -> None:
    latents, timestep, conditions = tiny.random_inputs(dit.arch, *SHAPES[1], text_tokens=5)
    padded = torch.zeros(1, 512, dit.arch.text_dim)
    padded[:, :5] = conditions.text
    whole = Conditions(text=padded, image=conditions.image, latent=conditions.latent)
    assert torch.equal(dit(latents, timestep, conditions), dit(latents, timestep, whole))


@torch.no_grad()
def test_embed_blocks_head_are_the_whole(dit: WanDiT) -> None:
    inputs = tiny.random_inputs(dit.arch, *SHAPES[0])
    latents, timestep, conditions = inputs
    stream, context = dit.embed(latents, dit.embed_time(timestep), dit.prepare(conditions), step=3, branch="uncond")
    assert (context.step, context.branch, context.time.blocks.dtype) == (3, "uncond", torch.float32)
    assert stream.x.shape == (2, 3 * 2 * 3, dit.arch.dim)
    assert torch.equal(dit.head(run_blocks(dit, stream, context), context), dit(*inputs))


@torch.no_grad()
def test_every_attention_goes_through_the_injected_function(dit: WanDiT) -> None:
    lengths: list[int] = []

    def counting(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        lengths.append(k.shape[1])
        return torch_sdpa(q, k, v, mask=mask, scale=scale)

    inputs = tiny.random_inputs(dit.arch, *SHAPES[0])
    plain = dit(*inputs)
    set_attention(dit, counting)
    assert torch.equal(dit(*inputs), plain)
    set_attention(dit, torch_sdpa)
    assert lengths == [18, 512, *([7] if dit.arch.model_type == "i2v" else [])] * 2


@torch.no_grad()
def test_linears_of_the_blocks_can_be_swapped_by_name(dit: WanDiT) -> None:
    class Coded(nn.Module):
        """Has no weight of the compute dtype, as a quantized layer has none."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.codes, self.offset = linear.weight.data.double(), linear.bias.data

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.codes.to(x.dtype), self.offset.to(x.dtype))

    inputs = tiny.random_inputs(dit.arch, *SHAPES[0])
    swapped = tiny.tiny_dit(dit.arch.model_type)
    for name, module in list(swapped.named_modules()):
        if isinstance(module, nn.Linear) and any(fnmatch(name, glob) for glob in WAN.quantized):
            swapped.set_submodule(name, Coded(module))
    assert torch.equal(swapped(*inputs), dit(*inputs))


@torch.no_grad()
def test_only_linears_and_attention_leave_float32(dit: WanDiT) -> None:
    dtypes: set[torch.dtype] = set()

    def noting(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        dtypes.update((q.dtype, k.dtype, v.dtype))
        return torch_sdpa(q, k, v, mask=mask, scale=scale)

    half = tiny.cast_dit(tiny.tiny_dit(dit.arch.model_type), torch.bfloat16)
    set_attention(half, noting)
    latents, timestep, conditions = tiny.random_inputs(dit.arch, *SHAPES[0])
    stream, context = half.embed(latents, half.embed_time(timestep), half.prepare(conditions))
    assert (stream.x.dtype, context.time.blocks.dtype) == (torch.float32, torch.float32)
    assert context.prepared.text.dtype == torch.bfloat16
    stream = run_blocks(half, stream, context)
    assert (stream.x.dtype, half.head(stream, context).dtype) == (torch.float32, torch.float32)
    assert dtypes == {torch.bfloat16}


def test_wrong_inputs_are_refused(dit: WanDiT) -> None:
    latents, timestep, conditions = tiny.random_inputs(dit.arch, *SHAPES[1])
    with pytest.raises(ConfigError, match=f"{dit.arch.in_dim} wanted"):
        dit(latents[:, 1:], timestep, conditions)
    with pytest.raises(ConfigError, match="at most 512"):
        dit(
            latents,
            timestep,
            Conditions(conditions.text.repeat(1, 2, 1), image=conditions.image, latent=conditions.latent),
        )


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_sizes(model: str) -> None:
    arch, parameters = PUBLISHED[model]
    with torch.device("meta"):
        dit = WAN.build_dit(arch)
    assert sum(p.numel() for p in dit.parameters()) == parameters


def test_every_linear_is_quantized_or_kept(dit: WanDiT) -> None:
    linears = {name for name, module in dit.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name in linears if any(fnmatch(name, glob) for glob in WAN.quantized)}
    kept = {name for name in linears if any(fnmatch(name, glob) for glob in WAN.keep)}
    assert quantized | kept == linears and not quantized & kept
    assert len(quantized) == dit.arch.num_layers * (12 if dit.arch.model_type == "i2v" else 10)


def test_float32_names_leave_only_linears_to_the_compute_dtype(dit: WanDiT) -> None:
    free = [n for n, _ in dit.named_parameters() if not any(fnmatch(n, glob) for glob in WanDiT.fp32_names)]
    linears = [f"{name}." for name, m in dit.named_modules() if isinstance(m, (nn.Linear, nn.Conv3d))]
    assert {n for n in free if not n.startswith(tuple(linears))} == set()
    used = {glob for glob in WanDiT.fp32_names for n, _ in dit.named_parameters() if fnmatch(n, glob)}
    assert dit.arch.model_type == "t2v" or used == set(WanDiT.fp32_names)


def test_rotation_depends_on_relative_position_alone() -> None:
    grid = (4, 5, 6)
    q, k = torch.randn(2, 1, 1, 1, 32).expand(2, 1, 120, 1, 32)
    scores = (rotate(q, rope_table(32, grid))[0, :, 0] @ rotate(k, rope_table(32, grid))[0, :, 0].T).view(*grid, *grid)
    torch.testing.assert_close(scores[0, 1, 2, 2, 2, 4], scores[1, 2, 1, 3, 3, 3])
    assert not torch.isclose(scores[0, 1, 2, 2, 2, 4], scores[1, 2, 1, 3, 3, 4])
