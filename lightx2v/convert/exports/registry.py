"""The packages whose files are written, by the names of `lightx2v convert --to`. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightx2v.registry import Registry

if TYPE_CHECKING:
    from lightx2v.convert.exports.base import Export

EXPORTS: Registry[Export] = Registry("--to")
for _name in ("angelslim", "comfyui", "msmodelslim", "quanto"):
    EXPORTS.add(_name, f"lightx2v.convert.exports.{_name}:EXPORT")
