"""Matrix multiplications by name: schemes, the libraries that compute them, and the linear layers that they make."""

from __future__ import annotations

from typing import Any

__all__ = ["MM_WEIGHT_REGISTER"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the grammar of names in lightx2v.mm.scheme stays usable without importing torch.
    if name in __all__:
        from lightx2v.mm import weight

        return getattr(weight, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
