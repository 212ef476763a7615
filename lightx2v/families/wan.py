"""Wan2.1: a UMT5 text encoder, a CLIP image encoder for image-to-video, and Wan's VAE."""

from __future__ import annotations

from typing import Any

from loguru import logger
from torch import Tensor

from lightx2v.encoders import clip_vision, umt5
from lightx2v.errors import ConfigError
from lightx2v.families.base import Part, PartSource, Session
from lightx2v.families.decoders import decode, vae_parts
from lightx2v.families.pictures import fitted
from lightx2v.io.media import read_image
from lightx2v.models.base import Branch, Conditions
from lightx2v.models.wan.spec import WAN as SPEC
from lightx2v.request import Request
from lightx2v.vae.wan import image_condition, load_vae

CLIP_TOKENS = 257
"""Tokens of the image encoder: 16 x 16 patches and one for the whole."""


def _load_t5(source: PartSource) -> Any:
    return umt5.load_text_encoder(
        source.path,
        source.files.require("tokenizer"),
        device=source.device,
        dtype=source.dtype,
        quant_plans=source.quant_plans,
    )


def _load_clip(source: PartSource) -> Any:
    return clip_vision.load_clip(
        source.path,
        source.files.image_processor,
        device=source.device,
        dtype=source.dtype,
        quant_plans=source.quant_plans,
        num_heads=source.files.clip_num_heads,
    )


class Wan:
    """Text-to-video and image-to-video."""

    parts = (
        Part(
            "t5",
            "text_encoder",
            "text_encoder",
            _load_t5,
            umt5.linear_shapes,
            config="t5",
            converted=("{kind}/models_t5_umt5-xxl-enc-{kind}.pth", "models_t5_umt5-xxl-enc-{kind}.pth"),
            model_type="wan_t5",
        ),
        Part(
            "clip",
            "image_encoder",
            "image_encoder",
            _load_clip,
            clip_vision.linear_shapes,
            config="clip",
            converted=(
                "{kind}/clip-{kind}.pth",
                "models_clip_open-clip-xlm-roberta-large-vit-huge-14-{kind}.pth",
            ),
            model_type="wan_clip",
            needed=lambda config: config.task == "i2v",
        ),
        *vae_parts(SPEC, load_vae, lambda config: config.task == "i2v"),
    )

    def check(self, request: Request) -> None:
        if request.task == "i2v" and not request.image_path:
            raise ConfigError(
                "image_path", "is missing: image-to-video starts from a picture", do="give --image_path FILE"
            )
        if request.task == "t2v" and request.image_path:
            logger.warning("image_path is ignored by task t2v")

    def kept(self, arch: Any, request: Request) -> int:
        """Keys and values of the text and image tokens, in every block."""
        tokens = arch.text_len + (CLIP_TOKENS if request.task == "i2v" else 0)
        return int(arch.num_layers * tokens * arch.dim * 2)

    def more_tokens(self, files: Any, request: Request) -> int:
        """Text and image are in sequences of their own."""
        return 0

    def encode(self, session: Session, request: Request) -> dict[Branch, Conditions]:
        image = latent = None
        if request.task == "i2v":
            image, latent = self._encode_image(session, request)
        prompts: dict[Branch, str] = {"cond": request.prompt}
        if request.cfg:
            prompts["uncond"] = request.negative_prompt
        with session.use("t5") as encoder, session.timer.stage("encode text"):
            return {
                branch: Conditions(text=encoder.encode([prompt], session.text_len)[0], image=image, latent=latent)
                for branch, prompt in prompts.items()
            }

    def _encode_image(self, session: Session, request: Request) -> tuple[Tensor, Tensor]:
        assert request.image_path is not None
        picture = read_image(request.image_path)
        with session.use("clip") as encoder, session.timer.stage("encode image (CLIP)"):
            tokens: Tensor = encoder.encode([picture])
        tensor = fitted(picture, request.height, request.width).to(session.device)
        with session.use("vae") as vae, session.timer.stage("encode image (VAE)"):
            return tokens, image_condition(vae, tensor, request.frames)

    def image_latents(self, session: Session, request: Request) -> Tensor | None:
        return None

    def decode(self, session: Session, latents: Tensor) -> Tensor:
        return decode(session, latents)


WAN = Wan()
