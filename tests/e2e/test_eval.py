"""`lightx2v eval` and its functions on models that run: errors by layer and by step, two families, and the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightx2v.cli import main
from lightx2v.config.load import load_config
from lightx2v.config.schema import Config
from lightx2v.denoising import denoise_request
from lightx2v.errors import ConfigError
from lightx2v.eval.compare import compare
from lightx2v.eval.configs import plain
from lightx2v.eval.layer_report import LayerErrors
from lightx2v.eval.layers import layer_errors, spaced
from lightx2v.eval.prompts import Case, draw_prompts
from lightx2v.mm.fused import FusedPart
from lightx2v.plan import Plan
from lightx2v.plan.resolve import EMBEDDED
from lightx2v.runner import Runner, open_plan
from tests.e2e.flux_dirs import write_model as write_flux
from tests.models.tiny_pipelines import WRITERS
from tests.models.tiny_pipelines import settings as foreign_settings

SMALL = {"video.height": 32, "video.width": 32, "video.frames": 5, "sampling.steps": 3, "device": "cpu"}
SETS = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
INT8 = {"mm_config.mm_type": "int8-reference", "mm_config.weight_auto_quant": True}


def config(**more: Any) -> Config:
    return load_config(None, SMALL | more)


def native(chosen: Config) -> Plan:
    plan = open_plan(chosen)
    assert isinstance(plan, Plan)
    return plan


def tiny_wan() -> dict[str, Tensor]:
    """The tensors of its DiT."""
    return load_file(EMBEDDED / "diffusion_pytorch_model.safetensors")


def errors_of(folder: Path, tensors: dict[str, Tensor], **more: Any) -> LayerErrors:
    """Those of `tensors`, as the quantized DiT of a run with `more` settings, in its first and last step."""
    save_file(tensors, folder / "dit.safetensors")
    chosen = config(**more, dit_quantized_ckpt=str(folder / "dit.safetensors"))
    request = replace(native(plain(chosen)).request, prompt="a", seed=0)
    return layer_errors(plain(chosen), [chosen], [request], steps=2)[0]


def int8_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W8A8, symmetric, a scale a row of both, in float64, rounded to bfloat16 once."""
    x, weight = x.double().flatten(0, -2), weight.double()
    codes = []
    for rows in (x, weight):
        scale = rows.abs().amax(1, keepdim=True) / 127
        codes.append(((rows / scale).round(), scale))
    (a, scale_a), (b, scale_b) = codes
    return ((a @ b.T) * scale_a * scale_b.T + bias.double()).bfloat16().double()


@torch.inference_mode()
def test_the_error_of_a_layer_is_that_of_its_output() -> None:
    chosen = config(**INT8)
    case = draw_prompts(1)[0]
    plan = native(plain(chosen))
    request = replace(plan.request, prompt=case.prompt, seed=case.seed)
    found = layer_errors(plain(chosen), [chosen], [request], steps=2)[0]
    assert found.steps == (0, 2) and found.cases == 1 and found.others == ()
    names = {layer.name for layer in plan.components["dit"].layers}
    assert {layer.name for layer in found.layers} == names, "those that run fused have names of their own"
    assert [layer.error for layer in found.layers] == sorted((layer.error for layer in found.layers), reverse=True)

    runner = Runner(plan, fuse=False)
    conditions, image = runner.encode(request)
    wanted = ("blocks.0.self_attn.k", "blocks.1.ffn.2", "blocks.2.cross_attn.v")
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in wanted}
    with runner.components.use("dit", runner.timer) as loaded:
        assert not any(isinstance(module, FusedPart) for module in loaded.model.modules())
        for name in wanted:
            layer = loaded.model.get_submodule(name)
            assert type(layer) is nn.Linear

            def look(module: Any, given: tuple[Tensor, ...], y: Tensor, name: str = name) -> None:
                exact = y.double().flatten(0, -2)
                off = int8_product(given[0], module.weight, module.bias) - exact
                seen[name].append((float(off.square().sum()), float(exact.square().sum())))

            layer.register_forward_hook(look)
        denoise_request(plan, loaded, request, conditions, image, quiet=True)
    by_name = {layer.name: layer for layer in found.layers}
    for name, squares in seen.items():
        per_step = len(squares) // 3
        looked = squares[:per_step] + squares[-per_step:] if per_step else squares
        error = math.sqrt(sum(e for e, _ in looked) / sum(y for _, y in looked))
        assert by_name[name].error == pytest.approx(error, rel=0.02)
        assert set(by_name[name].by_step) == ({0, 2} if per_step else {0})
        assert 0.002 < error < 0.1


def test_several_configurations_are_held_against_one_run() -> None:
    coarse, fine = config(**INT8 | {"mm_config.mm_type": "int4-g128"}), config(**INT8)
    rules = [{"match": "*.ffn.*", "mm_type": "Default"}]
    mixed = config(**INT8, **{"mm_config.rules": rules})
    plan = native(plain(fine))
    request = replace(plan.request, prompt="a red circle on a black background grows", seed=1)
    found = layer_errors(plain(fine), [coarse, fine, mixed], [request], steps=1)
    by_name = [{layer.name: layer.error for layer in each.layers} for each in found]
    assert all(by_name[0][name] > 2 * by_name[1][name] > 0 for name in by_name[1])
    assert by_name[2] == {name: error for name, error in by_name[1].items() if ".ffn." not in name}
    kinds = found[2].kinds()
    assert "blocks.ffn.0" not in kinds and kinds["blocks.self_attn.q"][0] == 4


