"""Tiny decoders: from the latents of a full autoencoder to pixels, in a fraction of its time and memory.

For video the decoder of TAEHV (github.com/madebyollin/taehv: taew2_1, and LightX2V's lighttaew2_1), for images that of
diffusers' AutoencoderTiny (taef1). Shapes: t latent frames of h x w become T frames of H x W.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, AutoencoderTiny
from torch import Tensor, nn

from lightx2v.errors import CheckpointError
from lightx2v.io.weights import Checkpoint, stream_into

_BLOCKS = 3
"""Memory blocks of a level."""
_GROWS = (7, 13, 19)
"""Where in a TAEHV decoder the layers are that multiply frames: one for each level, and its last convolution after it.
The numbers are those of the files."""


class SoftClamp(nn.Module):
    """Keeps latents within -3 and 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """A residual block that sees, beside each frame, the one before it; before the first is nothing (zeros)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * channels, channels), nn.ReLU(), _conv(channels, channels), nn.ReLU(), _conv(channels, channels)
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """`x` [t, C, h, w], `before` [1, C, h, w] the frame that preceded it."""
        past = torch.cat([before, x[:-1]])
        return torch.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class Grow(nn.Module):
    """`stride` frames out of every one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = self.conv(x)
        return grown.reshape(-1, self.channels, *x.shape[2:])


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class VideoDecoder(nn.Module):
    """TAEHV's decoder: three levels of memory blocks, each twice the size of the one before."""

    def __init__(self, channels: int, widths: tuple[int, ...], grows: tuple[int, ...]) -> None:
        """`channels` of the latents, `widths` of the levels and of what follows them, `grows`: frames out of one."""
        super().__init__()
        self.channels, self.stride = channels, (prod(grows), 8, 8)
        layers: list[nn.Module] = [SoftClamp(), _conv(channels, widths[0]), nn.ReLU()]
        for width, following, grow in zip(widths, widths[1:], grows, strict=False):
            layers += [MemoryBlock(width) for _ in range(_BLOCKS)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, grow), _conv(width, following, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3))

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [t, z, h, w] to frames [T, 3, H, W] in [-1, 1], one latent frame after the other."""
        last: dict[int, Tensor] = {}
        frames = []
        for x in latents.split(1):
            for index, layer in enumerate(self.decoder):
                if isinstance(layer, MemoryBlock):
                    seen, x = x, layer(x, last.get(index, torch.zeros_like(x[:1])))
                    last[index] = seen[-1:]
                else:
                    x = layer(x)
            frames.append(x.clamp(0, 1) * 2 - 1)
        # The first latent frame stands for one frame only: the last of those that it gives.
        return torch.cat(frames)[self.stride[0] - 1 :]


class ImageDecoder(nn.Module):
    """The decoder of diffusers' AutoencoderTiny; every frame is an image of its own."""

    def __init__(self, tiny: AutoencoderTiny) -> None:
        super().__init__()
        config = tiny.config
        scale = config.upsampling_scaling_factor ** (len(config.num_decoder_blocks) - 1)
        self.channels, self.stride = config.latent_channels, (1, scale, scale)
        self.decoder = tiny.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [t, z, h, w] to frames [t, 3, H, W], about -1 to 1."""
        frames: Tensor = self.decoder(latents)
        return frames


@dataclass(frozen=True, eq=False)
class TinyDecoder:
    """Latents to pixels, as the `decode` of the autoencoder in whose place it stands."""

    module: VideoDecoder | ImageDecoder
    mean: Tensor
    """[z or 1, 1, 1] float32, added to the normalized latents after `std` has multiplied them."""
    std: Tensor
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalized latents [B, z, t, h, w] to [B, 3, T, H, W] float32 in [-1, 1]."""
        clips = latents.to(self.device, torch.float32).transpose(1, 2) * self.std + self.mean
        decoded = torch.stack([self.module(clip) for clip in clips.to(self.dtype)])
        return decoded.transpose(1, 2).float().clamp(-1, 1)


def load_tiny_decoder(
    path: Path,
    *,
    channels: int,
    stride: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    scaled: bool | None = None,
) -> TinyDecoder:
    """Read a TAEHV file, or the folder of a diffusers AutoencoderTiny, for latents of `channels` and `stride`.

    `stride` is that of the autoencoder: frames, rows and columns of pixels for a latent. `scaled`: whether a TAEHV file
    expects latents as Wan's VAE has them before it normalizes them (LightX2V's `need_scaled`); None: so if the file's
    name begins with lighttae, as in LightX2V's own. Raises CheckpointError for a file that is missing, damaged, no tiny
    decoder, or for other latents.
    """
    checkpoint, where = Checkpoint.open(path), str(path)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    mean, std = torch.zeros(1, 1, 1, device=device), torch.ones(1, 1, 1, device=device)
    module: VideoDecoder | ImageDecoder
    if any(name.startswith("decoder.layers.") for name in shapes):
        config = _diffusers_config(path)
        with torch.device("meta"):
            module = ImageDecoder(AutoencoderTiny.from_config(config))
        mean, std = mean + config.get("shift_factor", 0.0), std / config.get("scaling_factor", 1.0)
    else:
        with torch.device("meta"):
            module = _video_decoder(shapes, where)
        if path.name.startswith("lighttae") if scaled is None else scaled:
            mean, std = _wan_statistics(device)
    if (module.channels, module.stride) != (channels, stride):
        raise CheckpointError(
            where,
            f"decodes latents of {module.channels} channels and stride {module.stride}",
            allowed=f"{channels} channels, stride {stride}",
            do="give the tiny decoder of this model's autoencoder",
        )
    names = [name for name in shapes if name.startswith("decoder.")]
    stream_into(module, checkpoint.stream(names), device=device, dtype_of=lambda name: dtype, where=where)
    return TinyDecoder(module.eval(), mean, std, device, dtype)


def _video_decoder(shapes: Mapping[str, tuple[int, ...]], where: str) -> VideoDecoder:
    """The decoder that has tensors of these shapes."""
    convolutions = ["decoder.1.weight", *(f"decoder.{grow + 1}.weight" for grow in _GROWS)]
    multipliers = [f"decoder.{grow}.conv.weight" for grow in _GROWS]
    for name in (*convolutions, *multipliers):
        if name not in shapes:
            raise CheckpointError(
                where,
                f"tensor '{name}' is missing",
                do="give taew2_1, lighttaew2_1, or an AutoencoderTiny of diffusers",
            )
    widths = tuple(shapes[name][0] for name in convolutions)
    grows = tuple(shapes[name][0] // shapes[name][1] for name in multipliers)
    return VideoDecoder(shapes[convolutions[0]][1], widths, grows)


def _wan_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of Wan's latents, [16, 1, 1]: the defaults of diffusers' autoencoder."""
    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    mean, std = (
        torch.tensor(defaults[name].default, device=device).view(-1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    return mean, std


def _diffusers_config(path: Path) -> dict[str, float]:
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            str(folder), "has no config.json beside the weights", do="give the folder as diffusers has it"
        )
    return dict(AutoencoderTiny.load_config(str(folder), local_files_only=True))
