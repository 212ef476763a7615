"""FLUX.1: T5 and CLIP text encoders and an image autoencoder; Kontext sees the picture to edit as further tokens."""

from __future__ import annotations

from typing import Any

from loguru import logger
from PIL import Image
from torch import Tensor

from lightx2v.encoders import clip_text, t5
from lightx2v.errors import ConfigError
from lightx2v.families.base import Part, PartSource, Session
from lightx2v.families.decoders import decode, vae_parts
from lightx2v.families.pictures import fitted, pixels
from lightx2v.io.media import read_image
from lightx2v.models.base import Branch, Conditions
from lightx2v.models.flux.spec import FLUX as SPEC
from lightx2v.request import Request
from lightx2v.vae import kl

REFERENCE_SIZES = (
    *((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)),
    *((1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688)),
    (1568, 672),
)
"""Widths and heights of the pictures that Kontext was trained with (BFL's inference code)."""


PIXELS_PER_TOKEN = 16 * 16


def _load_t5(source: PartSource) -> Any:
    return t5.load_t5(
        source.path,
        source.files.require("tokenizer_2"),
        device=source.device,
        dtype=source.dtype,
        quant_plans=source.quant_plans,
    )


def _load_clip(source: PartSource) -> Any:
    return clip_text.load_clip_text(
        source.path,
        source.files.require("tokenizer"),
        device=source.device,
        dtype=source.dtype,
        quant_plans=source.quant_plans,
    )


class Flux:
    """Text-to-image, and image-to-image: by a reference in Kontext, by the strength of the noise in the others."""

    parts = (
        Part(
            "t5",
            "text_encoder",
            "text_encoder_2",
            _load_t5,
            t5.linear_shapes,
            config="t5",
            converted=("{kind}/t5xxl_{kind}.safetensors", "t5xxl_{kind}.safetensors"),
            model_type="flux_t5",
            open=t5.open_t5,
        ),
        Part(
            "clip_text",
            "text_encoder",
            "text_encoder",
            _load_clip,
            clip_text.linear_shapes,
            open=clip_text.open_clip_text,
        ),
        *vae_parts(SPEC, kl.load_vae, lambda config: config.task == "i2i", kl.open_vae),
    )

    def check(self, request: Request) -> None:
        if request.frames != 1:
            raise ConfigError("video.frames", f"{request.frames} frames of a model for images", allowed="1")
        if request.task == "i2i" and not request.image_path:
            raise ConfigError(
                "image_path", "is missing: image-to-image starts from a picture", do="give --image_path FILE"
            )
        if request.task == "t2i" and request.image_path:
            logger.warning("image_path is ignored by task t2i")

    def kept(self, arch: Any, request: Request) -> int:
        """Text passes through the blocks with the image: nothing is remembered."""
        return 0

    def more_tokens(self, files: Any, request: Request) -> int:
        """The text, and the reference picture that Kontext sees."""
        width, height = REFERENCE_SIZES[len(REFERENCE_SIZES) // 2]
        seen = files.variant == "kontext" and request.task == "i2i"
        return int(files.arch.text_len) + (width * height // PIXELS_PER_TOKEN if seen else 0)

    def encode(self, session: Session, request: Request) -> dict[Branch, Conditions]:
        prompts: dict[Branch, str] = {"cond": request.prompt}
        if request.cfg:
            prompts["uncond"] = request.negative_prompt
        latent = None
        if session.files.variant == "kontext" and request.task == "i2i":
            latent = _encode(session, reference(_picture(request)))
        with session.use("clip_text") as encoder, session.timer.stage("encode text (CLIP)"):
            pooled = {branch: encoder.encode([prompt]) for branch, prompt in prompts.items()}
        guidance = request.guidance if session.files.arch.guidance else None
        with session.use("t5") as encoder, session.timer.stage("encode text"):
            return {
                branch: Conditions(
                    text=encoder.encode([prompt], session.text_len),
                    latent=latent,
                    pooled=pooled[branch],
                    guidance=guidance,
                )
                for branch, prompt in prompts.items()
            }

    def image_latents(self, session: Session, request: Request) -> Tensor | None:
        if request.task != "i2i" or session.files.variant == "kontext":
            return None
        return _encode(session, fitted(_picture(request), request.height, request.width))

    def decode(self, session: Session, latents: Tensor) -> Tensor:
        return decode(session, latents)


def reference(picture: Image.Image) -> Tensor:
    """`picture` at the size of Kontext's training that is nearest in aspect ratio: [3, H, W] float32 in [-1, 1]."""
    ratio = picture.width / picture.height
    size = min(REFERENCE_SIZES, key=lambda size: abs(ratio - size[0] / size[1]))
    return pixels(picture.resize(size, Image.Resampling.LANCZOS))


def _picture(request: Request) -> Image.Image:
    assert request.image_path is not None
    return read_image(request.image_path)


def _encode(session: Session, image: Tensor) -> Tensor:
    """An image [3, H, W] to latents [1, C, 1, h, w]."""
    with session.use("vae") as vae, session.timer.stage("encode image (VAE)"):
        latents: Tensor = vae.encode(image[None, :, None])
    return latents


FLUX = Flux()
