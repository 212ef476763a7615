"""Functions as operators of torch, which torch.compile keeps whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def operator(prefix: str, fake: Callable[..., Any]) -> Callable[[Function], Function]:
    """Make a function the operator `lightx2v::<prefix>_<its name>`; `fake` gives empty tensors like its results.

    Outside of a compilation the function itself is called: an operator's way through the dispatcher takes longer than
    a small kernel.
    """

    def wrap(function: Function) -> Function:
        made = torch.library.custom_op(f"lightx2v::{prefix}_{function.__name__}", function, mutates_args=())
        made.register_fake(fake)

        @wraps(function)
        def call(*args: Any) -> Any:
            return made(*args) if torch.compiler.is_compiling() else function(*args)

        return call  # type: ignore[return-value]

    return wrap
