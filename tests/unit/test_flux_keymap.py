from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from lightx2v.models.flux.arch import FluxArch
from lightx2v.models.flux.keymap import PREFIX, aliases, is_unused, part_of, to_diffusers, to_original
from lightx2v.models.flux.spec import FLUX


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    """Of FLUX.1 dev: diffusers' converter knows its sizes only."""
    with torch.device("meta"):
        dit = FLUX.build_dit(FluxArch())
    return {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}


@pytest.fixture(scope="module")
def theirs(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tuple(t.shape) for name, t in convert_flux_transformer_checkpoint_to_diffusers(state).items()}


def test_names_are_those_that_diffusers_converts(
    shapes: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]
) -> None:
    parts = [part for name in shapes for part in to_diffusers(name)]
    assert len(set(parts)) == len(parts) and set(parts) == set(theirs)


def test_names_go_both_ways(shapes: dict[str, tuple[int, ...]]) -> None:
    for name in shapes:
        parts = [part_of(part) for part in to_diffusers(name)]
        assert parts == [(name, index, len(parts)) for index in range(len(parts))]
        assert to_original(name) == to_original(f"{PREFIX}{name}") == name
    layers = {name.rpartition(".")[0] for name in shapes if not name.endswith("scale")}
    for layer in layers:
        assert {to_original(part) for part in to_diffusers(layer)} == {layer}


def test_aliases_cover_every_row_once(shapes: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        covered = torch.zeros(shape[0])
        taken = {part: torch.zeros(theirs[part][0]) for part in to_diffusers(name)}
        for part, (original, start, stop, first) in aliases(name, shape):
            assert original == name
            if part not in theirs:  # a name of LoRAs alone
                continue
            covered[start:stop] += 1
            count = len(range(shape[0])[start:stop])
            assert count <= theirs[part][0] - first
            taken[part][first : first + count] += 1
        assert covered.eq(1).all() and all(rows.eq(1).all() for rows in taken.values()), name


def test_the_halves_of_the_last_modulation_are_exchanged() -> None:
    name = "final_layer.adaLN_modulation.1.bias"
    tensor = torch.arange(10)
    theirs = torch.zeros(10, dtype=torch.long)
    for _, (_, start, stop, first) in aliases(name, (10,)):
        rows = tensor[start:stop]
        theirs[first : first + len(rows)] = rows
    assert theirs.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def test_what_is_not_the_dits_is_told() -> None:
    assert is_unused("scaled_fp8") and is_unused("vae.encoder.conv_in.weight")
    assert not is_unused("img_in.weight")
    for name in ("something.else.weight", "double_blocks.0.unknown.weight", "transformer_blocks.0.unknown.weight"):
        assert part_of(name) == (name, 0, 1) and to_diffusers(name) == (name,)
