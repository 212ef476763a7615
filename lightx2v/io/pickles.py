"""State dicts in torch's own format, read without running the code that such a file can hold."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightx2v.errors import CheckpointError
from lightx2v.io.dtypes import HEADER_NAMES
from lightx2v.io.headers import TensorInfo

_WRAPPERS = ("state_dict", "module", "model")
_RESAVE = "take the .safetensors form of the checkpoint, or save its plain state dict again with torch.save"


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file, mapped from disk, by name; {"state_dict"|"module"|"model": {...}} is unwrapped.

    Raises CheckpointError for a file that is missing or damaged, that is not a state dict, or that would run code.
    """
    _check_archive(file)
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL:? (\S+)", str(error))
        named = f" ({found.group(1)})" if found else ""
        raise CheckpointError(
            str(file), f"holds Python objects besides tensors{named}; nothing of it was run", do=_RESAVE
        ) from error
    except Exception as error:  # what a damaged pickle makes torch raise cannot be listed
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(str(file), f"is damaged: {reason}", do="copy the file again") from error
    return _tensors(file, _unwrap(state))


def describe(file: Path) -> list[TensorInfo]:
    """The tensors of a .pth file without their data."""
    return [
        TensorInfo(
            name,
            HEADER_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.").upper()),
            tuple(tensor.shape),
            file,
            tensor.numel() * tensor.element_size(),
        )
        for name, tensor in read_state(file).items()
    ]


def _check_archive(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
        if start != b"PK\x03\x04":
            raise CheckpointError(str(file), "is not a zip archive as torch.save writes it since 1.6", do=_RESAVE)
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(str(file), f"is truncated or damaged: {error}", do="copy the file again") from error
    except OSError as error:
        raise CheckpointError(str(file), f"cannot be read: {error.strerror or error}") from error
    if any(name.endswith("constants.pkl") for name in names):
        raise CheckpointError(
            str(file), "is a TorchScript program, not a state dict; nothing of it was run", do=_RESAVE
        )


def _unwrap(state: Any) -> Any:
    while isinstance(state, dict) and not any(isinstance(value, Tensor) for value in state.values()):
        inner = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)), None)
        if inner is None:
            break
        state = inner
    return state


def _tensors(file: Path, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise CheckpointError(str(file), f"holds a {type(state).__name__}, not a state dict", do=_RESAVE)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout is not torch.strided:
            kind = type(value).__name__
            raise CheckpointError(str(file), f"entry {name!r} is a {kind}, not a named dense tensor", do=_RESAVE)
    if not state:
        raise CheckpointError(str(file), "holds no tensors")
    return dict(state)
