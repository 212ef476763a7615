from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.vae.keymap import config_from_shapes, layer_names, rename
from lightx2v.vae.settings import compile_decoder, hold_channels_last
from lightx2v.vae.wan import WanVAE, image_condition, load_vae
from tests.models import tiny_encoders as tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[1, 2])
def model(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    return tiny.tiny_vae(num_res_blocks=request.param)


@pytest.fixture(scope="module", params=["original", "diffusers"])
def vae(request: pytest.FixtureRequest, model: AutoencoderKLWan, tmp_path_factory: pytest.TempPathFactory) -> WanVAE:
    return load_vae(tiny.write_vae(model, tmp_path_factory.mktemp("vae"), request.param), device=CPU)


def random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def statistics(model: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
    return mean, std


@torch.no_grad()
def test_encodes_as_diffusers(vae: WanVAE, model: AutoencoderKLWan) -> None:
    clip = random(2, 3, 5, 16, 24)
    mean, std = statistics(model)
    latents = vae.encode(clip)
    assert latents.shape == (2, 16, 2, 2, 3)
    expected = (model.encode(clip).latent_dist.mode() - mean) * (1 / std)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decodes_as_diffusers(vae: WanVAE, model: AutoencoderKLWan) -> None:
    latents = random(1, 16, 2, 2, 3)
    mean, std = statistics(model)
    clip = vae.decode(latents)
    assert clip.shape == (1, 3, 5, 16, 24) and clip.abs().max() <= 1
    torch.testing.assert_close(clip, model.decode(latents / (1 / std) + mean).sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 9])
def test_image_condition_is_that_of_diffusers(vae: WanVAE, model: AutoencoderKLWan, frames: int) -> None:
    image = random(3, 16, 24)
    pipeline = WanImageToVideoPipeline(None, None, model, None)
    _, expected = pipeline.prepare_latents(
        image[None], 1, height=16, width=24, num_frames=frames, dtype=torch.float32, device=CPU
    )
    condition = image_condition(vae, image, frames)
    torch.testing.assert_close(condition, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 12, 16), (1, 3, 5, 16, 12)])
def test_sizes_that_do_not_divide_are_refused(vae: WanVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="do not divide into latents"):
        vae.encode(random(*shape))


def test_names_are_those_that_diffusers_converts() -> None:
    """diffusers' own conversion knows Wan's depth of two residual blocks only."""
    state = tiny.vae_original(tiny.tiny_vae(2))
    theirs = convert_wan_vae_to_diffusers({name: name for name in state})
    assert {rename(name, layer_names(4, 2)): name for name in state} == theirs


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_names_go_both_ways(depth: int) -> None:
    layers = layer_names(4, depth)
    assert len(set(layers.values())) == len(layers)
    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=4, num_res_blocks=depth)
    state = tiny.vae_original(model)
    assert {rename(name, layers) for name in state} == model.state_dict().keys()


def test_what_is_wrong_with_a_file_is_told(model: AutoencoderKLWan, tmp_path: Path) -> None:
    path = tiny.write_vae(model, tmp_path, "original")
    state = tiny.vae_original(model)
    for name in ("conv2.weight", "decoder.head.0.gamma", "encoder.middle.1.to_qkv.bias"):
        torch.save({k: v for k, v in state.items() if k != name}, path)
        with pytest.raises(CheckpointError, match="missing"):
            load_vae(path, device=CPU)
    torch.save({**state, "decoder.extra.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"decoder\.extra\.weight"):
        load_vae(path, device=CPU)
    torch.save(tiny.t5_original(tiny.tiny_t5()), path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_vae(path, device=CPU)


def test_the_architecture_is_read_from_the_shapes() -> None:
    with torch.device("meta"):
        wan, other = AutoencoderKLWan(), AutoencoderKLWan(base_dim=8, num_res_blocks=3, dim_mult=[1, 2, 2, 3])
    for model in (wan, other):
        shapes = {name: tuple(tensor.shape) for name, tensor in tiny.vae_original(model).items()}
        config = config_from_shapes(shapes, "file")
        assert config.pop("decoder_base_dim") == config["base_dim"]
        assert config == {key: model.config[key] for key in config}


@torch.no_grad()
def test_channels_last_changes_the_layout_alone(vae: WanVAE) -> None:
    latents = random(1, 16, 3, 2, 3)
    quick = replace(vae, module=copy.deepcopy(vae.module))
    hold_channels_last(quick.module)
    convolutions = [layer for layer in quick.module.modules() if isinstance(layer, torch.nn.Conv3d)]
    assert convolutions and all(
        layer.weight.is_contiguous(memory_format=torch.channels_last_3d) for layer in convolutions
    )
    torch.testing.assert_close(quick.decode(latents), vae.decode(latents), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_compiled_decoder_compiles_few_forms_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = load_vae(tiny.write_vae(tiny.tiny_vae(num_res_blocks=1), tmp_path, "original"), device=CPU)
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(inputs)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count, fullgraph=True))
    torch._dynamo.reset()  # compilations of other modules count as well
    quick = replace(vae, module=copy.deepcopy(vae.module))
    compile_decoder(quick.module)
    for seed in range(2):
        latents = torch.randn(1, 16, 6, 2, 3, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(quick.decode(latents), vae.decode(latents), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 3  # the first step of a clip, the second, all others


@torch.no_grad()
def test_bfloat16_is_near(model: AutoencoderKLWan, tmp_path: Path) -> None:
    path = tiny.write_vae(model, tmp_path, "original")
    latents = random(1, 16, 3, 4, 4)
    exact, rounded = (
        load_vae(path, device=CPU, dtype=dtype).decode(latents) for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert psnr(exact, rounded) > 40


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of pixels in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / (one - other).square().mean()))
