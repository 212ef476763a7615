"""FlexAttention, and the pattern of Radial Attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v.attention import flex
from lightx2v.attention.base import ATTENTION, AttentionFn, Grid
from lightx2v.attention.radial import radial_blocks
from lightx2v.attention.sdpa import torch_sdpa
from lightx2v.errors import LightX2VError


def radial(grid: Grid) -> AttentionFn:
    for_grid = ATTENTION["radial_attn"].for_grid
    assert for_grid is not None
    return for_grid(grid)


def qkv(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, 3, 32, generator=generator) for n in (queries, keys, keys))  # type: ignore[return-value]


def needs_compiler() -> None:
    from lightx2v.platform import select_device

    reason = ATTENTION["flex"].available(select_device("cpu"))
    if reason:
        pytest.skip(reason)


def test_flex_is_the_definition() -> None:
    needs_compiler()
    q, k, v = qkv(130, 70)
    torch.testing.assert_close(ATTENTION["flex"].fn(q, k, v, scale=0.2), torch_sdpa(q, k, v, scale=0.2))


@pytest.mark.parametrize("text", [0, 30])
def test_radial_computes_the_blocks_of_its_pattern_alone(text: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The pattern is what is tested here: without compilation, which takes seconds.
    monkeypatch.setattr(flex, "_compiled", lambda: torch.nn.attention.flex_attention.flex_attention)
    grid = (6, 16, 14)
    tokens = 6 * 16 * 14 + text
    q, k, v = qkv(tokens, tokens)
    blocks = radial_blocks(grid, tokens)
    assert 0.3 < float(blocks.float().mean()) < 0.95
    mask = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)[:tokens, :tokens]
    got = radial(grid)(q, k, v)
    torch.testing.assert_close(got, torch_sdpa(q, k, v, mask=mask), rtol=1e-4, atol=1e-5)
    assert (got - torch_sdpa(q, k, v)).norm() > 0.1 * got.norm()


def test_the_same_block_mask_compiled() -> None:
    needs_compiler()
    q, k, v = qkv(300, 300)
    blocks = torch.tensor([[True, False, False], [True, True, False], [False, False, True]])
    got = flex.flex_attention(q, k, v, 0.2, flex.block_mask(blocks, 300, 300, 128))
    mask = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :300]
    torch.testing.assert_close(got, torch_sdpa(q, k, v, mask=mask, scale=0.2), rtol=1e-4, atol=1e-5)


def by_definition(grid: Grid, block: int, decay: float) -> Tensor:
    """The pattern token by token: what each frame sees of each other, then which blocks that fills."""
    frames, size = grid[0], grid[1] * grid[2]
    tokens = frames * size
    count = -(-tokens // block)
    blocks = torch.zeros(count, count, dtype=torch.bool)
    place = torch.arange(size)
    for i in range(frames):
        for j in range(frames):
            distance = abs(i - j)
            length = 2.0 ** (size.bit_length() - distance.bit_length())
            width = size if distance <= 1 else max(length * decay, block)
            seen = (place[:, None] - place).abs() <= width
            if j == 0:
                seen[:] = True
            elif distance > 1 and length < block and distance % int(block / length):
                continue
            whole = torch.zeros(count * block, count * block, dtype=torch.bool)
            whole[i * size : (i + 1) * size, j * size : (j + 1) * size] = seen
            parts = whole.view(count, block, count, block).sum(1) / block
            high, some = (parts > 1 / 3).sum(-1), (parts > 0).sum(-1)
            blocks |= high > 0.6 * some
    blocks[tokens // block :] = True
    blocks[:, tokens // block :] = True
    return blocks


@pytest.mark.parametrize(
    ("grid", "block", "decay"),
    [((5, 4, 6), 8, 0.2), ((9, 5, 5), 16, 1.0), ((7, 3, 11), 16, 0.5), ((1, 8, 8), 16, 0.2), ((13, 8, 8), 16, 0.2)],
)
def test_the_pattern_is_that_of_single_tokens(grid: Grid, block: int, decay: float) -> None:
    frames, height, width = grid
    assert torch.equal(radial_blocks(grid, frames * height * width, block, decay), by_definition(grid, block, decay))


def test_video_of_wan_is_sparse_and_one_frame_is_dense() -> None:
    blocks = radial_blocks((21, 30, 52), 32760)
    assert blocks.shape == (256, 256) and 0.15 < float(blocks.float().mean()) < 0.45
    assert bool(blocks.diagonal().all()) and bool(blocks[:, :12].all())
    assert bool(radial_blocks((1, 64, 64), 4096 + 512).all())


def test_radial_refuses_what_is_not_its_video() -> None:
    q, k, v = qkv(48, 48)
    fn = radial((2, 4, 6))
    for call in (
        lambda: fn(q, k[:, :40], v[:, :40]),
        lambda: fn(q[:, :40], k[:, :40], v[:, :40]),
        lambda: fn(q, k, v, mask=torch.ones(1, 1, 1, 48, dtype=torch.bool)),
    ):
        with pytest.raises(LightX2VError, match="2 x 4 x 6"):
            call()
    with pytest.raises(LightX2VError, match="size of the video is not known"):
        ATTENTION["radial_attn"].fn(q, k, v)
