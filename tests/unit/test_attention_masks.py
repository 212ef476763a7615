"""Masks of keys on backends that have no masks, and torch.compile around them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v.attention.base import ATTENTION, AttentionFn
from lightx2v.attention.kernel import kept_keys, maskless
from lightx2v.attention.sdpa import torch_sdpa
from lightx2v.errors import LightX2VError

SEEN: list[tuple[int, ...]] = []


@maskless("test_plain")
def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A kernel that notes how many keys it got."""
    SEEN.append(tuple(k.shape[:2]))
    return torch_sdpa(q, k, v, scale=scale)


def qkv(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, n, 2, 8, generator=generator) for n in (5, 9, 9))  # type: ignore[return-value]


def keys_mask(*rows: list[int]) -> Tensor:
    """[B, 1, 1, 9], True at these keys."""
    mask = torch.zeros(len(rows), 9, dtype=torch.bool)
    for row, kept in zip(mask, rows, strict=True):
        row[kept] = True
    return mask[:, None, None]


PREFIX, ALL = [0, 1, 2, 3], list(range(9))


@pytest.mark.parametrize(
    ("mask", "calls"),
    [
        (keys_mask(PREFIX), [(3, 4)]),  # one mask for the whole batch
        (keys_mask(PREFIX, PREFIX, PREFIX), [(3, 4)]),
        (keys_mask(ALL, PREFIX, [0]), [(1, 9), (1, 4), (1, 1)]),
        (keys_mask([0, 1, 6, 7, 8], ALL, PREFIX), [(1, 5), (1, 9), (1, 4)]),  # text that is padded before an image
        (keys_mask([8])[0, 0], [(3, 1)]),
        (keys_mask(PREFIX, ALL, [2]).expand(3, 2, 5, 9), [(1, 4), (1, 9), (1, 1)]),
    ],
)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_masks_of_keys_leave_the_keys_out(mask: Tensor, calls: list[tuple[int, ...]], scale: float | None) -> None:
    q, k, v = qkv()
    for _ in range(2):  # from the second call on the mask is known
        SEEN.clear()
        got = plain(q, k, v, mask=mask, scale=scale)
        assert SEEN == calls
        torch.testing.assert_close(got, torch_sdpa(q, k, v, mask=mask, scale=scale), rtol=1e-5, atol=1e-6)


def test_what_looks_at_nothing_is_zero_as_in_torch() -> None:
    q, k, v = qkv(2)
    mask = keys_mask([], PREFIX)
    got = plain(q, k, v, mask=mask)
    assert not got[0].any() and torch.equal(torch_sdpa(q, k, v, mask=mask)[0], got[0])


def test_one_mask_serves_batches_of_any_size() -> None:
    mask = keys_mask([1, 3])
    assert [len(kept_keys("x", mask, batch)) for batch in (1, 2, 1, 4)] == [1, 2, 1, 4]
    q, k, v = qkv(2)
    torch.testing.assert_close(plain(q, k, v, mask=mask), torch_sdpa(q, k, v, mask=mask))


@pytest.mark.parametrize("shape", [(5, 9), (3, 1, 5, 9), (1, 2, 1, 9)])
def test_any_other_mask_is_an_error_that_says_what_to_do(shape: tuple[int, ...]) -> None:
    q, k, v = qkv()
    with pytest.raises(LightX2VError) as caught:
        plain(q, k, v, mask=torch.ones(shape, dtype=torch.bool))
    assert f"got one of shape {list(shape)}" in caught.value.what and "torch_sdpa" in caught.value.do


@pytest.mark.parametrize("name", ["cpu_flash", "torch_sdpa_flash", "sage_ref_int8_fp8", "fp8_ref"])
def test_backends_without_masks_serve_masks_of_keys(name: str) -> None:
    q, k, v = (x.bfloat16() for x in qkv())
    mask = keys_mask(ALL, [0, 4, 5], PREFIX)
    got, wanted = ATTENTION[name].fn(q, k, v, mask=mask), torch_sdpa(q, k, v, mask=mask)
    assert (got.double() - wanted.double()).norm() <= 0.06 * wanted.double().norm()


@pytest.mark.parametrize("name", ["sage_ref_int8_fp8", "fp8_ref_unsmoothed", "torch_sdpa_flash"])
def test_kernels_are_whole_to_torch_compile(name: str) -> None:
    fn: AttentionFn = ATTENTION[name].fn
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fn(q, k, v).flatten(2) * 2

    q, k, v = (x.bfloat16() for x in qkv())
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    assert torch.equal(compiled(q, k, v), block(q, k, v))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert f"lightx2v.{name}" in called[0] and len(graphs) == 1
    torch.library.opcheck(getattr(torch.ops.lightx2v, name).default, (q, k, v, 0.2))
