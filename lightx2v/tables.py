"""Small tables of what was measured on this machine, as JSON in the user's cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lightx2v.platform import cache_folder


class Table:
    """One file of the cache: names to values."""

    def __init__(self, file: str) -> None:
        self.file = file

    @property
    def path(self) -> Path:
        return cache_folder() / self.file

    def read(self) -> dict[str, Any]:
        """What is known of this and of other machines; nothing where the file is absent or damaged."""
        try:
            content = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write(self, table: dict[str, Any]) -> None:
        """Replace the file, whole or not at all."""
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(table, indent=1, sort_keys=True), "utf-8")
        os.replace(temporary, self.path)
