"""Tiny decoders against plain arithmetic in float64 and against diffusers, LightVAE's shapes, and tiling's loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLWan, AutoencoderTiny
from torch import Tensor

import lightx2v
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.eval.metrics import psnr
from lightx2v.io.weights import write_safetensors
from lightx2v.vae.keymap import config_from_shapes
from lightx2v.vae.tae import TinyDecoder, load_tiny_decoder
from lightx2v.vae.tiling import enable_tiling
from lightx2v.vae.wan import load_vae
from tests.models import tiny_encoders as tiny

CPU = torch.device("cpu")
WAN = (4, 8, 8)
State = dict[str, Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def taehv_state(widths: tuple[int, ...], channels: int = 16, grows: tuple[int, ...] = (1, 2, 2)) -> State:
    """Random tensors under the names of taew2_1.pth, with some of its encoder."""
    shapes: dict[str, tuple[int, ...]] = {
        "decoder.1.weight": (widths[0], channels, 3, 3),
        "decoder.1.bias": (widths[0],),
    }
    for level, grow in enumerate(grows):
        width, first = widths[level], 3 + 6 * level
        for block in range(first, first + 3):
            for layer, inputs in ((0, 2 * width), (2, width), (4, width)):
                shapes[f"decoder.{block}.conv.{layer}.weight"] = (width, inputs, 3, 3)
                shapes[f"decoder.{block}.conv.{layer}.bias"] = (width,)
        shapes[f"decoder.{first + 4}.conv.weight"] = (width * grow, width, 1, 1)
        shapes[f"decoder.{first + 5}.weight"] = (widths[level + 1], width, 3, 3)
    shapes |= {"decoder.22.weight": (3, widths[-1], 3, 3), "decoder.22.bias": (3,), "encoder.0.weight": (64, 3, 3, 3)}
    state = {
        name: random(*shape, seed=seed) * (0.1 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    state["decoder.22.bias"] += 0.5  # the middle of what is not clamped
    return state


def taehv_decode(state: State, latents: Tensor) -> Tensor:
    """[t, z, h, w] to [T, 3, H, W] in [0, 1]: float64, all frames at once."""
    weights = {name: tensor.double() for name, tensor in state.items()}

    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding="same")

    x = conv(torch.tanh(latents.double() / 3) * 3, "decoder.1").clamp(min=0)
    for first in (3, 9, 15):
        for block in range(first, first + 3):
            past = torch.cat([torch.zeros_like(x[:1]), x])[: len(x)]
            y = conv(torch.cat([x, past], 1), f"decoder.{block}.conv.0").clamp(min=0)
            y = conv(y, f"decoder.{block}.conv.2").clamp(min=0)
            x = (conv(y, f"decoder.{block}.conv.4") + x).clamp(min=0)
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        grown, channels = conv(x, f"decoder.{first + 4}.conv"), x.shape[1]
        x = torch.stack(grown.split(channels, dim=1), dim=1).flatten(0, 1)
        x = conv(x, f"decoder.{first + 5}")
    return conv(x.clamp(min=0), "decoder.22").clamp(0, 1)[3:]


def written(state: State, path: Path) -> Path:
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        write_safetensors(path, state, {})
    return path


def load(path: Path, channels: int = 16, stride: tuple[int, int, int] = WAN, scaled: bool | None = None) -> TinyDecoder:
    return load_tiny_decoder(path, channels=channels, stride=stride, device=CPU, scaled=scaled)


@pytest.mark.parametrize("name", ["taew2_1.pth", "taew2_1.safetensors"])
@pytest.mark.parametrize("frames", [1, 3])
def test_decodes_as_its_definition(tmp_path: Path, name: str, frames: int) -> None:
    state = taehv_state((12, 10, 8, 6))
    decoder, latents = load(written(state, tmp_path / name)), random(2, 16, frames, 4, 6)
    clip = decoder.decode(latents)
    assert clip.shape == (2, 3, 4 * frames - 3, 32, 48) and clip.dtype == torch.float32
    expected = torch.stack([taehv_decode(state, one.transpose(0, 1)).transpose(0, 1) for one in latents]) * 2 - 1
    assert ((expected.abs() < 1).double().mean() > 0.8) and expected.std() > 0.1, "a blank clip says nothing"
    assert (clip - expected).abs().max() < 1e-5


def test_lighttae_wants_latents_that_are_not_normalized(tmp_path: Path) -> None:
    state, latents = taehv_state((12, 10, 8, 6)), random(1, 16, 2, 4, 4)
    statistics = AutoencoderKLWan(base_dim=4).config
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (statistics.latents_mean, statistics.latents_std))
    raw = (latents[0] * std + mean).transpose(0, 1)
    light, plain = (written(state, tmp_path / f"{name}.pth") for name in ("lighttaew2_1", "taew2_1"))
    by_name = load(light).decode(latents)
    assert (by_name[0].transpose(0, 1) - (taehv_decode(state, raw) * 2 - 1)).abs().max() < 1e-5
    assert torch.equal(load(plain, scaled=True).decode(latents), by_name)
    assert torch.equal(load(light, scaled=False).decode(latents), load(plain).decode(latents))
    assert not torch.equal(load(plain).decode(latents), by_name)


def test_the_published_shape_is_read(tmp_path: Path) -> None:
    decoder = load(written(taehv_state((256, 128, 64, 64)), tmp_path / "taew2_1.pth"))
    assert decoder.decode(random(1, 16, 2, 2, 2)).shape == (1, 3, 5, 16, 16)


def test_autoencoder_tiny_is_that_of_diffusers(tmp_path: Path) -> None:
    tiny_model = AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    tiny_model.save_pretrained(tmp_path)
    decoder, latents = load(tmp_path, stride=(1, 8, 8)), random(2, 16, 1, 4, 6)
    expected = tiny_model.decode(latents[:, :, 0] / 0.5 + 0.25).sample.clamp(-1, 1)
    assert torch.allclose(decoder.decode(latents)[:, :, 0], expected, atol=1e-6)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path, stride=(1, 8, 8))


def test_decoders_of_other_latents_are_refused(tmp_path: Path) -> None:
    path = written(taehv_state((12, 10, 8, 6)), tmp_path / "taew2_1.pth")
    with pytest.raises(CheckpointError, match="16 channels"):
        load(path, channels=48)
    with pytest.raises(CheckpointError, match=r"stride \(4, 8, 8\)"):
        load(path, stride=(1, 8, 8))
    full = written({"decoder.conv1.weight": random(4, 16, 3, 3, 3)}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.1\.weight"):
        load(full)
    state = taehv_state((12, 10, 8, 6))
    del state["decoder.9.conv.2.bias"]
    with pytest.raises(CheckpointError, match=r"decoder\.9\.conv\.2\.bias"):
        load(written(state, tmp_path / "damaged.pth"))


def test_lightvae_is_a_narrower_wan_vae(tmp_path: Path) -> None:
    """lightvaew2_1 keeps a quarter of the channels, under the names of Wan2.1_VAE.pth."""
    model = tiny.tiny_vae(base_dim=24)
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny.vae_original(model).items()}
    config = config_from_shapes(shapes, "here")
    assert (config["base_dim"], config["decoder_base_dim"], config["dim_mult"]) == (24, 24, [1, 2, 4, 4])
    assert shapes["decoder.conv1.weight"] == (96, 16, 3, 3, 3)
    vae, latents = load_vae(tiny.write_vae(model, tmp_path, "original"), device=CPU), random(1, 16, 1, 2, 2)
    raw = latents * vae.std + vae.mean
    assert torch.allclose(vae.decode(latents), model.decode(raw, return_dict=False)[0], atol=1e-5)


def pixels(clip: Tensor) -> np.ndarray:
    frames: np.ndarray = ((clip[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    return frames


def test_tiles_leave_no_seams() -> None:
    vae = load_vae(Path(lightx2v.__file__).parent / "assets" / "tiny-wan" / "Wan2.1_VAE.pth", device=CPU)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 160), indexing="ij")
    disc = [((x - 0.1 * t) ** 2 + y**2 < 0.2).float() for t in range(5)]
    clip = torch.stack([torch.stack([d, -d, d * 0.5]) for d in disc], dim=1)[None]
    latents = vae.encode(clip)
    corner = latents[..., :8, :8]
    whole, whole_corner = vae.decode(latents), vae.decode(corner)
    enable_tiling(vae.module, 64)
    tiled = vae.decode(latents)
    assert not torch.equal(whole, tiled), "nothing was tiled"
    assert psnr(pixels(tiled), pixels(whole)) > 35
    assert torch.equal(vae.decode(corner), whole_corner), "one tile is whole"


@torch.no_grad()
def test_image_autoencoders_are_tiled_by_the_same_call() -> None:
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=512,
    ).eval()
    latents = random(1, 4, 24, 40) * 0.1
    whole = model.decode(latents).sample
    enable_tiling(model)
    assert torch.equal(model.decode(latents).sample, whole), "smaller than diffusers' own tiles"
    enable_tiling(model, 32)
    tiled = model.decode(latents).sample
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)


def test_tiles_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="multiples of 32"):
        enable_tiling(tiny.tiny_vae(), 40)
    with pytest.raises(ConfigError, match="has no tiles"):
        enable_tiling(torch.nn.Identity())
