"""Memory of a process that has a model on disk, as the system counts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ARCH = {"dim": 768, "ffn_dim": 3072, "num_heads": 6, "num_layers": 24, "text_dim": 64, "text_len": 32}


def measured(form: str) -> dict[str, Any]:
    options = ["--arch", json.dumps(ARCH), "--size", "64x64", "--frames", "5", "--repeat", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "offload.py"), form, "--json", *options]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    figures: dict[str, Any] = json.loads(run.stdout)
    return figures


def test_a_lazy_model_takes_a_third_of_its_size_at_most() -> None:
    off, lazy = measured("off"), measured("lazy-block")
    assert lazy["result"] == off["result"]
    assert max(lazy["loading"], lazy["looping"] - lazy["before"]) <= 0.35 * lazy["weights"]
    assert off["looping"] - off["before"] > 0.9 * off["weights"]  # what is measured is the model
