# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Opens a `.nemo` to read its weights, and gives its files as a directory to code that needs one.

Weights are read in place in the archive. A tokenizer, and all of a compressed archive, are unpacked into a temporary
folder; the next start removes folders of killed processes. A folder belongs to the process that holds its lock
(`flock`), which the kernel releases when the process ends for any reason. A process number in the name would not
identify the process: containers that share a temporary directory number their processes separately.
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

# Earlier versions wrote `nemo_ee-*` without a lock. Those look like folders in use and are not removed.
PREFIX = "nemo_ee.unpacked-"


@contextlib.contextmanager
def open_nemo(path: str | Path) -> Iterator[NemoArchive]:
    """A `.nemo` whose folders can be read in place; see `readable`.

    Raises:
        ValueError: see `NemoArchive` and `NemoArchive.extract`.
    """
    with NemoArchive(path) as archive, readable(archive) as found:
        yield found


@contextlib.contextmanager
def readable(archive: NemoArchive) -> Iterator[NemoArchive]:
    """An open archive whose folders can be read in place; only a compressed one is unpacked for that.

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
    afterwards, or by the next start if this process is killed.

    Raises:
        ValueError: see `NemoArchive.extract`; also for an error that a file in it caused, with the archive's name.
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
        except FileNotFoundError:  # another start removed the folder before it had its lock
            continue
        with contextlib.suppress(OSError):  # on a file system without locks no other process removes the folder
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
