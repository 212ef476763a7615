"""`lightx2v calibrate --output`: recipes followed on tiny models, and what they write run again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from lightx2v import LightX2VPipeline
from lightx2v.calibrate import weights
from lightx2v.calibrate.cli import main
from lightx2v.calibrate.output import Output
from lightx2v.calibrate.report import Report
from lightx2v.calibrate.steps import StepGroups
from lightx2v.calibrate.weights import calibrate
from lightx2v.config.calibration import CalibrationConfig
from lightx2v.config.load import load_config
from lightx2v.errors import ConfigError
from lightx2v.eval.metrics import psnr
from lightx2v.mm.linear import QuantLinear
from tests.e2e import flux_dirs, model_dirs
from tests.models.tiny_checkpoints import diffusers_twin
from tests.models.tiny_pipelines import settings, write_pixart

PROMPTS = ("a red circle on a white background moves right", "a blue square on a black background grows")
STEPS = 4
SMALL: dict[str, Any] = {"sampling.steps": STEPS, "calibration.forwards": 6, "calibration.rows": 64}
QUICK: dict[str, Any] = {"mm_config.mm_type": "Default"}


def made(output: Path, mm_type: str, prompts: Sequence[str] = PROMPTS, **recipe: Any) -> Report:
    """A calibration of tiny-wan; `recipe` are settings of its section."""
    sections = {f"calibration.{key}": value for key, value in recipe.items()}
    config = load_config(None, {**SMALL, "mm_config.mm_type": mm_type, **sections})
    with torch.inference_mode():
        return calibrate(config, prompts, output)


def frames(checkpoint: Path | None = None, **given: Any) -> np.ndarray:
    quantized = {} if checkpoint is None else {"dit_quantized_ckpt": str(checkpoint), "mm_config.mm_type": "auto"}
    pipe = LightX2VPipeline.from_config(load_config(None, {"sampling.steps": STEPS, **quantized, **given}))
    return pipe.generate(PROMPTS[0], seed=3, quiet=True)


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return frames()


#: mm_type, recipe -> least PSNR in dB against the unquantized run of four steps.
RECIPES: list[tuple[str, Mapping[str, Any], float]] = [
    ("int8-static", {}, 34),
    ("int8-static-asym", {"observer": "mse", "smooth": "smoothquant"}, 34),
    ("int8-timestep", {"step_groups": 2, "observer": "percentile"}, 34),
    ("fp8-pertensor", {"smooth": "iterative", "alpha": 0.5}, 30),
    ("int8", {"smooth": "flexible", "rotation": "auto"}, 38),
    ("int4-w4a4", {"smooth": "svdquant", "rank": 16, "iterations": 5}, 20),
    ("int4-g64-asym", {"solver": "gptq"}, 28),
    ("int3-g64-asym", {"solver": "hqq"}, 20),
    ("nvfp4", {"smooth": "awq"}, 22),
]


@pytest.mark.parametrize(("mm_type", "recipe", "least"), RECIPES, ids=[f"{r[0]}-{'-'.join(r[1])}" for r in RECIPES])
def test_a_recipe_is_followed_and_runs(
    mm_type: str, recipe: Mapping[str, Any], least: float, tmp_path: Path, plain: np.ndarray
) -> None:
    report = made(tmp_path, mm_type, **recipe)
    assert len(report.layers) == 40 and report.bytes_out > 0
    assert psnr(frames(tmp_path), plain) > least
    tensors = load_file(tmp_path / "block_1.safetensors")
    layer = "blocks.1.ffn.0"
    if "smooth" not in recipe:
        assert not any(name.endswith(".input_multiplier") for name in tensors)
    assert (f"{layer}.input_rotation" in tensors) == ("rotation" in recipe)
    assert (f"{layer}.lowrank_up" in tensors) == ("rank" in recipe)
    if mm_type == "int8-timestep":
        assert tensors[f"{layer}.input_steps"].tolist() == [STEPS, 2, 3]
        assert tensors[f"{layer}.input_scale"].shape == (2,)
    told = json.loads((tmp_path / "calibration.json").read_text())
    assert told["layers"][layer]["error"] == pytest.approx(report.layers[layer].error)
    assert not (tmp_path / ".incomplete").exists()


def test_multipliers_go_into_norms_and_values_where_they_can(tmp_path: Path, plain: np.ndarray) -> None:
    kept, folded = tmp_path / "kept", tmp_path / "folded"
    smooth = {"smooth": "awq", "observer": "histogram"}
    reports = [made(kept, "int4-w4a4", sensitive="none", fold=False, **smooth)]
    reports.append(made(folded, "int4-w4a4", sensitive="none", **smooth))
    stored, without = load_file(kept / "block_1.safetensors"), load_file(folded / "block_1.safetensors")
    gone = {name for name in stored.keys() - without.keys()}
    assert gone and gone <= {
        f"blocks.1.{at}.input_multiplier" for at in ("cross_attn.q", "cross_attn.o", "self_attn.o")
    }
    changed = {name for name in without if name in stored and not stored[name].equal(without[name])}
    assert changed and not any(name.startswith(("blocks.1.ffn", "blocks.1.self_attn.k")) for name in changed)
    if "blocks.1.cross_attn.q.input_multiplier" in gone:
        factor = without["blocks.1.norm3.weight"] / stored["blocks.1.norm3.weight"]
        torch.testing.assert_close(factor, stored["blocks.1.cross_attn.q.input_multiplier"], rtol=1e-2, atol=1e-2)
    # Single clips of four bits differ by some dB however little differs; what the layers lose does not.
    before, after = (np.array([report.layers[name].error for name in reports[0].layers]) for report in reports)
    assert abs(after.mean() / before.mean() - 1) < 0.02 and (after < 1.3 * before).all()
    assert min(psnr(frames(path), plain) for path in (kept, folded)) > 25


def test_scales_of_attention_come_with_the_weights(tmp_path: Path, plain: np.ndarray) -> None:
    static = {"attention.type": "fa3_int8_static_ref"}  # what runs afterwards does not keep calibration from running
    recipe = {"mm_config.mm_type": "int8", "calibration.smooth": "awq", "calibration.attention": True}
    with torch.inference_mode():
        calibrate(load_config(None, {**SMALL, **recipe, **static}), PROMPTS, tmp_path)
    tensors = load_file(tmp_path / "block_0.safetensors")
    assert {name.rpartition(".")[0] for name in tensors if name.endswith("_scales.q")} == {
        "blocks.0.self_attn.attn_scales",
        "blocks.0.cross_attn.attn_scales",
    }
    quantized = frames(tmp_path, **static)
    assert psnr(quantized, plain) > 28
    assert not np.array_equal(quantized, frames(tmp_path))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multipliers, branches, four bits, and scales by step in the layers that keep eight."""
    folder = tmp_path_factory.mktemp("everything")
    made(folder, "int4-w4a4", smooth="svdquant", rank=8, iterations=3, sensitive="int8-timestep", step_groups=2)
    return folder


