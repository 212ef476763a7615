"""The recipes after msModelSlim's examples: each loads, and leaves alone the layers that the example leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AllegroTransformer3DModel, HunyuanVideoTransformer3DModel, SD3Transformer2DModel
from torch import nn

from lightx2v.attention.base import ATTENTION
from lightx2v.config.load import load_config
from lightx2v.foreign.layers import quantizable
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import match_rules
from lightx2v.models.flux.spec import FLUX
from lightx2v.models.wan.spec import WAN
from lightx2v.plan.dit import linear_shapes
from tests.models import tiny_checkpoints, tiny_flux

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "calibration").glob("*.json"))
#: By the beginning of a recipe's name, and in the model's names here: what the example excludes (`*net.2*`, `*fc2*`,
#: `*ffn.2*`); and what it excludes that is quantized in no model here (`context_embedder`, `*modulation*`, ...).
EXCLUDED: dict[str, tuple[set[str], tuple[str, ...]]] = {
    "sd3": (set(), ("context_embedder",)),
    "open_sora": ({"transformer_blocks.0.ff.net.2"}, ("adaln_single.linear",)),
    "flux": ({f"double_blocks.{i}.{stream}_mlp.2" for i in (0, 1) for stream in ("img", "txt")}, ()),
    "hunyuan": (
        {"transformer_blocks.0.ff.net.2", "transformer_blocks.0.ff_context.net.2"},
        ("transformer_blocks.0.norm1.linear", "single_transformer_blocks.0.norm.linear"),
    ),
    "wan": ({"blocks.0.ffn.2", "blocks.1.ffn.2"}, ()),
}


def model_for(recipe: str) -> nn.Module:
    if recipe.startswith("flux"):
        return tiny_flux.tiny_dit()
    if recipe.startswith("wan"):
        return tiny_checkpoints.tiny_dit("t2v")
    heads: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
    with torch.device("meta"):
        if recipe.startswith("sd3"):
            joint = {"joint_attention_dim": 16, "caption_projection_dim": 32, "pooled_projection_dim": 8}
            made: nn.Module = SD3Transformer2DModel(sample_size=8, num_layers=2, **joint, **heads)
        elif recipe.startswith("hunyuan"):
            text = {"text_embed_dim": 16, "pooled_projection_dim": 8, "num_refiner_layers": 1}
            made = HunyuanVideoTransformer3DModel(
                num_layers=1, num_single_layers=1, rope_axes_dim=(4, 6, 6), **text, **heads
            )
        else:  # Allegro is made after Open-Sora-Plan, and its transformer has the same names
            made = AllegroTransformer3DModel(num_layers=1, cross_attention_dim=32, caption_channels=16, **heads)
    return made


def layers_of(model: nn.Module, recipe: str) -> set[str]:
    family = {"flux": FLUX, "wan": WAN}.get(recipe.partition("_")[0])
    return set(quantizable(model) if family is None else linear_shapes(model, family))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_quantizes_what_the_example_does(path: Path) -> None:
    config = load_config(str(path), {})
    recipe = path.stem
    excluded, never = next(found for name, found in EXCLUDED.items() if recipe.startswith(name))
    if recipe.endswith("fa3"):  # the examples exclude no feed-forward there
        excluded = set()
    model = model_for(recipe)
    layers = layers_of(model, recipe)
    linears = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert excluded <= layers and set(never) <= linears - layers
    types, unused = match_rules(layers, config.mm_config.mm_type, config.mm_config.rules)
    assert not unused
    assert {name for name, mm_type in types.items() if mm_type == "Default"} == excluded
    assert {mm_type for name, mm_type in types.items() if name not in excluded} == {config.mm_config.mm_type}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_its_name_says(path: Path) -> None:
    config, name = load_config(str(path), {}), path.stem
    activation = parse(config.mm_config.mm_type).activation
    assert activation is not None and activation.dtype == "int8"
    assert activation.dynamic == ("dynamic" in name)
    assert (activation.granularity == "step") == ("timestep" in name)
    methods = {"m3": "awq", "m4": "iterative", "m6": "flexible"}
    assert config.calibration.smooth == methods.get(name.rpartition("_")[2], "none")
    assert (config.attention.type in ATTENTION) == name.endswith("fa3")
    assert config.calibration.attention == (config.attention.type == "fa3_int8_static_ref")
    assert json.loads(path.read_text())["$schema"] == "../schema.json"


def test_every_family_of_the_examples_has_its_recipes() -> None:
    kinds = ["w8a8", "w8a8_timestep", "w8a8_dynamic_fa3", *(f"w8a8_dynamic_{method}" for method in ("m3", "m4", "m6"))]
    wanted = {f"{family}_{kind}" for family in ("flux_dev", "hunyuan_video") for kind in kinds}
    wanted |= {"sd3_medium_w8a8", "open_sora_plan_v1_2_w8a8", "wan_t2v_w8a8_dynamic"}
    assert {path.stem for path in RECIPES} >= wanted
