"""The page of an evaluation: whole, self-contained, escaped, and with every number that was found."""

from __future__ import annotations

import re
from base64 import b64decode
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from lightx2v.config.load import load_config
from lightx2v.errors import ResourceError
from lightx2v.eval.gate import Limits
from lightx2v.eval.html.markup import Markup, tag
from lightx2v.eval.html.page import page, write_page
from lightx2v.eval.html.svg import Scale, label, round_step, whole_ticks, widened
from lightx2v.eval.pictures import Album, amplification, amplified, encode
from lightx2v.eval.text import summary
from tests.unit.eval_data import STRANGE, comparison, side

VOID = {"meta", "img", "br"}
SVG = "{http://www.w3.org/2000/svg}"


class Reader(HTMLParser):
    """Collects the text, the elements and their attributes, and fails for one that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements[name] += 1
        self.attributes += [(name, key, value or "") for key, value in attributes]
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def album() -> Album:
    return Album(first=2, worst=3)


@pytest.fixture(scope="module")
def text(album: Album) -> str:
    return page(comparison(album), *album.pages(), Limits(min_psnr=20, min_adherence=50))


@pytest.fixture(scope="module")
def read(text: str) -> Reader:
    return Reader(text)


def test_nothing_outside_is_loaded(text: str, read: Reader) -> None:
    assert text.startswith("<!doctype html>")
    assert not set(read.elements) & {"script", "link", "iframe", "object", "use", "image", "base"}
    assert all(value.startswith("data:image/") for _, key, value in read.attributes if key in ("src", "href"))
    assert not any(key.startswith("on") for _, key, _ in read.attributes)
    addresses = set(re.findall(r"https?://[^\"'<\s]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the namespace of SVG is a name, not an address"
    assert "@import" not in text and "url(" not in text


def test_what_comes_from_outside_is_escaped(text: str, read: Reader) -> None:
    assert "<script" not in text and "<installed" not in text and ".*<b>" not in text
    told = "".join(read.text)
    assert STRANGE in told and "not <installed>" in told and '[{"match": "blocks.0.*<b>"' in told


def test_every_clip_layer_and_step_is_in_it(read: Reader, album: Album) -> None:
    found, told = comparison(Album()), "\n".join(read.text)
    for result in found.report.results:
        assert result.case.prompt in told and result.distance is not None
        assert f"{result.distance.ssim:.4f}" in told
    assert found.layers is not None and found.steps is not None
    for layer in found.layers.layers:
        assert layer.name in told and f"{layer.error:.5f}" in told
    for step, error in enumerate(found.steps.mean, 1):
        assert f"step {step}: {error:.4g}" in told
    for value in (*found.versions.values(), "6.68 MiB", "1.91 MiB", "0123456789ab", "--min-adherence 50"):
        assert value in told
    assert "blocks.0.norm3.weight" in told


def test_the_drawings_are_well_formed_and_inside_their_frames(text: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 4
    marks = []
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for element in root.iter():
            for key, limit in (
                ("x", width),
                ("cx", width),
                ("x1", width),
                ("x2", width),
                ("y", height),
                ("cy", height),
            ):
                if key in element.attrib:
                    assert -1e-6 <= float(element.attrib[key]) <= limit
        assert root.attrib["role"] == "img" and root.attrib["aria-label"]
        marks.append(
            Counter(element.tag.removeprefix(SVG) for element in root.iter() if element.find(f"{SVG}title") is not None)
        )
    dots, steps, bars, cells = marks
    equal = 3
    assert dots["circle"] == 9 - equal and steps["circle"] == 3 and steps["polyline"] == 3
    assert bars["path"] == 6 and cells["rect"] == 6


def test_frames_are_shown_side_by_side(read: Reader, album: Album) -> None:
    first, worst = album.pages()
    assert [shown.number for shown in first] == [1, 2]
    assert first[0].frames == (1, 2, 4, 5)
    assert {shown.number for shown in worst}.isdisjoint({1, 2})
    pictures = [value for name, key, value in read.attributes if (name, key) == ("img", "src")]
    assert len(pictures) == 3 * 4 * (len(first) + len(worst))
    reference, tested, difference = (pixels(source) for source in pictures[: 3 * 4 : 4])
    factor = amplification([*first, *worst])
    shown = worst[0]
    assert np.array_equal(reference, shown.reference[0])  # type: ignore[index]
    assert np.array_equal(tested, shown.tested[0])
    wanted = np.abs(shown.tested[0].astype(int) - shown.reference[0]) * factor  # type: ignore[index]
    assert np.array_equal(difference, wanted.clip(0, 255)) and factor > 1
    assert sum(f"difference × {factor}" in part for part in read.text) == len(first) + len(worst)  # noqa: RUF001


def pixels(source: str) -> np.ndarray:
    kind, _, data = source.partition(";base64,")
    assert kind == "data:image/png"
    return np.asarray(Image.open(BytesIO(b64decode(data))))


def test_the_verdict(album: Album) -> None:
    found = comparison(Album())
    for limits, word in ((Limits(min_psnr=20), "passed"), (Limits(min_psnr=90), "failed")):
        told = "".join(Reader(page(found, (), (), limits)).text)
        assert f"{word} --min-psnr {limits.min_psnr:g}" in told
    assert not {"passed", "failed"} & set(Reader(page(found, (), (), Limits())).text)


def test_a_page_of_single_pictures_without_a_reference(tmp_path: Path) -> None:
    album = Album(1, 1)
    found = comparison(album, frames=1, with_reference=False)
    path = write_page(str(tmp_path / "new" / "page.html"), found, *album.pages(), Limits())
    read = Reader(path.read_text("utf-8"))
    assert read.elements["img"] == 1 and read.elements["svg"] == 0
    assert "reference" not in " ".join(read.text)
    assert "NaN" not in path.read_text("utf-8")


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="file"):
        write_page(str(tmp_path / "file" / "page.html"), comparison(Album()), (), (), Limits())


def test_the_album_keeps_the_worst_and_forgets_the_others() -> None:
    album = Album(first=0, worst=2)
    found = comparison(album)
    assert album.kept == [] and len(album.lowest) == 2
    assert [shown.result for shown in album.lowest] == found.report.lowest(2)


def test_large_frames_become_smaller_pictures() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (480, 832, 3)).astype(np.uint8)
    data, kind = encode(frame)
    assert kind == "image/webp" and Image.open(BytesIO(data)).size == (480, 277)


@pytest.mark.parametrize(("largest", "factor"), [(0, 1), (1, 64), (3, 64), (5, 32), (100, 2), (200, 1)])
def test_differences_are_made_visible(largest: int, factor: int) -> None:
    album = Album(1, 0)
    gray = np.full((2, 16, 16, 3), 20, np.uint8)
    found = comparison(Album())
    album.add(found.report.results[0], gray + np.uint8(largest), gray)
    assert amplification(album.kept) == factor
    difference = album.kept[0].difference
    assert difference is not None and amplified(difference, factor).max() == min(255, largest * factor)


def test_the_text_says_the_same() -> None:
    told = summary(comparison(Album()))
    for part in (
        "error of the latents by step (2 clips): 0.015, 0.025, 0.065",
        "blocks.ffn.2",
        "0.0500  blocks.2.ffn.2",
    ):
        assert part in told
    assert "weights 2.38 MiB, of the reference 7.15 MiB" in told and "no lpips: not <installed>" in told


def test_the_title_says_what_is_compared() -> None:
    def title(tested: dict[str, Any], reference: dict[str, Any] | None) -> str:
        found = replace(
            comparison(Album()),
            tested=side(load_config(None, tested), {}),
            reference=None if reference is None else side(load_config(None, reference), {}),
        )
        return page(found, (), (), Limits()).partition("<h1>")[2].partition("</h1>")[0]

    int8 = {"mm_config.mm_type": "int8"}
    assert title(int8, {}) == "int8 against the unquantized model"
    assert title({}, None) == "The unquantized model"
    assert title(int8 | {"cache.type": "fora"}, int8) == "cache.type fora against the reference"
    assert title({}, {"cache.type": "fora"}) == "cache.type default against the reference"
    assert title(int8, int8) == "The same settings twice"


def test_markup() -> None:
    inner = tag("b", "<x>", class_="a b", data_n=1.5, title=None)
    assert inner == '<b class="a b" data-n="1.5">&lt;x&gt;</b>' and isinstance(inner, Markup)
    assert tag("p", inner, '"&"') == f'<p>{inner}"&amp;"</p>'
    assert tag("img", alt='"') == '<img alt="&quot;">'


def test_scales_have_round_ticks() -> None:
    scale = Scale(20, 45, 100, 0)
    assert scale.ticks == [20, 25, 30, 35, 40, 45] and scale(20) == 100 and scale(45) == 0
    assert [round_step(span) for span in (1, 3, 10, 0.07)] == pytest.approx([0.2, 1, 2, 0.02])
    assert widened(31.5, 45.4) == (30, 50) and widened(0, 0.109) == pytest.approx((0, 0.15))
    low, high = widened(40, 40)
    assert low < 40 < high
    assert whole_ticks(1, 4) == [1, 2, 3, 4] and whole_ticks(1, 200)[::9] == [1, 180]
    assert whole_ticks(1, 12) == [1, 4, 6, 8, 10, 12]
    assert [label(value) for value in (0, 0.05, 35, 1e-05)] == ["0", "0.05", "35", "1e-05"]
