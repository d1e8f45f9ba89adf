# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes a safetensors file tensor by tensor (the header, then each tensor's bytes), and checks headers.

The writer of the `safetensors` library needs all tensors at once; this one needs one piece of one tensor in
memory. Layout: 8 bytes little-endian header length, a JSON header padded with spaces to a multiple of 8, then the
tensors' bytes without gaps. The file gets its name only when it is complete and on disk.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from nemo_ee.checkpoint.atomic import atomic_file
from nemo_ee.checkpoint.fingerprint import tensor_bytes

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> (dtype, shape)


@contextlib.contextmanager
def safetensors_file(path: Path, entries: Entries) -> Iterator[SafetensorsWriter]:
    """Write one file; see `atomic_file`.

    Args:
        entries: dtypes and shapes by name, in the order in which the tensors will be written.

    Raises:
        ValueError: a dtype that is not float32, float16 or bfloat16.
        OSError: the file cannot be written.
    """
    header = _header(entries)
    with atomic_file(path) as partial, open(partial, "wb") as file:
        file.write(header)
        writer = SafetensorsWriter(file, entries)
        yield writer
        assert not writer.remaining, f"not written: {', '.join(writer.remaining[:4])}"


class SafetensorsWriter:
    """Writes the tensors of one file in their order; see `safetensors_file`."""

    def __init__(self, file: IO[bytes], entries: Entries) -> None:
        self._file, self._entries = file, entries
        self.remaining = list(entries)

    def write(self, name: str, chunks: Iterable[Tensor]) -> None:
        """Write the next tensor.

        Args:
            name: name of the tensor; it must be the next of `entries`.
            chunks: consecutive pieces of the tensor in memory order, in the tensor's dtype.
        """
        assert self.remaining and self.remaining[0] == name, f"{name} is not next; that is {self.remaining[:1]}"
        dtype, shape = self._entries[name]
        written = 0
        for chunk in chunks:
            assert chunk.dtype is dtype, f"{name}: a piece is {chunk.dtype}, the tensor {dtype}"
            self._file.write(tensor_bytes(chunk))
            written += chunk.numel()
        assert written == math.prod(shape), f"{name}: {written} elements written, {math.prod(shape)} declared"
        self.remaining.pop(0)


def _header(entries: Entries) -> bytes:
    wrong = sorted({str(dtype) for dtype, _ in entries.values() if dtype not in DTYPE_NAMES})
    if wrong:
        raise ValueError(f"cannot write {', '.join(wrong)}; only float32, float16 and bfloat16")
    header: dict = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in entries.items():
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def header_problems(file: Any, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Iterator[str]:
    """Problems of the tensors of an open safetensors file.

    Args:
        shapes: name -> shape of every tensor that must be there.
        dtype: dtype that all of them must have.
    """
    stored = set(file.keys())
    yield from (f"{name} is missing" for name in shapes if name not in stored)
    yield from (f"{name} does not belong there" for name in sorted(stored - shapes.keys()))
    for name in sorted(shapes.keys() & stored):
        tensor = file.get_slice(name)
        if tuple(tensor.get_shape()) != shapes[name]:
            yield f"{name} has shape {tensor.get_shape()}, must be {list(shapes[name])}"
        if tensor.get_dtype() != DTYPE_NAMES[dtype]:
            yield f"{name} is {tensor.get_dtype()}, but {DTYPE_NAMES[dtype]} in config.json"
