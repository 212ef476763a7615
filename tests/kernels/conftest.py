"""Kernels in Triton: in its interpreter, or on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from lightx2v.platform import install_hint, list_devices, probe

if probe("triton").version is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str | None:
    found = probe("triton")
    if found.version:
        return None
    return f"tests/kernels is left out: triton is {found.reason} ({install_hint('triton')})"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first GPU that kernels are compiled for, else the CPU."""
    best = list_devices()[0]
    return torch.device(best.torch_name if best.capability else "cpu")
