"""Bytes for people."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """`count` bytes in the binary unit that keeps three digits: "512 KiB", "21.4 MiB", "3.05 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
