"""Settings of the process that every test runs in, before torch or transformers is imported."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors of tests are too small to be worth sharing out
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a mistake
