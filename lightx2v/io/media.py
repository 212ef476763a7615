"""Results and pictures: written by the ending of the path, whole or not at all, with the run's metadata inside."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, ImageSequence, PngImagePlugin

from lightx2v.errors import MediaError, suggestion
from lightx2v.io import video
from lightx2v.io.files import whole_file
from lightx2v.io.sheet import contact_sheet

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".mp4", ".gif", ".webp", ".png")
_ALLOWED = ", ".join(ENDINGS) + ", or a folder for frames as PNG (the path ends in /)"
_WEBP_QUALITY = 95
_COMMENT = "Comment"  # the PNG keyword for remarks


def check_result_path(path: str) -> None:
    """Raise MediaError when `write_result` could not write to `path`; nothing is created."""
    try:
        _check(path)
    except (OSError, ValueError) as error:
        raise MediaError(path, f"is not a usable path: {error}") from error


def write_result(frames: Tensor | NDArray[np.uint8], path: str, fps: int, metadata: Mapping[str, str]) -> Path:
    """Write uint8 frames [T, H, W, 3] and return the path.

    `.mp4` (H.264; an odd height or width is padded by repeating the last row or column), `.gif`, `.webp` (animated,
    quality 95), `.png` (the frame when T is 1, else a contact sheet), or a folder of 00000.png, 00001.png, ...
    `metadata` goes into the file as one JSON object: mp4 comment tag, gif comment, EXIF description, PNG text chunk.
    Raises MediaError for a path or frames that do not fit and ResourceError when the disk is full.
    """
    check_result_path(path)
    pixels = _pixels(frames, path)
    if fps < 1:
        raise MediaError(path, f"cannot play at {fps} frames per second", allowed="1 or more")
    folder = _is_folder(path)
    target = Path(path).resolve() if folder else Path(path)
    comment = json.dumps(dict(metadata))  # ASCII, which every one of these formats can carry
    with whole_file(target, folder=folder, error=MediaError) as temporary:
        if folder:
            for index, frame in enumerate(pixels):
                _write_png(frame, temporary / f"{index:05d}.png", comment)
        elif target.suffix.lower() == ".mp4":
            video.write_mp4(pixels, temporary, fps, comment)
        elif target.suffix.lower() == ".png":
            _write_png(pixels[0] if len(pixels) == 1 else contact_sheet(pixels), temporary, comment)
        else:
            _write_animation(pixels, temporary, target.suffix.lower(), fps, comment)
    return target


def read_video(path: str | Path) -> NDArray[np.uint8]:
    """The frames of what `write_result` wrote, uint8 [T, H, W, 3]; a PNG is one frame. Raises MediaError."""
    path = Path(path)
    try:
        if path.is_dir():
            return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in sorted(path.glob("*.png"))])
        if path.suffix.lower() == ".mp4":
            return video.read_mp4(path)
        with Image.open(path) as image:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    except Exception as error:  # what a damaged file makes the decoders raise cannot be listed
        raise _unreadable(path, error) from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `write_result` put into a file or folder; empty for other files. Raises MediaError."""
    path = Path(path)
    try:
        text = _read_comment(path)
    except Exception as error:  # as in read_video
        raise _unreadable(path, error) from error
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_image(path: str | Path) -> Image.Image:
    """A picture as RGB, turned as its EXIF orientation says; transparency is laid on white. Raises MediaError."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                # Pillow clips 16-bit gray to 255 instead of scaling it.
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            if upright.has_transparency_data:
                rgba = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return upright.convert("RGB")
    except Exception as error:  # as in read_video
        raise _unreadable(Path(path), error) from error


def _is_folder(path: str) -> bool:
    return path.endswith(("/", os.sep))


def _check(path: str) -> None:
    if "\0" in path:
        raise ValueError("it has a null character")
    target = Path(path)
    ending = target.suffix.lower()
    if _is_folder(path):
        if target.exists() and not target.is_dir():
            raise MediaError(path, "is a file, not a folder")
        if target.is_dir() and not all(re.fullmatch(r"\d{5}\.png", entry.name) for entry in target.iterdir()):
            raise MediaError(
                path, "holds other files, and a folder of frames is replaced as a whole", do="name a new folder"
            )
    elif target.is_dir():
        raise MediaError(path, "is a folder", do="for a folder of frames, end the path in /")
    elif ending not in ENDINGS:
        hint = suggestion(ending, ENDINGS)
        raise MediaError(path, f"has the unknown ending '{target.suffix}'{hint}", allowed=_ALLOWED)
    elif ending == ".mp4" and not video.has_encoder():
        raise MediaError(path, "the installed PyAV cannot encode H.264", do="pip install --force-reinstall av")
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise MediaError(path, f"cannot be made: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise MediaError(path, f"cannot be made: {existing} is not writable")


def _pixels(frames: Tensor | NDArray[np.uint8], path: str) -> NDArray[np.uint8]:
    pixels = frames if isinstance(frames, np.ndarray) else frames.detach().cpu().numpy()
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise MediaError(path, f"cannot hold {pixels.dtype} {list(pixels.shape)}", allowed="uint8 [T, H, W, 3]")
    return pixels


def _write_png(frame: NDArray[np.uint8], path: Path, comment: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text(_COMMENT, comment)
    Image.fromarray(frame).save(path, format="PNG", pnginfo=info)


def _write_animation(frames: NDArray[np.uint8], path: Path, ending: str, fps: int, comment: str) -> None:
    # GIF counts in hundredths of a second: rounding the times, not the durations, keeps the length right.
    unit = 10 if ending == ".gif" else 1
    times = [round(index * 1000 / fps / unit) * unit for index in range(len(frames) + 1)]
    durations = [end - start for start, end in pairwise(times)]
    images = [Image.fromarray(frame) for frame in frames]
    if ending == ".gif":
        images[0].save(
            path, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, comment=comment.encode()
        )
        return
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = comment
    images[0].save(
        path,
        "WEBP",
        save_all=True,
        append_images=images[1:],
        duration=durations,
        loop=0,
        quality=_WEBP_QUALITY,
        exif=exif,
    )


def _read_comment(path: Path) -> str:
    if path.is_dir():
        path = min(path.glob("*.png"))
    if path.suffix.lower() == ".mp4":
        return video.read_comment(path)
    with Image.open(path) as image:
        described = image.getexif().get(ExifTags.Base.ImageDescription, "")
        text = image.info.get(_COMMENT) or image.info.get("comment") or described
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def _unreadable(path: Path, error: Exception) -> MediaError:
    if isinstance(error, FileNotFoundError):
        return MediaError(str(path), "no such file")
    return MediaError(str(path), f"cannot be read as a picture or video: {error}")
