"""Pictures that a request brings, as the tensors that autoencoders take."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def fitted(picture: Image.Image, height: int, width: int) -> Tensor:
    """The middle of `picture` in the aspect ratio of the result, resized: [3, height, width] float32 in [-1, 1]."""
    return pixels(ImageOps.fit(picture, (width, height), method=Image.Resampling.LANCZOS))


def pixels(picture: Image.Image) -> Tensor:
    """[3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
