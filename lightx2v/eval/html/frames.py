"""Frames of clips side by side: reference, tested, difference."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Sequence

from lightx2v.eval.html.markup import TIMES, Markup, tag
from lightx2v.eval.metrics import Clip
from lightx2v.eval.pictures import LOSSLESS_SIDE, Shown, amplified, encode


def clips(shown: Sequence[Shown], factor: int) -> Markup:
    """A figure for each clip, its differences multiplied by `factor`."""
    return tag("div", *(_clip(clip, factor) for clip in shown), class_="clips")


def _clip(shown: Shown, factor: int) -> Markup:
    case, distance = shown.result.case, shown.result.distance
    numbers = f"clip {shown.number}, seed {case.seed}"
    if distance is not None:
        level = f"{distance.psnr:.2f} dB" if math.isfinite(distance.psnr) else "equal"
        numbers += f", PSNR {level}, SSIM {distance.ssim:.4f}, MS-SSIM {distance.ms_ssim:.4f}"
        numbers += "" if distance.lpips is None else f", LPIPS {distance.lpips:.4f}"
    if shown.result.wrong:
        numbers += f"; wrong: {', '.join(shown.result.wrong)}"
    rows: list[Markup] = []
    difference = shown.difference
    if shown.reference is not None:
        rows += _row("reference", shown.reference, shown)
    rows += _row("tested", shown.tested, shown)
    if difference is not None:
        rows += _row(f"difference {TIMES} {factor}", amplified(difference, factor), shown)
    size = "small" if max(shown.tested.shape[1:3]) <= LOSSLESS_SIDE else ""
    strip = tag("div", *rows, class_=f"strip of{len(shown.frames)} {size}".strip())
    return tag("figure", tag("figcaption", case.prompt, tag("span", numbers, class_="soft")), strip)


def _row(name: str, frames: Clip, shown: Shown) -> list[Markup]:
    return [tag("span", name), *(_picture(f, f"{name}, frame {n}") for f, n in zip(frames, shown.frames, strict=True))]


def _picture(frame: Clip, name: str) -> Markup:
    data, kind = encode(frame)
    return tag("img", src=f"data:{kind};base64,{b64encode(data).decode()}", alt=name, title=name)
