"""H.264 in mp4, through PyAV."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from loguru import logger
from numpy.typing import NDArray

_BT709 = 1  # code point of ITU-T H.273, the same for primaries, transfer and matrix
_LIMITED_RANGE = 1  # FFmpeg's AVCOL_RANGE_MPEG
_CRF = "17"  # no loss that an eye sees


def has_encoder() -> bool:
    """Whether the installed PyAV can encode H.264: its own wheels can, some rebuilt packages cannot."""
    return "libx264" in av.codecs_available


def write_mp4(frames: NDArray[np.uint8], path: Path, fps: int, comment: str) -> None:
    """Encode uint8 [T, H, W, 3] as yuv420p, index first, with `comment` as the comment tag.

    The format halves the colors' resolution and needs even sizes: the last row or column is repeated where one is odd.
    """
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        logger.info(
            f"{path.name}: {width}x{height} is padded to {frames.shape[2]}x{frames.shape[1]}, H.264 needs even sizes"
        )
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=fps, options={"crf": _CRF})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        codec = stream.codec_context
        codec.color_primaries = codec.color_trc = codec.colorspace = _BT709
        codec.color_range = _LIMITED_RANGE
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            planes = picture.reformat(
                format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE, interpolation="AREA"
            )
            container.mux(stream.encode(planes))
        container.mux(stream.encode())


def read_mp4(path: Path) -> NDArray[np.uint8]:
    """All frames of the first video stream, uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_comment(path: Path) -> str:
    """The comment tag, or an empty string."""
    with av.open(str(path)) as container:
        return container.metadata.get("comment", "")
