"""Files in ggml's format, read by the `gguf` package: tensors described by their headers, streamed one at a time.

Tensors have the names that the file gives them: those of city96's and QuantStack's Wan files are the original ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.io.headers import TensorInfo
from lightx2v.platform import install_hint, probe
from lightx2v.quant.gguf import FLOAT_KINDS, KIND_OF_NUMBER, dequantize_blocks

ENDING = ".gguf"
_PREFIX = "model.diffusion_model."
_SHAPE = "comfy.gguf.orig_shape."
_DO = "copy the file again"


def describe(file: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of a file without their data, with the shapes that their values have, and its metadata of text.

    The dtype of blocks is the name of their kind, such as "Q4_K". Raises CheckpointError for a file that is missing,
    damaged or of another byte order, and ConfigError when the `gguf` package is not installed.
    """
    reader = _open(file)
    infos = [
        TensorInfo(_name(tensor.name), tensor.tensor_type.name, _shape(reader, tensor), file, int(tensor.n_bytes))
        for tensor in reader.tensors
    ]
    return infos, _texts(reader)


def stream(file: Path, names: Iterable[str], raw: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor): float tensors as they are, blocks as float32.

    Of the names in `raw` come the bytes instead, uint8 [N, bytes of a row], and after each `<name>_type`, the number of
    their kind, int32 []. Raises CheckpointError for kinds of blocks that are not read here.
    """
    reader = _open(file)
    tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
    for name in names:
        tensor = tensors[name]
        number, shape = int(tensor.tensor_type), _shape(reader, tensor)
        kind = KIND_OF_NUMBER.get(number)
        if kind is None:
            raise CheckpointError(
                str(file),
                f"tensor '{name}' has blocks of {tensor.tensor_type.name}",
                allowed=", ".join(KIND_OF_NUMBER.values()),
            )
        rows = shape[0] if len(shape) > 1 else 1
        data = torch.from_numpy(tensor.data.copy()).view(torch.uint8).reshape(rows, -1)
        if name in raw:
            yield name, data
            yield f"{name}_type", torch.tensor(number, dtype=torch.int32)
        else:
            values = data.view(FLOAT_KINDS[kind]) if kind in FLOAT_KINDS else dequantize_blocks(data, kind)
            yield name, values.reshape(shape)


def _open(file: Path) -> Any:
    if (reason := probe("gguf").reason) is not None:
        raise ConfigError("gguf", f"the package that reads {file.name} is {reason}", do=install_hint("gguf"))
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except OSError as error:
        raise CheckpointError(str(file), f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what a damaged header makes the package raise cannot be listed
        raise CheckpointError(str(file), f"is no whole GGUF file: {error}", do=_DO) from error
    if reader.byte_order != "I":
        raise CheckpointError(str(file), "was written for the other byte order", do="convert it on a machine like this")
    return reader


def _name(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    """The shape of the values: ggml counts dimensions from the last, and some were changed to make blocks fit."""
    field = reader.get_field(_SHAPE + tensor.name)
    if field is None:
        return tuple(int(size) for size in reversed(tensor.shape.tolist()))
    return tuple(int(size) for size in field.contents())


def _texts(reader: Any) -> dict[str, str]:
    found = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and isinstance(value := field.contents(), str):
            found[name] = value
    return found
