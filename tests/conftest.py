"""Settings of the process that every test runs in, before torch or transformers is imported."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors of tests are too small to be worth sharing out
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a mistake
if not Path("/dev/nvidiactl").exists():  # triton reads this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

# The same examples in every run of CI, so that a red run is the change's fault; new ones on a developer's machine.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
