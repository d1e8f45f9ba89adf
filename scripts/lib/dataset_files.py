# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The files of a data set: the check before writing, and temporary names until all are complete."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nemo_ee.checkpoint.atomic import atomic_file
from nemo_ee.text.text_files import sample_index_folder


def existing_problems(finished: list[Path]) -> list[str]:
    """The problems of writing to these files when none may be replaced."""
    existing = [str(path) for path in finished if path.exists()]
    if not existing:
        return []
    return [f"output: {' and '.join(existing)} exist already; choose another prefix or set overwrite=True"]


@contextmanager
def replacing(finished: list[Path]) -> Iterator[list[Path]]:
    """Temporary names, which become those of `finished` together when the block succeeds, and vanish otherwise.

    Args:
        finished: data and index files in turn, the index that is read first at the end.
    """
    with ExitStack() as stack:
        # The index is removed first and written last, so there is never an index that belongs to other data.
        partial = [stack.enter_context(atomic_file(path)) for path in reversed(finished)]
        yield partial[::-1]
        finished[-1].unlink(missing_ok=True)


def forget_samples(prefix: str) -> None:
    """Remove the order of samples that Megatron has cached for the data that is about to be replaced."""
    folder = sample_index_folder(prefix)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or not empty
        folder.parent.rmdir()
        folder.parent.parent.rmdir()
