"""Units on disk: where their bytes come from, what stays in memory, and that no error is lost."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightx2v.errors import CheckpointError, ResourceError
from lightx2v.features.offload import disk
from lightx2v.features.offload.disk import DiskStore
from lightx2v.features.offload.slab import Entry, Slab
from lightx2v.io.source import CheckpointSource, FileSpan
from lightx2v.io.weights import Checkpoint
from lightx2v.platform import CopyQueue, DeviceInfo, select_device

CPU = select_device("cpu")
NAMES = ("a.weight", "a.bias", "b.weight")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    sizes = {"b.weight": (300, 200), "a.weight": (64, 200), "a.bias": (64,)}
    save_file({name: torch.randn(size) for name, size in sizes.items()}, path := tmp_path / "model.safetensors")
    return path


def source_of(file: Path) -> CheckpointSource:
    return CheckpointSource(Checkpoint.open(file), lambda name: name, lambda name: False)


def model_of(file: Path) -> nn.Module:
    model = nn.Module()
    for name, tensor in source_of(file).read():
        layer, leaf = name.split(".")
        if not hasattr(model, layer):
            model.add_module(layer, nn.Module())
        model.get_submodule(layer).register_buffer(leaf, tensor.clone())
    return model


def store_of(file: Path, keep: int = 0, workers: int = 3) -> DiskStore:
    source = source_of(file)

    def locate(entry: Entry) -> list[FileSpan]:
        span = source.locate(entry.name.removeprefix("m."))
        return [] if span is None else [span]

    return DiskStore(CPU, CopyQueue(CPU), locate, workers, keep)


def brought(store: DiskStore, slab: Slab, unit: int = 0) -> list[Tensor]:
    memory = torch.zeros(slab.nbytes, dtype=torch.uint8)
    store.start(unit, memory, None)()
    return slab.views(memory)


def test_the_checkpoint_itself_is_read_where_it_has_the_bytes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "CHUNK", 1000)  # several for each tensor
    model, store = model_of(file), store_of(file)
    model.a.bias.add_(1)  # no longer what the file has
    slab = Slab.of([("m", model)])
    before = [tensor.clone() for tensor in slab.bound]
    slab.bind(store.add(slab))
    assert all(tensor.is_meta for tensor in model.buffers())
    assert store.spilled == 64 * 4 and store.host_bytes == 0
    assert all(torch.equal(one, other) for one, other in zip(brought(store, slab), before, strict=True))


def test_a_file_that_is_replaced_is_still_read_as_it_was(file: Path) -> None:
    model, store = model_of(file), store_of(file)
    slab = Slab.of([("m", model)])
    before = [tensor.clone() for tensor in slab.bound]
    store.add(slab)
    save_file({name: torch.zeros(5) for name in NAMES}, other := file.with_name("other.safetensors"))
    os.replace(other, file)
    assert all(torch.equal(one, other) for one, other in zip(brought(store, slab), before, strict=True))


def test_a_file_that_becomes_shorter_is_an_error(file: Path) -> None:
    model, store = model_of(file), store_of(file)
    slab = Slab.of([("m", model)])
    store.add(slab)
    os.truncate(file, 1000)
    wait = store.start(0, torch.zeros(slab.nbytes, dtype=torch.uint8), None)
    with pytest.raises(CheckpointError, match="became shorter"):
        wait()
    store.close()


def test_a_part_of_the_units_stays_in_memory(file: Path) -> None:
    first, second = model_of(file), model_of(file)
    slab = Slab.of([("m", first)])
    store = store_of(file, keep=slab.nbytes + 100)
    away = store.add(slab)
    assert not away[0].is_meta and store.host_bytes == slab.nbytes
    before = [tensor.clone() for tensor in slab.bound]
    assert all(tensor.is_meta for tensor in store.add(Slab.of([("m", second)])))
    for unit in (0, 1):
        assert all(torch.equal(one, other) for one, other in zip(brought(store, slab, unit), before, strict=True))


def test_a_full_disk_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, store = model_of(file), store_of(file)
    model.a.bias.add_(1)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match="disk is full"):
        store.add(Slab.of([("m", model)]))


def test_the_temporary_file_has_no_name(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "cache_folder", lambda: tmp_path)
    model, store = model_of(file), store_of(file)
    model.a.bias.add_(1)
    store.add(Slab.of([("m", model)]))
    assert store.spilled and sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    assert tempfile.gettempdir()  # the folder was asked for, not the default one


def test_an_accelerator_gets_units_through_two_buffers(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that copies at once: the buffers, their reuse and their order are what is tested."""
    accelerator = DeviceInfo("mps", 0, "fake", None, 0, 0)
    source = source_of(file)
    store = DiskStore(accelerator, CopyQueue(accelerator), lambda entry: [source.locate(entry.name[2:])], 2)  # type: ignore[list-item]
    models = [model_of(file) for _ in range(5)]
    slabs = [Slab.of([("m", model)]) for model in models]
    for number, slab in enumerate(slabs):
        slab.bound[0].fill_(number)
        store.add(slab)
    memories = [torch.zeros(slab.nbytes, dtype=torch.uint8) for slab in slabs]
    waits = [store.start(unit, memories[unit], None) for unit in range(5)]
    assert [wait() for wait in waits] == [None] * 5
    assert [float(slab.views(memory)[0].mean()) for slab, memory in zip(slabs, memories, strict=True)] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert store.host_bytes == 2 * slabs[0].nbytes
    store.close()
    assert store.host_bytes == 0
