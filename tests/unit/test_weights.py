"""Checkpoints on disk: what opens, what is refused and why, and that writing is all or nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightx2v.errors import CheckpointError, ResourceError
from lightx2v.io import weights
from lightx2v.io.weights import Checkpoint, write_safetensors

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
]  # fmt: skip


def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, (3, 5), generator=generator, dtype=torch.uint8)
    tensors = {str(dtype): codes.to(dtype) if dtype.itemsize > 1 else codes.clone().view(dtype) for dtype in DTYPES}
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.flatten().view(torch.uint8).equal(b.flatten().view(torch.uint8))
    )


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "I8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


class Payload:
    """Unpickling this makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    tensors, path = sample(), tmp_path / "new" / name
    if name.endswith(".pth"):
        path.parent.mkdir()
        torch.save(tensors, path)
    else:
        write_safetensors(path, tensors, {"scheme": "none"})
        assert Checkpoint.open(path).metadata == {"scheme": "none"}
    checkpoint = Checkpoint.open(path)
    read = {key: value.clone() for key, value in checkpoint.stream()}
    assert read.keys() == tensors.keys() == checkpoint.tensors.keys()
    assert all(same(read[key], tensors[key]) for key in tensors)
    info = checkpoint.tensors["torch.bfloat16"]
    assert (info.dtype, info.shape, info.nbytes, info.file) == ("BF16", (3, 5), 30, path)
    assert checkpoint.load("scalar").item() == 2.5
    with pytest.raises(CheckpointError, match=r"no tensor 'scaler' - did you mean 'scalar'"):
        checkpoint.load("scaler")


def test_stream_follows_the_file_not_the_request(tmp_path: Path) -> None:
    for number in (10, 2):
        write_safetensors(tmp_path / f"w_{number}.safetensors", {f"t{number}": torch.ones(1)}, {})
    assert [name for name, _ in Checkpoint.open(tmp_path).stream(["t10", "t2"])] == ["t2", "t10"]


def test_load_survives_a_change_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": torch.ones(1024)}, {})
    tensor = Checkpoint.open(path).load("a")
    with path.open("r+b") as stream:
        stream.seek(-4096, os.SEEK_END)
        stream.write(bytes(4096))
    assert tensor.eq(1).all()


def test_written_strides_and_shared_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.T, "all": base, "again": base, "rows": base[:2]}
    write_safetensors(tmp_path / "w.safetensors", tensors, {})
    read = Checkpoint.open(tmp_path / "w.safetensors")
    assert all(same(read.load(name), tensor.contiguous()) for name, tensor in tensors.items())


