from __future__ import annotations

import pytest
import torch

from lightx2v.encoders.loading import split_rows
from lightx2v.encoders.umt5 import clean_prompt
from lightx2v.errors import CheckpointError


@pytest.mark.parametrize(
    "shape",
    [(384, 64), (384,), (384, 1), (3, 1)],
    ids=["weight", "bias", "scale per channel", "scale per block of 128"],
)
def test_fused_rows_are_split_in_order(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = split_rows(tensor, rows=384, parts=3, where="file")
    assert len(parts) == 3 and torch.equal(torch.cat(parts), tensor)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_of_the_whole_tensor_serves_every_part(shape: tuple[int, ...]) -> None:
    assert split_rows(torch.full(shape, 0.5), 384, 3, "file") == (torch.tensor(0.5).view(shape),) * 3


def test_blocks_that_straddle_two_layers_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"straddle the 3 layers of 160 rows"):
        split_rows(torch.ones(4, 2), rows=480, parts=3, where="file")


def test_other_shapes_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"\(7, 2\)"):
        split_rows(torch.ones(7, 2), rows=480, parts=3, where="file")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a  red\n\tcircle ", "a red circle"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("schÃ¶n", "schön"),
        ("the ﬁrst ﬂower", "the first flower"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_wan_does(text: str, cleaned: str) -> None:
    assert clean_prompt(text) == cleaned


def test_prompts_are_cleaned_without_ftfy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightx2v import platform
    from lightx2v.encoders import umt5

    monkeypatch.setattr(umt5, "probe", lambda module: platform.Probe(module, None, "not installed"))
    assert clean_prompt(" schÃ¶n &lt;3 ") == "schÃ¶n <3"