@pytest.mark.parametrize(
    ("given", "least"),
    [
        ({"offload.enabled": True}, None),
        ({"offload.enabled": True, "offload.granularity": "phase"}, None),
        ({"offload.enabled": True, "offload.lazy_load": True}, None),
        ({"offload.enabled": True, "offload.granularity": "model"}, None),
        ({"unload_modules": True}, None),
        ({"compile": True}, 28),
        ({"cache.type": "taylorseer", "cache.interval": 2}, 15),
        ({"attention.type": "sage_ref_int8_fp8"}, 25),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_was_made_works_with_every_feature(given: dict[str, Any], least: float | None, everything: Path) -> None:
    """`least` dB; None: no bit changes."""
    wanted, got = frames(everything), frames(everything, **given)
    assert np.array_equal(got, wanted) if least is None else psnr(got, wanted) > least


def test_a_lora_on_what_was_made_is_that_on_floats(everything: Path, plain: np.ndarray, tmp_path: Path) -> None:
    shape = shapes()["blocks.2.ffn.0"]
    torch.manual_seed(0)
    factors = {"lora_down": torch.randn(4, shape[1]) / 16, "lora_up": torch.randn(shape[0], 4) / 16}
    path = tmp_path / "lora.safetensors"
    save_file({f"diffusion_model.blocks.2.ffn.0.{name}.weight": tensor for name, tensor in factors.items()}, path)
    lora: dict[str, Any] = {"lora": [{"path": str(path), "strength": 2.0}]}
    on_floats, on_codes = frames(**lora), frames(everything, **lora)
    assert psnr(on_floats, plain) < 45, "it changes something"
    assert psnr(on_codes, on_floats) > psnr(frames(everything), plain) - 2


def test_what_a_recipe_adds_lowers_the_error_of_layers(tmp_path: Path) -> None:
    def error(name: str, mm_type: str, **recipe: Any) -> float:
        layers = made(tmp_path / name, mm_type, sensitive="none", **recipe).layers.values()
        return float(np.mean([layer.error for layer in layers]))

    naive = error("naive", "int4-w4a4")
    assert error("svdquant", "int4-w4a4", smooth="svdquant", rank=16, iterations=10) < 0.8 * naive
    nearest = error("nearest", "int3-g64-asym")
    assert error("gptq", "int3-g64-asym", solver="gptq") < 0.9 * nearest


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(tmp_path / "whole", "int8-static")
    write, calls = Output.write, []

    def stop(self: Output, part: str, *args: Any) -> None:
        if part == "block_2" and not calls:
            calls.append(part)
            raise KeyboardInterrupt
        write(self, part, *args)

    monkeypatch.setattr(Output, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "parts", "int8-static")
    assert not (tmp_path / "parts" / "block_0.safetensors").exists(), "nothing looks whole"
    solver, seen = weights.PartSolver, []
    monkeypatch.setattr(weights, "PartSolver", lambda part, *rest: seen.append(part.name) or solver(part, *rest))
    again = made(tmp_path / "parts", "int8-static")
    assert seen == ["block_2", "block_3"]
    assert again.layers == whole.layers
    for file in (tmp_path / "whole").glob("*.safetensors"):
        first, second = load_file(file), load_file(tmp_path / "parts" / file.name)
        assert first.keys() == second.keys(), file.name
        assert all(tensor.equal(second[name]) for name, tensor in first.items()), file.name


def test_another_recipe_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Output, *args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path, "int8-static")
    assert (tmp_path / ".incomplete" / "streams").exists()
    report = made(tmp_path, "int8", prompts=PROMPTS[:1])
    assert report.prompts == 1 and {layer.mm_type for layer in report.layers.values()} == {
        "W-int8-channel-sym-A-int8-channel-sym-dynamic"
    }


def test_rules_leave_layers_as_they_are(tmp_path: Path) -> None:
    rules = [{"match": "*.ffn.2", "mm_type": "Default"}, {"match": "blocks.0.*", "mm_type": "int8"}]
    config = load_config(None, {**SMALL, "mm_config.mm_type": "int8-static", "mm_config.rules": rules})
    with torch.inference_mode():
        report = calibrate(config, PROMPTS[:1], tmp_path)
    assert len(report.layers) == 37 and "blocks.1.ffn.2" not in report.layers
    pipe = LightX2VPipeline.from_config(
        load_config(None, {"dit_quantized_ckpt": str(tmp_path), "mm_config.mm_type": "auto"})
    )
    types = {layer.name: layer.mm_type for layer in pipe.plan.components["dit"].layers}
    assert types["blocks.1.ffn.2"] == "Default" and types["blocks.0.ffn.0"].startswith(
        "W-int8-channel-sym-A-int8-channel"
    )
    assert types["blocks.1.ffn.0"] == "W-int8-channel-sym-A-int8-tensor-sym-Auto"


def test_flux_is_walked_through_both_kinds_of_blocks(tmp_path: Path) -> None:
    folder = flux_dirs.write_model(tmp_path / "flux", "dev", "original")
    run = {"model_cls": "flux", "task": "t2i", "model_path": str(folder), "dtype": "float32", "sampling.steps": 3}
    size = {"video.height": 64, "video.width": 64}
    recipe = {"mm_config.mm_type": "int8-static", "calibration.smooth": "smoothquant", "calibration.forwards": 4}
    with torch.inference_mode():
        report = calibrate(load_config(None, {**run, **size, **recipe}), ["a fox"], tmp_path / "out")
    kinds = {name.split(".")[0] for name in report.layers}
    assert kinds == {"double_blocks", "single_blocks"}

    def picture(**given: Any) -> np.ndarray:
        pipe = LightX2VPipeline.from_config(load_config(None, {**run, **size, **given}))
        return pipe.generate("a fox", seed=1, quiet=True)

    quantized = picture(dit_quantized_ckpt=str(tmp_path / "out"), **{"mm_config.mm_type": "auto"})
    assert psnr(quantized, picture()) > 30


@pytest.mark.parametrize(("mm_type", "least"), [("int8-static", 15), ("int8-timestep", 30)])
def test_a_pipeline_of_diffusers(mm_type: str, least: float, tmp_path: Path) -> None:
    """The inputs of some layers of this model grow a hundredfold from step to step: one scale cannot do for all."""
    folder = write_pixart(tmp_path / "model")
    given = settings("pixart", folder)
    config = load_config(None, {**given, "mm_config.mm_type": mm_type, "calibration.rows": 32})
    with torch.inference_mode():
        report = calibrate(config, ["a fox", "a hen"], tmp_path / "out")
    assert report.layers
    loaded = {"dit_quantized_ckpt": str(tmp_path / "out"), "mm_config.mm_type": "auto"}
    pipe = LightX2VPipeline.from_config(load_config(None, {**given, **loaded}))
    got = pipe.generate("a fox", seed=1, quiet=True)
    wanted = LightX2VPipeline.from_config(load_config(None, given)).generate("a fox", seed=1, quiet=True)
    assert psnr(got, wanted) > least
    transformer = pipe.runner.pipeline.transformer  # type: ignore[union-attr]
    statics = [layer.static for layer in transformer.modules() if isinstance(layer, QuantLinear)]
    assert statics and all(static is not None for static in statics)
    if mm_type == "int8-timestep":
        assert {static.group for static in statics if static} == {0}, "the last step has its own scale"


def test_few_bits_leave_eight_to_sensitive_layers(tmp_path: Path) -> None:
    report = made(tmp_path, "nvfp4", prompts=PROMPTS[:1])
    kinds = {name: layer.mm_type.split("-")[1] for name, layer in report.layers.items()}
    assert kinds["blocks.0.self_attn.q"] == kinds["blocks.2.ffn.2"] == "int8"
    assert kinds["blocks.1.self_attn.q"] == kinds["blocks.2.ffn.0"] == "nvfp4"


def test_a_target_is_met_with_fewer_bytes_than_one_mm_type_takes(tmp_path: Path) -> None:
    """Between the PSNR of four bits and of eight bits throughout, which are some 30 and 50 dB here."""
    small = [f"--set={key}={value}" for key, value in SMALL.items()]
    argv = ["--output", str(tmp_path), *small, "--prompt", PROMPTS[0], "--set", "calibration.checks=2", "--json"]
    assert main([*argv, "--target", "psnr=38"]) == 0
    told = json.loads((tmp_path / "target.json").read_text())
    assert told["measured_psnr"] >= 38
    assert len(told["layers"]) > 1 and sum(told["layers"].values()) == 40
    eight = sum(n * k + 4 * n for n, k in shapes().values())
    assert told["weight_bytes"] < eight
    assert psnr(frames(tmp_path), frames()) > 34


def shapes() -> dict[str, tuple[int, int]]:
    plan = LightX2VPipeline.from_config(load_config(None, {})).plan
    return {layer.name: (layer.out_features, layer.in_features) for layer in plan.components["dit"].layers}


def test_a_size_is_kept_to(tmp_path: Path) -> None:
    budget = 0.5 * sum(2 * n * k for n, k in shapes().values())
    small = [f"--set={key}={value}" for key, value in SMALL.items()]
    argv = ["--output", str(tmp_path), *small, "--prompt", PROMPTS[0], "--set", "calibration.checks=1", "--json"]
    assert main([*argv, "--target", f"memory={budget / 2**30}"]) == 0
    told = json.loads((tmp_path / "target.json").read_text())
    assert 0.9 * budget < told["weight_bytes"] <= budget
    with pytest.raises(ConfigError, match="GiB or more"):
        main([*argv, "--target", "memory=0.0001"])


def test_experts_are_calibrated_with_the_steps_that_they_serve(tmp_path: Path) -> None:
    """Wan2.2 has a transformer for high noise and one for low noise; diffusers calls them in turn."""
    pipe = model_dirs.build_pipeline("t2v")
    twin = diffusers_twin(model_dirs.random_dit("t2v"))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    whole = WanPipeline(**pipe.components | {"transformer_2": twin}, boundary_ratio=0.8)
    whole.save_pretrained(tmp_path / "model")
    given = {"model_cls": "diffusers", "task": "t2v", "model_path": str(tmp_path / "model"), "dtype": "float32"}
    size = {"video.height": 32, "video.width": 32, "video.frames": 5, "sampling.steps": 4, "prompt": "a fox"}
    config = load_config(None, {**given, **size, "mm_config.mm_type": "int8-static", "calibration.rows": 32})
    with torch.inference_mode():
        report = calibrate(config, ["a fox"], tmp_path / "out")
    assert {name.partition(".")[0] for name in report.layers} == {"transformer", "transformer_2"}
    layer = "blocks.0.ffn.net.2.input_scale"
    scales = [
        load_file(tmp_path / "out" / name / "model.safetensors")[layer] for name in ("transformer", "transformer_2")
    ]
    assert not scales[0].equal(scales[1])
    loaded = {"dit_quantized_ckpt": str(tmp_path / "out"), "mm_config.mm_type": "auto"}
    got = LightX2VPipeline.from_config(load_config(None, {**given, **size, **loaded})).generate("a fox", quiet=True)
    wanted = LightX2VPipeline.from_config(load_config(None, {**given, **size})).generate("a fox", quiet=True)
    assert psnr(got, wanted) > 25


def test_steps_fall_into_groups() -> None:
    recipe = CalibrationConfig(step_groups=3, dynamic_share=0.5)
    groups = StepGroups.of(recipe, 10)
    assert groups.first == (5, 6, 8)
    assert [groups.key(step, 10) for step in range(10)] == [-1] * 5 + [0, 1, 1, 2, 2]
    assert [groups.key(step, 20) for step in (9, 10, 12, 19)] == [-1, 0, 1, 2]
    assert StepGroups.of(CalibrationConfig(dynamic_share=1.0), 4).first == (3,), "one step at least has a scale"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mm_config.mm_type": "Default"}, "names no quantized layer"),
        ({"mm_config.mm_type": "fp8", "calibration.solver": "gptq"}, "gptq makes no codes of"),
        ({"mm_config.mm_type": "int4-g64", "calibration.solver": "hqq"}, "hqq makes no codes of"),
        ({"mm_config.mm_type": "int8", "calibration.rotation": 96}, "power of two"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        calibrate(load_config(None, {**SMALL, **given}), PROMPTS, tmp_path)


def test_the_command_line_makes_one_of_two_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--cache"], ["--cache", "--output", "a", "--save", "b"], ["--output", "a", "--save", "b"]):
        with pytest.raises(ConfigError):
            main(argv)
    small = [f"--set={key}={value}" for key, value in SMALL.items()]
    argv = ["--output", str(tmp_path), "--set", "mm_config.mm_type=int8-static", *small, "--prompt", PROMPTS[0]]
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 1
