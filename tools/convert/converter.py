"""LightX2V's converter under its usual path: `python tools/convert/converter.py ...`, from any folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("lightx2v") is None:  # not installed: use the repository that this file is in
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightx2v.convert.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="converter.py"))
