"""Results on disk: pixels and metadata come back, and writing is all or nothing."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from lightx2v.errors import MediaError, ResourceError
from lightx2v.io import media
from lightx2v.io.media import check_result_path, read_image, read_metadata, read_video, write_result
from lightx2v.io.sheet import contact_sheet

METADATA = {"prompt": 'a "red" círcle ü 红色\n' + "x" * 3000, "seed": "42", "config": '{"a": {"b": 1}}'}
ENDINGS = ["out.mp4", "out.gif", "out.webp", "out.png", "out/"]


def clip(frames: int = 9, height: int = 64, width: int = 64) -> NDArray[np.uint8]:
    """A disc with a soft edge that moves right over a gradient: every frame differs."""
    y, x = np.mgrid[:height, :width]
    result = np.empty((frames, height, width, 3), dtype=np.uint8)
    for index, frame in enumerate(result):
        frame[:] = np.stack([x * 160 // width, y * 160 // height, 200 - 0 * x], axis=-1)
        inside = np.clip((12 - np.hypot(x - 16 - 3 * index, y - 24)) / 6, 0, 1)[..., None]
        frame[:] = frame * (1 - inside) + np.array([230, 40, 30]) * inside
    return result


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    error = np.square(a.astype(np.float64) - b).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("name", ENDINGS)
def test_frames_and_metadata_round_trip(tmp_path: Path, name: str) -> None:
    frames = clip()
    target = write_result(torch.from_numpy(frames), f"{tmp_path}/new/{name}", 16, METADATA)
    assert target == tmp_path / "new" / name
    assert read_metadata(target) == METADATA
    read = read_video(target)
    if name == "out.png":
        assert np.array_equal(read, contact_sheet(frames)[None])
    elif name == "out/":
        assert np.array_equal(read, frames)
    else:
        assert read.shape == frames.shape
        assert psnr(read, frames) > (20 if name == "out.gif" else 30)
    assert [path.name for path in target.parent.iterdir()] == [name.rstrip("/")]


def test_mp4_plays_everywhere(tmp_path: Path) -> None:
    path = write_result(clip(), str(tmp_path / "OUT.MP4"), 16, {})
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (16, 9)
        assert stream.codec_context.colorspace == 1  # BT.709
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_mp4_keeps_colors(tmp_path: Path) -> None:
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [128, 128, 128]], dtype=np.uint8)
    frames = np.broadcast_to(colors[:, None, None], (5, 64, 64, 3)).copy()
    read = read_video(write_result(frames, str(tmp_path / "out.mp4"), 16, {}))
    assert np.abs(read.astype(int) - frames).max() <= 4


@pytest.mark.parametrize("size", [(63, 64), (64, 63), (63, 65)])
def test_mp4_pads_odd_sizes_with_the_edge(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = clip(3, *size)
    read = read_video(write_result(frames, str(tmp_path / "out.mp4"), 16, {}))
    height, width = size
    assert read.shape[1:3] == (height + height % 2, width + width % 2)
    assert psnr(read[:, :height, :width], frames) > 30
    assert psnr(read[:, -1:, :width], frames[:, -1:]) > 25


@pytest.mark.parametrize("name", ["out.gif", "out.webp"])
@pytest.mark.parametrize("fps", [16, 24])
def test_animations_last_as_long_as_the_video(tmp_path: Path, name: str, fps: int) -> None:
    frames = clip(12)
    frames[5:8] = frames[4]  # a moment of standstill, which a format may store as one long frame
    shown = 0
    with Image.open(write_result(frames, str(tmp_path / name), fps, {})) as image:
        assert image.info["loop"] == 0
        for frame in ImageSequence.Iterator(image):
            frame.load()  # webp tells a duration only then
            shown += frame.info["duration"]
    assert abs(shown - 12 * 1000 / fps) <= 5


@pytest.mark.parametrize("name", ENDINGS)
def test_one_frame(tmp_path: Path, name: str) -> None:
    frames = clip(1, 48, 80)
    read = read_video(write_result(frames, f"{tmp_path}/{name}", 16, METADATA))
    assert read.shape == frames.shape
    assert psnr(read, frames) > (20 if name == "out.gif" else 30)
    assert read_metadata(f"{tmp_path}/{name}") == METADATA


@pytest.mark.parametrize(
    ("frames", "width", "columns", "shape"),
    [
        (17, 64, 4, (2 * 64 * 2 + 2, 4 * 128 + 3 * 2)),  # doubled
        (5, 50, 4, (2 * 64 * 3 + 2, 4 * 150 + 3 * 2)),  # the last row is not full
        (8, 200, 8, (64, 8 * 200 + 7 * 2)),
        (2, 128, 4, (64, 2 * 128 + 2)),
    ],
)
def test_contact_sheet_layout(frames: int, width: int, columns: int, shape: tuple[int, int]) -> None:
    assert contact_sheet(clip(frames, 64, width), columns).shape == (*shape, 3)


def test_contact_sheet_shows_first_and_last_and_gaps() -> None:
    frames = clip(17, 64, 64)
    sheet = contact_sheet(frames)
    assert np.array_equal(sheet[:128:2, :128:2], frames[0])
    assert np.array_equal(sheet[130::2, -128::2], frames[16])
    assert (sheet[:, 128:130] == 255).all()


# Paths


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("out.mp", r"unknown ending '.mp' - did you mean '.mp4'\?\n  allowed: .mp4, "),
        ("out", "unknown ending ''"),
        ("folder", "is a folder\n  do: for a folder of frames, end the path in /"),
        ("folder.mp4", "is a folder"),
        ("folder/", "holds other files"),
        ("file/", "is a file, not a folder"),
        ("file/out.mp4", "is not a folder"),
        ("x" * 300 + ".mp4", "not a usable path"),
        ("out\0.mp4", "not a usable path"),
    ],
)
def test_unusable_paths(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    with pytest.raises(MediaError, match=message):
        check_result_path(f"{tmp_path}/{path}")
    with pytest.raises(MediaError, match=message):
        write_result(clip(1), f"{tmp_path}/{path}", 16, {})
    assert (tmp_path / "folder" / "notes.txt").exists()


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media.os, "access", lambda path, mode: False)
    with pytest.raises(MediaError, match="is not writable"):
        check_result_path(str(tmp_path / "a" / "out.mp4"))


def test_missing_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"png"})
    with pytest.raises(MediaError, match=r"cannot encode H.264"):
        check_result_path(str(tmp_path / "out.mp4"))


@pytest.mark.parametrize("name", ENDINGS)
def test_checking_makes_nothing(tmp_path: Path, name: str) -> None:
    check_result_path(f"{tmp_path}/new/{name}")
    assert not list(tmp_path.iterdir())


def test_frames_of_an_older_run_are_replaced(tmp_path: Path) -> None:
    path = f"{tmp_path}/frames/"
    write_result(clip(9), path, 16, {})
    write_result(clip(2), path, 16, {"seed": "1"})
    assert len(read_video(path)) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["frames"]


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        torch.zeros(1, 8, 8, 3),
    ],
)
def test_frames_that_do_not_fit(tmp_path: Path, frames: Any) -> None:
    with pytest.raises(MediaError, match=r"allowed: uint8 \[T, H, W, 3\]"):
        write_result(frames, str(tmp_path / "out.mp4"), 16, {})


def test_frame_rate_that_cannot_play(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="cannot play at 0"):
        write_result(clip(1), str(tmp_path / "out.mp4"), 0, {})


# All or nothing


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError),
        (av.error.ExternalError(28, "No space left on device"), ResourceError),
        (PermissionError(errno.EACCES, "Permission denied"), MediaError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_failed_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, failure: BaseException, raised: type[BaseException],
    existing: bool,
) -> None:  # fmt: skip
    path = f"{tmp_path}/{name}"
    if existing:
        write_result(clip(1), path, 16, {"run": "old"})
    before = [path.name for path in tmp_path.rglob("*")]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", fail)
    written: list[Path] = []
    save = Image.Image.save

    def save_half(image: Image.Image, target: Path, *args: Any, **kwargs: Any) -> None:
        save(image, target, *args, **kwargs)
        written.append(target)
        if name != "out/" or len(written) == 2:
            raise failure

    monkeypatch.setattr(Image.Image, "save", save_half)
    with pytest.raises(raised):
        write_result(clip(4), path, 16, {"run": "new"})
    assert [path.name for path in tmp_path.rglob("*")] == before
    if existing:
        assert read_metadata(path) == {"run": "old"}


# Reading


def test_metadata_of_files_from_elsewhere(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "remark.gif", comment=b"made by hand")
    assert read_metadata(tmp_path / "plain.png") == read_metadata(tmp_path / "remark.gif") == {}


def test_read_image_applies_orientation(tmp_path: Path) -> None:
    picture, exif = Image.new("RGB", (4, 2), "red"), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").size == (2, 4)


def test_read_image_lays_transparency_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (2, 2), (0, 0, 0, 255)).save(tmp_path / "solid.png")
    Image.new("LA", (2, 2), (0, 51)).save(tmp_path / "gray.png")
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9])
    palette.save(tmp_path / "palette.png", transparency=0)
    pixels = {path.stem: read_image(path).getpixel((0, 0)) for path in tmp_path.iterdir()}
    assert pixels == {
        "clear": (255, 255, 255), "solid": (0, 0, 0), "gray": (204, 204, 204), "palette": (255, 255, 255)
    }  # fmt: skip


@pytest.mark.parametrize(("mode", "value", "wanted"), [("L", 77, 77), ("CMYK", (0, 0, 0, 0), 255), ("1", 1, 255)])
def test_read_image_of_other_modes(tmp_path: Path, mode: str, value: Any, wanted: int) -> None:
    Image.new(mode, (2, 2), value).save(tmp_path / "picture.tiff")
    read = read_image(tmp_path / "picture.tiff")
    assert (read.mode, read.getpixel((0, 0))) == ("RGB", (wanted,) * 3)


def test_read_image_scales_16_bit_gray(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 0x8040, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").getpixel((0, 0)) == (0x80,) * 3


@pytest.mark.parametrize("reader", [read_image, read_video, read_metadata])
def test_unreadable_files(tmp_path: Path, reader: Any) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("absent.png", "no such file"),
        ("text.png", "cannot be read"),
        ("text.mp4", "cannot be read"),
    ):
        with pytest.raises(MediaError, match=message):
            reader(tmp_path / name)
    with pytest.raises(MediaError, match="cannot be read"):
        reader(tmp_path / "empty")


def test_read_image_truncated(tmp_path: Path) -> None:
    Image.fromarray(clip(1)[0]).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-400])
    with pytest.raises(MediaError, match="cannot be read"):
        read_image(tmp_path / "cut.png")
