"""Checkpoints: opened by their headers, streamed one tensor at a time, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightx2v.errors import CheckpointError, suggestion
from lightx2v.io import gguf, pickles
from lightx2v.io.declared import merge_metadata
from lightx2v.io.files import whole_file
from lightx2v.io.headers import TensorInfo, read_header
from lightx2v.io.layout import PICKLES, checkpoint_files


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of one or more files, described; their data stays on disk until `stream` or `load`."""

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    """By name, in the order of the files and of the bytes in them."""
    metadata: Mapping[str, str]
    """The safetensors metadata of all files; where files differ, the first one counts, but for lists of layers."""

    @staticmethod
    def open(path: str | Path) -> Checkpoint:
        """Read the headers of a .safetensors, .pth/.pt/.bin or .gguf file, an index.json, or a directory of parts.

        Raises CheckpointError for files that are missing, truncated, damaged, not checkpoints, or pickles with code,
        and when two files hold the same tensor and no index says which counts.
        """
        path = Path(path)
        files, chosen = checkpoint_files(path)
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for file in files:
            infos, described = _describe(file)
            metadata = merge_metadata(metadata, described)
            for info in infos:
                if chosen.get(info.name, file) != file:
                    continue
                if info.name in tensors:
                    both = f"{tensors[info.name].file.name} and {file.name}"
                    raise CheckpointError(
                        str(path), f"tensor '{info.name}' is in both {both}", do="give the path of one checkpoint"
                    )
                tensors[info.name] = info
        _refuse(str(path), {"named by the index but absent from its files": [n for n in chosen if n not in tensors]})
        if not tensors:
            raise CheckpointError(str(path), "holds no tensors")
        return Checkpoint(path, tuple(files), tensors, metadata)

    def stream(self, names: Iterable[str] | None = None, raw: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) in file order, of `names` or of all.

        The blocks of a .gguf file come as float32 numbers; of the names in `raw` as bytes, and then `<name>_type`.

        The tensors are views of the mapped file: use one before asking for the next, and copy what is kept.
        Raises CheckpointError for names that are not there and for files that can no longer be read.
        """
        wanted = list(self.tensors) if names is None else self._in_order(names)
        for file in self.files:
            here = [name for name in wanted if self.tensors[name].file == file]
            if file.suffix == gguf.ENDING:
                yield from gguf.stream(file, here, raw)
            elif here:
                with _reader(file) as read:
                    for name in here:
                        yield name, read(name)

    def stored(self, name: str) -> TensorInfo | None:
        """Where the bytes of a tensor lie, if they are in a file as `stream` gives them."""
        return self.tensors.get(name)

    def load(self, name: str) -> Tensor:
        """A copy of one tensor in the memory of this process."""
        return next(tensor for _, tensor in self.stream([name])).clone()

    def _in_order(self, names: Iterable[str]) -> list[str]:
        wanted = set(names)
        for name in wanted - self.tensors.keys():
            raise CheckpointError(str(self.path), f"has no tensor '{name}'{suggestion(name, self.tensors)}")
        return [name for name in self.tensors if name in wanted]


def _describe(file: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    if file.suffix == gguf.ENDING:
        return gguf.describe(file)
    return (pickles.describe(file), {}) if file.suffix in PICKLES else read_header(file)


@contextmanager
def _reader(file: Path) -> Iterator[Callable[[str], Tensor]]:
    """A function from name to tensor, for as long as the file is open."""
    if file.suffix in PICKLES:
        yield pickles.read_state(file).pop
        return
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle.get_tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(str(file), f"can no longer be read: {error}", do="was it changed meanwhile?") from error


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one file, whole or not at all. Tensors of any device and stride; ones that share memory are copied.

    Raises ResourceError when the disk is full, CheckpointError when the file cannot be written.
    """
    path = Path(path)
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain[name] = tensor.detach().cpu().contiguous()
        storage = plain[name].untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain[name].nbytes:
            plain[name] = plain[name].clone()
        seen.add(storage.data_ptr())
    needed = sum(tensor.nbytes for tensor in plain.values())
    with whole_file(path, needed=needed) as temporary:
        save_file(plain, temporary, metadata=dict(metadata))


