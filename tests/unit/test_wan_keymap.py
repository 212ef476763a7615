from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from lightx2v.models.wan.dit import WanDiT
from lightx2v.models.wan.keymap import to_diffusers, to_original
from lightx2v.models.wan.spec import WAN
from tests.models.tiny_checkpoints import diffusers_twin, tiny_arch, tiny_dit


@pytest.mark.parametrize("model_type", ["t2v", "i2v"])
def test_both_ways_agree_with_diffusers(model_type: str) -> None:
    with torch.device("meta"):
        names = list(WanDiT(tiny_arch(model_type)).state_dict())
    for name in names:
        (theirs,) = convert_wan_transformer_to_diffusers({name: None})
        assert (to_diffusers(name), to_original(theirs)) == (theirs, name)
        assert WAN.original_name(name) == name
    assert {to_diffusers(name) for name in names} == set(diffusers_twin(tiny_dit(model_type)).state_dict())


@pytest.mark.parametrize(
    ("original", "diffusers"),
    [
        ("blocks.17.cross_attn.o.weight_scale", "blocks.17.attn2.to_out.0.weight_scale"),
        ("blocks.3.ffn.0", "blocks.3.ffn.net.0.proj"),
        ("img_emb.proj.4.bias", "condition_embedder.image_embedder.norm2.bias"),
        ("blocks.3.modulation", "blocks.3.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("something.else", "something.else"),
    ],
)
def test_layers_scales_and_strangers(original: str, diffusers: str) -> None:
    assert to_diffusers(original) == diffusers
    assert to_original(diffusers) == original


def test_unused_tensors_of_published_files() -> None:
    assert WAN.is_unused("blocks.0.attn2.norm_added_q.weight")
    assert not WAN.is_unused("blocks.0.attn2.norm_added_k.weight")