def test_what_a_comparison_finds() -> None:
    chosen = config(**INT8)
    cases = draw_prompts(3)
    seen = []
    found = compare(chosen, plain(chosen), cases, details=2, layer_steps=1, on_clip=lambda *each: seen.append(each))
    assert [result.case for result, _, _ in seen] == cases and all(clip.shape == (5, 32, 32, 3) for _, clip, _ in seen)
    assert found.steps is not None and len(found.steps.by_case) == 2 and len(found.steps.mean) == 3
    assert all(0 < error < 0.2 for case in found.steps.by_case for error in case)
    assert found.steps.mean[-1] > found.steps.mean[0], "errors add up"
    assert found.reference is not None
    assert found.tested.weight_bytes["dit"] < 0.7 * found.reference.weight_bytes["dit"]
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(told) >= {"distance", "clips", "steps", "layers", "tested", "reference", "differences", "versions"}
    alone = compare(chosen, None, cases[:1])
    assert alone.reference is alone.steps is alone.layers is None and not alone.report.distances


def test_equal_configurations_differ_in_nothing() -> None:
    chosen = config()
    found = compare(chosen, chosen, draw_prompts(1))
    assert found.report.distance_summary()["equal_clips"] == 1
    assert found.steps is not None and found.steps.mean == (0, 0, 0)
    assert found.layers is None and "in the same way" in found.unavailable["layers"]


def test_other_norms_are_told(tmp_path: Path) -> None:
    """Smoothing folded into a norm gives the layers behind it other inputs."""
    tensors = tiny_wan()
    tensors["blocks.1.norm3.weight"] = tensors["blocks.1.norm3.weight"] * 2
    tensors["blocks.1.cross_attn.q.weight"] = tensors["blocks.1.cross_attn.q.weight"] / 2
    found = errors_of(tmp_path, tensors, **INT8)
    assert found.others == ("blocks.1.norm3.weight",)
    assert found.layers[0].name == "blocks.1.cross_attn.q"


def test_scales_of_each_step_are_those_of_that_step(tmp_path: Path) -> None:
    """Per token in the first step, then under a scale so coarse that every code is 0."""
    name = "blocks.0.ffn.0"
    coarse = {f"{name}.input_scale": torch.tensor([1e4]), f"{name}.input_zero": torch.tensor([0.0])}
    steps = {f"{name}.input_steps": torch.tensor([3, 1], dtype=torch.int32)}
    rules = [{"match": name, "mm_type": "int8-timestep"}]
    tensors = {**tiny_wan(), **coarse, **steps}
    found = errors_of(tmp_path, tensors, **{"mm_config.rules": rules, "mm_config.weight_auto_quant": True})
    assert [layer.name for layer in found.layers] == [name]
    assert found.layers[0].by_step[0] < 0.05
    assert found.layers[0].by_step[2] > 0.5


@pytest.mark.parametrize(
    ("steps", "count", "wanted"), [(8, 3, (0, 4, 7)), (4, 6, (0, 1, 2, 3)), (9, 1, (0,)), (1, 6, (0,))]
)
def test_steps_are_spaced_evenly(steps: int, count: int, wanted: tuple[int, ...]) -> None:
    assert spaced(steps, count) == wanted


def test_another_family(tmp_path: Path) -> None:
    folder = write_flux(tmp_path / "flux", "dev", "diffusers")
    given = {"model_cls": "flux", "task": "t2i", "model_path": str(folder), "sampling.steps": 2, "device": "cpu"}
    chosen = load_config(None, given | {"video.height": 32, "video.width": 32} | INT8)
    found = compare(chosen, plain(chosen), [Case("a red circle", 1), Case("a cat", 2)])
    assert found.layers is not None and found.report.points() is None
    kinds = found.layers.kinds()
    assert {"double_blocks.img_attn.qkv", "single_blocks.linear1"} <= set(kinds)
    assert {layer.block for layer in found.layers.layers} >= {"double_blocks.0", "single_blocks.0"}
    assert found.steps is not None and found.report.distance_summary()["temporal_psnr_mean"] is None


def test_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    folder = WRITERS["pixart"](tmp_path)
    chosen = load_config(None, foreign_settings("pixart", folder) | INT8)
    found = compare(chosen, plain(chosen), [Case("a red circle", 1)])
    assert found.layers is None and "its own loop" in found.unavailable["layers"]
    assert found.report.distances[0].psnr > 10
    with pytest.raises(ConfigError, match="cannot be compared one by one"):
        layer_errors(plain(chosen), [chosen], [])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    sets = ["--set", "mm_config.mm_type=int8", "--set", "mm_config.weight_auto_quant=true", *SETS]
    argv = ["eval", "--prompts", "2", "--layer-steps", "1", *sets, "--html", str(page)]
    assert main([*argv, "--min-psnr", "20"]) == 0
    told = capsys.readouterr().out
    assert "against the reference: PSNR mean" in told and "blocks.ffn.2" in told
    assert "blocks.0.self_attn.q" in page.read_text("utf-8")
    assert main([*argv, "--min-psnr", "99", "--json"]) == 1
    shown = capsys.readouterr()
    assert "--min-psnr 99" in shown.err and not json.loads(shown.out)["gate"]["passed"]
