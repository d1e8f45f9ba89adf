# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Opening a `.nemo` to read its weights, and its files as a directory for code that needs one.

Weights are read where they lie in the archive. What has to be unpacked (a tokenizer, all of a compressed archive) goes
to a temporary folder; the next start removes those of processes that were killed. A folder belongs to the process that
holds its lock (`flock`), which the kernel releases when the process ends, however it ends. A process number in the
name would not do: containers that share a temporary directory count their processes apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_ee.checkpoint.nemo_archive import NemoArchive

# Earlier versions wrote `nemo_ee-*` without a lock, so those cannot be told from folders in use and stay.
PREFIX = "nemo_ee.unpacked-"


@contextlib.contextmanager
def open_nemo(path: str | Path) -> Iterator[NemoArchive]:
    """A `.nemo` whose folders can be read where they lie; see `readable`.

    Raises:
        ValueError: see `NemoArchive` and `NemoArchive.extract`.
    """
    with NemoArchive(path) as archive, readable(archive) as found:
        yield found


@contextlib.contextmanager
def readable(archive: NemoArchive) -> Iterator[NemoArchive]:
    """An open archive, whose folders can be read where they lie; only a compressed one is unpacked for that.

    Raises:
        ValueError: see `NemoArchive.extract`.
    """
    if not archive.is_compressed:
        yield archive
        return
    with unpacked(archive) as directory:
        yield NemoArchive(archive.path, unpacked=directory)


@contextlib.contextmanager
def unpacked(archive: NemoArchive, prefixes: Sequence[str] | None = None) -> Iterator[Path]:
    """The files of an archive as a directory, for code that needs one.

    A directory is used in place. An archive is unpacked (only `prefixes`) into a temporary directory, which is removed
    afterwards, or by the next start where this process is killed.

    Raises:
        ValueError: see `NemoArchive.extract`; or what a file in it caused, under the archive's name.
    """
    directory = archive.directory
    if directory is not None:
        yield directory
        return
    with temporary_folder() as directory:
        archive.extract(directory, prefixes)
        try:
            yield directory
        except Exception as problem:
            text = str(problem)
            if str(directory) not in text:
                raise
            text = text.replace(f"{directory}/", "").replace(str(directory), "it")
            raise ValueError(
                f"{archive.path}: a file in it cannot be used ({text}); fetch or save it again."
            ) from problem


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder in the temporary directory (TMPDIR), removed when the context ends; after a kill, at the next call."""
    _remove_abandoned(Path(tempfile.gettempdir()))
    folder, lock = _locked_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another start took it for abandoned before the lock was there
            continue
        with contextlib.suppress(OSError):  # a file system without locks: nobody removes the folder either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_abandoned(directory: Path) -> None:
    """Remove this user's folders that no process holds."""
    for folder in directory.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
