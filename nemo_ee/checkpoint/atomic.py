# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Files and directories that are complete or absent: written as `<name>.partial`, synced, then renamed.

An exception removes the partial file or directory. A killed process leaves it, and the next writer replaces it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """The path to write to; it becomes `path` when the context ends without an exception. Missing folders are made.

    An existing file is replaced and its mode kept. A lock on the partial file keeps out a second writer; a child that
    is forked inside the context holds it, too.

    Raises:
        ValueError: the file is being written already.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    busy = f"{path} is being written already; wait, or name another file"
    with open(partial, "ab") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(busy) from None
        if not _is_at(lock, partial):  # the other writer has renamed it between the opening and the lock
            raise ValueError(busy)
        lock.truncate(0)  # what a killed writer left
        _use_default_mode(lock)
        try:
            yield partial
            _sync_file(partial)
            if path.exists():
                shutil.copymode(path, partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync_directory(path.parent)


@contextlib.contextmanager
def atomic_directory(path: Path, num_bytes: int) -> Iterator[Path]:
    """The directory to write to; it becomes `path` when the context ends without an exception. Missing folders are
    made, and removed again after an exception.

    Args:
        path: absent, or an empty directory.
        num_bytes: about the number of bytes to be written.

    Raises:
        ValueError: not enough space, or the files cannot be written.
    """
    path = path.absolute()
    partial = _partial(path)
    made = [parent for parent in partial.parents if not parent.exists()]
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if num_bytes > free:
            raise ValueError(f"{path} needs {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there")
        yield partial
        _sync_files(partial)
        if path.is_dir():
            path.rmdir()
        os.replace(partial, path)
        sync_directory(path.parent)
    except BaseException as problem:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process uses a folder by now
            for parent in made:
                parent.rmdir()
        if isinstance(problem, OSError):
            raise ValueError(f"{path} could not be written ({problem}); nothing was left there") from problem
        raise


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes that call this out of a folder, which is made if it is missing, while the context lasts.

    Raises:
        ValueError: another one has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as problem:
        raise ValueError(f"{folder} cannot be used ({problem}); name another folder") from problem
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder} is used by another run; wait for its end, or name another") from None
        yield
    finally:
        os.close(lock)


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _use_default_mode(file: IO[bytes]) -> None:
    """The mode of a new file; one that a killed writer left may have another."""
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(OSError):  # the file of another user
        os.fchmod(file.fileno(), 0o666 & ~umask)


def write_json(path: str | Path, values: Any, *, indent: int = 2) -> None:
    """Write a JSON file. Numbers that are not finite become null: JSON has none."""
    text = json.dumps(_finite(values), indent=indent, allow_nan=False) + "\n"
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable, after a rename in it."""
    # Not every file system lets a directory be opened.
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _sync_files(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            _sync_file(path)
        else:
            sync_directory(path)
    sync_directory(directory)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
