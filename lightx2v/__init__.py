"""A config-driven inference engine for video and image generation with diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightx2v.pipeline import LightX2VPipeline

__version__ = "0.1.0"
__all__ = ["LightX2VPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """`LightX2VPipeline` on first use, so that importing the package does not import torch."""
    if name == "LightX2VPipeline":
        from lightx2v.pipeline import LightX2VPipeline

        return LightX2VPipeline
    raise AttributeError(f"module 'lightx2v' has no attribute '{name}'")