@dataclass
class _Place:
    """Where a tensor goes: one parameter or buffer, at more than one (module, leaf) when the model ties it."""

    like: Tensor
    homes: list[tuple[nn.Module, str]] = field(default_factory=list)
    filled: bool = False


def stream_into(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype],
    where: str,
) -> None:
    """Set the parameters and persistent buffers of a meta `model` in place, one at a time, as copies on `device`.

    Floating-point tensors become `dtype_of(name)`; parameters do not require gradients. A module with
    `load_tensor(leaf, tensor)` gets its tensors that way instead, and `finish()` is called at the end on every module
    that has it. Buffers that no state dict holds are moved to `device`, unless they are on meta: those keep no values.
    `where` names the source in errors. Raises CheckpointError when names are missing, unknown or given twice, when a
    shape differs, and when integers arrive for a floating-point parameter.
    """
    places: dict[str, _Place] = {}
    loaders: dict[str, nn.Module] = {}
    _survey(model, "", places, loaders, {})
    given: set[str] = set()
    unknown, twice = [], []
    for name, tensor in tensors:
        prefix, _, leaf = name.rpartition(".")
        if name in given:
            twice.append(name)
        elif prefix in loaders:
            loaders[prefix].load_tensor(leaf, tensor.to(device, copy=True))  # type: ignore[operator]
        elif name in places:
            _fill(places[name], _fitted(name, tensor, places[name].like, device, dtype_of, where))
        else:
            unknown.append(name)
        given.add(name)
    fed = {name.rpartition(".")[0] for name in given}
    missing = [name for name, place in places.items() if not place.filled]
    missing += [f"{prefix}.weight" for prefix in loaders if prefix not in fed]
    _refuse(where, {"without a place in the model": unknown, "missing": missing, "given twice": twice})
    for module in model.modules():
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers[leaf]
            module._buffers[leaf] = buffer if buffer is None or buffer.is_meta else buffer.to(device)
        if callable(finish := getattr(module, "finish", None)):
            finish()


def _survey(
    module: nn.Module, prefix: str, places: dict[str, _Place], loaders: dict[str, nn.Module], seen: dict[int, _Place]
) -> None:
    """Collect the places below `module`, and the modules that load themselves, by full name."""
    if hasattr(module, "load_tensor"):
        loaders[prefix.rstrip(".")] = module
        return
    for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and leaf not in module._non_persistent_buffers_set:
            place = seen.setdefault(id(tensor), _Place(tensor))
            place.homes.append((module, leaf))
            places[prefix + leaf] = place
    for leaf, child in module.named_children():
        _survey(child, f"{prefix}{leaf}.", places, loaders, seen)


def _fitted(
    name: str, tensor: Tensor, like: Tensor, device: torch.device, dtype_of: Callable[[str], torch.dtype], where: str
) -> Tensor:
    """A contiguous copy on `device`: never the mapped memory of the file, which may change while the model runs."""
    if tensor.shape != like.shape:
        raise CheckpointError(
            where, f"tensor '{name}' has shape {list(tensor.shape)}, the model wants {list(like.shape)}"
        )
    if tensor.is_floating_point() != like.is_floating_point():
        raise CheckpointError(
            where,
            f"tensor '{name}' is {_short(tensor.dtype)}, the model wants {_short(like.dtype)}",
            do="if the checkpoint is quantized, name its scheme in the configuration",
        )
    dtype = dtype_of(name) if like.is_floating_point() else like.dtype
    return tensor.to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)


def _fill(place: _Place, value: Tensor) -> None:
    parameter = nn.Parameter(value, requires_grad=False)
    for module, leaf in place.homes:
        if leaf in module._parameters:
            module._parameters[leaf] = parameter
        else:
            module._buffers[leaf] = value
    place.filled = True


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse(where: str, lists: Mapping[str, list[str]], do: str = "") -> None:
    """Raise one CheckpointError that counts every list that is not empty and shows its first ten names."""
    found = [
        f"{len(names)} tensors {what}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        for what, names in lists.items()
        if names
    ]
    if found:
        raise CheckpointError(where, "\n  ".join(found), do=do)
