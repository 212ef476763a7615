"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightx2v.errors import CheckpointError, LightX2VError, ResourceError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_TEXT = "No space left on device"  # what libraries written in other languages put into their own exceptions


@contextmanager
def whole_file(
    path: Path, *, needed: int | None = None, folder: bool = False, error: type[LightX2VError] = CheckpointError
) -> Iterator[Path]:
    """Give a temporary path beside `path`, and rename it to `path` when the body ends well.

    Parent directories are made. Whatever goes wrong, an interrupt included, the temporary file (or `folder`) is removed
    and `path` stays as it was. `needed` is the size in bytes that the message of a full disk names, None when unknown.
    Raises ResourceError when the disk is full and `error` for any other failure of the operating system.
    """
    temporary = path.parent / f".lightx2v-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir() if folder else temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # a writer that renames into place may have made its file private
        _replace(temporary, path)
    except Exception as failure:
        _remove(temporary)  # so that the free space told is what a next attempt will find
        readable = _readable(failure, path, needed, error)
        if readable is None:
            raise
        raise readable from failure
    finally:
        _remove(temporary)


def _replace(temporary: Path, path: Path) -> None:
    """Rename; a directory that exists is moved aside first, because no system call replaces one that is not empty."""
    if not (temporary.is_dir() and path.is_dir()):
        os.replace(temporary, path)
        return
    old = temporary.with_suffix(".old")
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(old, path)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _readable(failure: Exception, path: Path, needed: int | None, error: type[LightX2VError]) -> LightX2VError | None:
    number = failure.errno if isinstance(failure, OSError) else None
    if number in _FULL or _FULL_TEXT in str(failure):
        need = f"{needed:,} bytes are needed, " if needed is not None else ""
        existing = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(existing).free
        return ResourceError(
            str(path), f"the disk is full: {need}{free:,} bytes are free", do="free some space or write elsewhere"
        )
    if isinstance(failure, OSError):
        return error(str(path), f"cannot be written: {failure.strerror or failure}")
    return None
