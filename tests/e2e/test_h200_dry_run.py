"""The script for a short loan of an H200, on a CPU: small, and with kernels in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightx2v.platform import probe

ROOT = Path(__file__).parents[2]
SECTIONS = ("correct", "quantize", "linear", "attention", "forward", "quality", "offload", "vae", "encoders", "peers")


@pytest.mark.skipif(probe("triton").version is None, reason=f"triton is {probe('triton').reason}")
def test_every_section_gives_its_figures(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "h200.py"), "--dry-run", "--out", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "h200.json").read_text("utf-8"))
    assert not found["failed"] and found["dry_run"]
    assert {row["section"] for row in found["rows"]} == {"roofline", *SECTIONS}
    values = {row["name"]: row["value"] for row in found["rows"]}
    assert next(value for name, value in values.items() if name.endswith("against Default: mean")) > 28
    assert all(f"| {section} |" in (tmp_path / "h200.md").read_text("utf-8") for section in SECTIONS)
