from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.vae.kl import PREFIX, ImageVAE, load_vae
from lightx2v.vae.kl_keymap import config_from_shapes, layer_names
from tests.models import tiny_flux_parts as tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[1, 2])
def model(request: pytest.FixtureRequest) -> AutoencoderKL:
    return tiny.tiny_vae(depth=request.param)


@pytest.fixture(scope="module", params=["original", "diffusers"])
def vae(request: pytest.FixtureRequest, model: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> ImageVAE:
    return load_vae(tiny.write_vae(model, tmp_path_factory.mktemp("vae"), request.param), device=CPU)


def random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_encodes_as_diffusers(vae: ImageVAE, model: AutoencoderKL) -> None:
    images = random(2, 3, 1, 16, 24)
    latents = vae.encode(images)
    expected = (model.encode(images[:, :, 0]).latent_dist.mode() - 0.1159) * 0.3611
    assert latents.shape == (2, 16, 1, 2, 3) and (vae.z_dim, vae.strides) == (16, (1, 8, 8))
    torch.testing.assert_close(latents[:, :, 0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decodes_as_diffusers(vae: ImageVAE, model: AutoencoderKL) -> None:
    latents = random(1, 16, 1, 2, 3)
    images = vae.decode(latents)
    assert images.shape == (1, 3, 1, 16, 24) and images.abs().max() <= 1
    expected = model.decode(latents[:, :, 0] / 0.3611 + 0.1159).sample.clamp(-1, 1)
    torch.testing.assert_close(images[:, :, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 2, 16, 16), (1, 3, 1, 12, 16), (1, 3, 1, 16, 12)])
def test_sizes_that_do_not_divide_are_refused(vae: ImageVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="do not divide into latents"):
        vae.encode(random(*shape))


def test_names_are_those_that_diffusers_converts(model: AutoencoderKL) -> None:
    state = tiny.vae_original(model)
    theirs = convert_ldm_vae_checkpoint({name: torch.zeros(1) for name in state}, model.config)
    layers = layer_names(4, model.config.layers_per_block)
    ours = {f"{layers[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in state}
    assert ours == set(theirs) == set(model.state_dict())
    assert len(set(layers.values())) == len(layers)


def test_the_architecture_is_read_from_the_shapes(model: AutoencoderKL) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny.vae_original(model).items()}
    config = config_from_shapes(shapes, "file")
    assert {name: model.config[name] for name in config} == config


def test_a_file_with_several_models(model: AutoencoderKL, tmp_path: Path) -> None:
    path = tiny.write_vae(model, tmp_path, "original")
    plain = load_vae(path, device=CPU)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in load_file(path).items()}
    save_file({**tensors, "model.diffusion_model.img_in.weight": torch.zeros(2)}, path)
    latents = random(1, 16, 1, 2, 2)
    assert torch.equal(load_vae(path, device=CPU).decode(latents), plain.decode(latents))


def test_what_is_wrong_with_a_file_is_told(model: AutoencoderKL, tmp_path: Path) -> None:
    path = tiny.write_vae(model, tmp_path, "original")
    state = tiny.vae_original(model)
    for name in ("decoder.conv_in.weight", "decoder.norm_out.bias", "encoder.mid.attn_1.q.bias"):
        save_file({k: v for k, v in state.items() if k != name}, path)
        with pytest.raises(CheckpointError, match="missing"):
            load_vae(path, device=CPU)
    save_file({**state, "decoder.extra.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"decoder\.extra\.weight"):
        load_vae(path, device=CPU)
    save_file({"some.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_vae(path, device=CPU)
    folder = tiny.write_vae(model, tmp_path, "diffusers")
    config = (folder / "config.json").read_text().replace("AutoencoderKL", "AutoencoderTiny")
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="AutoencoderTiny"):
        load_vae(folder, device=CPU)