def test_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(1)}, {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


HOSTILE = {
    "empty file": (b"", "it has 0 bytes"),
    "wrong magic": (b"hello world, this is no checkpoint", "header of .* bytes"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "huge header": (raw({}, length=2**63), "header of 9,223,372,036,854,775,808 bytes"),
    "truncated header": (raw({}, length=100), "98 bytes of the header are missing"),
    "not JSON": (raw(b"{not json"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "deeply nested": (raw(b"[" * 200_000), "not valid JSON|recursion"),
    "not an object": (raw([1, 2]), "not a JSON object"),
    "duplicate name": (raw(b'{"a": {}, "a": {}}'), "'a' appears twice"),
    "metadata not strings": (raw({"__metadata__": {"a": 1}}), "map of strings"),
    "entry not an object": (raw({"a": 3}), "not described"),
    "unknown dtype": (raw({"a": entry(0, 1, [1], "F9")}, b"x"), "unknown dtype 'F9'"),
    "dtype is a list": (raw({"a": {"dtype": [], "shape": [], "data_offsets": []}}), "unknown dtype"),
    "negative shape": (raw({"a": entry(0, 1, [-1])}, b"x"), "invalid shape"),
    "boolean shape": (raw({"a": entry(0, 1, [True])}, b"x"), "invalid shape"),
    "negative offset": (raw({"a": entry(-1, 0, [1])}, b"x"), "invalid data_offsets"),
    "offsets reversed": (raw({"a": entry(2, 1, [1])}, b"xx"), "invalid data_offsets"),
    "three offsets": (
        raw({"a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"x"),
        "invalid data_offsets",
    ),
    "size does not fit": (raw({"a": entry(0, 3, [2])}, b"xxx"), "does not fit its 3 bytes"),
    "overlap": (raw({"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}, b"x" * 6), "'b' begins at byte 2, where 4"),
    "hole": (raw({"a": entry(0, 4, [4]), "b": entry(5, 6, [1])}, b"x" * 6), "'b' begins at byte 5, where 4"),
    "out of range": (raw({"a": entry(0, 10**12, [10**12])}, b"xx"), "999,999,999,998 bytes of .* are missing"),
    "trailing bytes": (raw({"a": entry(0, 1, [1])}, b"xx"), "1 bytes more"),
    "no tensors": (raw({}), "holds no tensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("missing", [1, 100])
def test_truncated_file_says_how_much_is_missing(tmp_path: Path, missing: int) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": torch.ones(100)}, {})
    os.truncate(path, path.stat().st_size - missing)
    with pytest.raises(CheckpointError, match=rf"truncated: {missing} bytes of 400 are missing"):
        Checkpoint.open(path)


def test_file_that_vanishes_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": torch.ones(100)}, {})
    checkpoint = Checkpoint.open(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="can no longer be read"):
        checkpoint.load("a")


@pytest.mark.parametrize("name", ["absent", "absent.safetensors", "weights.onnx"])
def test_wrong_paths(tmp_path: Path, name: str) -> None:
    (tmp_path / "weights.onnx").touch()
    with pytest.raises(CheckpointError, match=r"no such file|unknown ending '.onnx'"):
        Checkpoint.open(tmp_path / name)


# Directories


def test_directory_of_blocks(tmp_path: Path) -> None:
    for number in range(11):
        write_safetensors(tmp_path / f"block_{number}.safetensors", {f"blocks.{number}.w": torch.ones(1)}, {})
    write_safetensors(tmp_path / "non_block.safetensors", {"head": torch.ones(1)}, {"from": "here"})
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == [*(f"blocks.{number}.w" for number in range(11)), "head"]
    assert checkpoint.metadata == {"from": "here"}


@pytest.mark.parametrize(
    ("stems", "missing"),
    [
        (["block_0", "block_2", "non_block"], "block_1.safetensors"),
        (["block_0", "block_1"], "non_block.safetensors"),
        (["converted_part1", "converted_part3"], "converted_part2.safetensors"),
        (["m-00001-of-00002"], "m-00002-of-00002.safetensors"),
    ],
)
def test_directory_with_a_part_missing(tmp_path: Path, stems: list[str], missing: str) -> None:
    for stem in stems:
        write_safetensors(tmp_path / f"{stem}.safetensors", {stem: torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match=f"1 of its files are missing: {re.escape(missing)}"):
        Checkpoint.open(tmp_path)


def test_same_tensor_in_two_files(tmp_path: Path) -> None:
    for stem, value in (("a", 1.0), ("b", 2.0)):
        write_safetensors(tmp_path / f"{stem}.safetensors", {"w": torch.tensor(value), stem: torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match=r"'w' is in both a.safetensors and b.safetensors"):
        Checkpoint.open(tmp_path)
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "w": "b.safetensors"}}))
    assert Checkpoint.open(tmp_path).load("w").item() == 2.0
    assert Checkpoint.open(index).load("w").item() == 2.0


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "not an index"),
        (b"{}", "not an index"),
        (b'{"weight_map": {"w": "gone.safetensors"}}', "1 of its files are missing: gone.safetensors"),
        (b'{"weight_map": {"w": "../a.safetensors"}}', "not a weights file beside it"),
        (b'{"weight_map": {"w": "/a.safetensors"}}', "not a weights file beside it"),
        (b'{"weight_map": {"x": "a.safetensors"}}', "1 tensors named by the index but absent from its files: x"),
    ],
)
def test_bad_index(tmp_path: Path, index: bytes, message: str) -> None:
    folder = tmp_path / "model"
    write_safetensors(folder / "a.safetensors", {"w": torch.ones(1)}, {})
    write_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(1)}, {})
    (folder / "m.safetensors.index.json").write_bytes(index)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_directory_without_weights_names_what_is_there(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "transformer" / "w.safetensors", {"w": torch.ones(1)}, {})
    torch.save({"w": torch.ones(1)}, tmp_path / "t5.pth")
    with pytest.raises(CheckpointError, match=r"no .safetensors files\n  do: .*t5.pth, transformer/"):
        Checkpoint.open(tmp_path)


# Pickles


@pytest.mark.parametrize("keys", [("state_dict",), ("module",), ("model", "state_dict")])
def test_nested_state_dict(tmp_path: Path, keys: tuple[str, ...]) -> None:
    state: dict[str, Any] = {"w": torch.ones(2)}
    for key in keys:
        state = {"epoch": 3, key: state}
    torch.save(state, tmp_path / "w.pt")
    assert list(Checkpoint.open(tmp_path / "w.pt").tensors) == ["w"]


@pytest.mark.parametrize("where", ["beside", "nested"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, where: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "w.pth"
    payload = Payload(marker)
    torch.save({"w": torch.ones(2), "x": payload} if where == "beside" else {"state_dict": {"w": payload}}, path)
    with pytest.raises(CheckpointError, match=r"besides tensors \(\w+.mkdir\); nothing of it was run\n  do: "):
        Checkpoint.open(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.ones(1)], "holds a list"),
        ({"w": torch.ones(1), "lr": 0.1}, "entry 'lr' is a float"),
        ({1: torch.ones(1)}, "entry 1 is a Tensor"),
        ({"w": torch.ones(2).to_sparse()}, "not a named dense tensor"),
        ({}, "holds no tensors"),
    ],
)
def test_pickle_that_is_no_state_dict(tmp_path: Path, state: Any, message: str) -> None:
    torch.save(state, tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path / "w.bin")


def test_damaged_pickles(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"w": torch.ones(200)}, path)
    whole = path.read_bytes()
    for content, message in ((whole[:-50], "truncated or damaged"), (b"", "not a zip"), (b"\x80\x04}.", "not a zip")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(path)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", b"")
        archive.writestr("w/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="TorchScript program"):
        Checkpoint.open(tmp_path / "w.pt")


# Writing


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError),
        (weights.SafetensorError("I/O error: No space left on device (os error 28)"), ResourceError),
        (PermissionError(errno.EACCES, "Permission denied"), CheckpointError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_failed_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, raised: type[BaseException], existing: bool
) -> None:
    path = tmp_path / "w.safetensors"
    if existing:
        path.write_bytes(b"old")

    def fail(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(raised) as caught:
        write_safetensors(path, {"a": torch.ones(10)}, {})
    if raised is ResourceError:
        assert re.search(r"disk is full: 40 bytes are needed, [\d,]+ bytes are free", str(caught.value))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([b"old"] if existing else [])
