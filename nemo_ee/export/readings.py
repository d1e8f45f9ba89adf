# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Readings of an export in any format: one canonical tensor of one layer, and the tensors written from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_ee.export.content_digest import ContentDigest
from nemo_ee.export.safetensors_writer import DTYPE_NAMES, safetensors_file
from nemo_ee.export.source import EarlyExitSource, Origin, row_blocks
from nemo_ee.families.tensors import OUTPUT, WORDS


@dataclass(frozen=True)
class WrittenTensor:
    """One tensor of a file, made of rows and columns of a canonical tensor.

    Attributes:
        name, shape: name and shape in the file.
        rows: ranges of the canonical tensor's rows, from top to bottom.
        columns: range of its columns; None = all.
        zeros_above, zeros_below: number of zero rows above and below them.
        transposed: whether the file holds the transpose.
        pairs: size of a head whose rows the file holds in pairs, see `families.tensors.Stored`; 0 = in their order.
        file: name of the file in its directory.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None = None
    zeros_above: int = 0
    zeros_below: int = 0
    transposed: bool = False
    pairs: int = 0
    file: str = ""

    def chunks(self, tensor: Tensor) -> Iterator[Tensor]:
        """The tensor in blocks of rows, cut from the canonical tensor."""
        if self.transposed:
            yield torch.cat([tensor[start:stop] for start, stop in self.rows]).t()
            return
        if self.pairs:
            by_head = torch.cat([tensor[start:stop] for start, stop in self.rows])
            yield by_head.unflatten(0, (-1, 2, self.pairs // 2)).transpose(1, 2).flatten(0, 2)
            return
        if self.zeros_above:
            yield torch.zeros((self.zeros_above, *self.shape[1:]), dtype=tensor.dtype)
        for start, stop in self.rows:
            rows = tensor[start:stop]
            rows = rows if self.columns is None else rows[:, slice(*self.columns)]
            for first, last in row_blocks(tuple(rows.shape)):
                yield rows[first:last]
        if self.zeros_below:
            yield torch.zeros((self.zeros_below, *self.shape[1:]), dtype=tensor.dtype)


@dataclass(frozen=True)
class Reading:
    """One canonical tensor of one layer, and the tensors written from it. `fill`: the constant that it must be if none
    is written."""

    origin: Origin
    shape: tuple[int, ...]
    written: tuple[WrittenTensor, ...]
    fill: float | None = None

    @property
    def num_elements(self) -> int:
        """Number of elements of the tensors written from it."""
        return sum(math.prod(written.shape) for written in self.written)

    def in_files(self, file_of: Callable[[str], str]) -> Reading:
        """The reading with the file of each tensor; `file_of`: name of a tensor -> its file."""
        return replace(self, written=tuple(replace(own, file=file_of(own.name)) for own in self.written))


def joined(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same rows in the same order, with adjacent ranges merged."""
    result: list[tuple[int, int]] = []
    for start, stop in ranges:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return tuple(result)


def shapes_by_file(plan: Sequence[Reading]) -> dict[str, dict[str, tuple[int, ...]]]:
    """File -> name -> shape of its tensors, in the order of the file."""
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for reading in plan:
        for written in reading.written:
            files.setdefault(written.file, {})[written.name] = written.shape
    return files


def write_weights(
    folder: Path,
    plan: Sequence[Reading],
    source: EarlyExitSource,
    dtype: torch.dtype,
    on_bytes: Callable[[int], Any],
    digest: ContentDigest | None,
) -> None:
    """Write the files of a plan, all of them open at once and one canonical tensor in memory.

    Args:
        on_bytes: called with the number of bytes written.
        digest: gets every tensor; None = no digest.
    """
    with ExitStack() as stack:
        writers = {}
        for file, shapes in shapes_by_file(plan).items():
            entries = {name: (dtype, shape) for name, shape in shapes.items()}
            writers[file] = stack.enter_context(safetensors_file(folder / file, entries))
        for reading in plan:
            if reading.written:
                _write_reading(writers, reading, source.read(reading.origin, reading.shape, dtype), digest)
            on_bytes(reading.num_elements * dtype.itemsize)


def _write_reading(writers: dict[str, Any], reading: Reading, tensor: Tensor, digest: ContentDigest | None) -> None:
    for written in reading.written:
        chunks = written.chunks(tensor)
        if digest is not None:
            chunks = digest.passing(written.name, DTYPE_NAMES[tensor.dtype], written.shape, chunks)
        writers[written.file].write(written.name, chunks)


def check_tensors(source: EarlyExitSource, plans: Sequence[Sequence[Reading]], *, tied: bool) -> None:
    """Compare the tensors to read with those in the source.

    Args:
        plans: readings of the directories, and those of the whole backbone.
        tied: whether the output projection is the word embeddings; a stored one is then not read.

    Raises:
        ValueError: tensors are missing or have another shape, or no tensor is written from a tensor of the backbone.
    """
    problems, read = [], set()
    for reading in {reading.origin: reading for plan in plans for reading in plan}.values():
        origin, shape = reading.origin, source.shape(reading.origin)
        where = f"{origin.key}" if origin.layer is None else f"{origin.key} of layer {origin.layer + 1}"
        if origin.part == "backbone":
            read.add(origin.key)
        # Vocabulary matrices have padding rows that are not exported; exits and backbone may differ in their number.
        padded = origin.part == "output" or origin.key in (WORDS, OUTPUT)
        if shape is None:
            problems.append(f"{where} is missing")
        elif shape != reading.shape and not (
            padded and shape[1:] == reading.shape[1:] and shape[0] >= reading.shape[0]
        ):
            problems.append(f"{where} has shape {list(shape)}, must be {list(reading.shape)}")
    tied_output = {OUTPUT} if tied else set()
    unknown = sorted(source.backbone_names() - read - tied_output)
    if unknown:
        problems.append(f"the backbone holds tensors that no stock class has: {', '.join(unknown)}")
    if problems:
        raise ValueError(f"{source.path}: config and weights do not fit together:\n" + "\n".join(problems))
