# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""An output directory that is whole or not there: written under another name, synced, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_ee.checkpoint.nemo_archive import sync_directory


def output_problems(output: Path) -> list[str]:
    """Why a directory cannot be written, before anything is."""
    problems = []
    if output.is_dir() and any(output.iterdir()):
        problems.append(f"output={output} is not empty; name a new directory")
    elif output.exists() and not output.is_dir():
        problems.append(f"output={output} is a file; name a new directory")
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        problems.append(f"output={output} cannot be written: {above} is no directory or not writable; choose another")
    return problems


@contextlib.contextmanager
def whole_directory(output: Path, num_bytes: int) -> Iterator[Path]:
    """`<output>.partial` to write to; it gets its name when the context ends without an exception, else it is
    removed, with the parents made for it. A killed process leaves `<output>.partial`; the next export removes it.

    Args:
        output: absent, or an empty directory.
        num_bytes: about what will be written.

    Raises:
        ValueError: not enough space, or a disk that does not take the files.
    """
    output = output.absolute()
    partial = output.with_name(output.name + ".partial")
    made = [parent for parent in partial.parents if not parent.exists()]
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if num_bytes > free:
            raise ValueError(f"output={output} needs {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there")
        yield partial
        _sync(partial)
        if output.is_dir():
            output.rmdir()
        os.replace(partial, output)
        sync_directory(output.parent)
    except OSError as problem:
        _remove(partial, made)
        raise ValueError(f"output={output} could not be written ({problem}); nothing was left there") from problem
    except BaseException:
        _remove(partial, made)
        raise


def _remove(partial: Path, made: list[Path]) -> None:
    """The directory, and the parents that were made for it, nearest first, unless somebody else uses them by now."""
    shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):
        for parent in made:
            parent.rmdir()


def _sync(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            sync_directory(path)
    sync_directory(directory)
