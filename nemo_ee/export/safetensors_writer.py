# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A safetensors file written tensor by tensor: the header first, then each tensor's bytes; and the check of headers.

The `safetensors` library's own writer takes all tensors at once; here no more than one piece of one tensor is in
memory. Layout: 8 bytes little-endian header length, a JSON header padded with spaces to a multiple of 8, then the
tensors' bytes without gaps. The file has its name only once it is whole and on disk.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class SafetensorsWriter:
    """Writes one file; use it as a context manager.

    Args:
        path: the file; written to `<path>.partial` and renamed when the context ends without an exception.
        entries: name -> (dtype, shape), in the order in which the tensors will be written.

    Raises:
        ValueError: a dtype that is not float32, float16 or bfloat16.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.path = Path(path)
        self._entries = dict(entries)
        self._waiting = list(self._entries)
        self._header = _header(self._entries)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file: IO[bytes] | None = None

    def __enter__(self) -> SafetensorsWriter:
        self._file = open(self._partial, "wb")
        try:
            self._file.write(self._header)
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, name: str, chunks: Iterable[Tensor]) -> None:
        """Write the next tensor.

        Args:
            name: must be the next of `entries`.
            chunks: pieces that, one after the other in memory order, make up the tensor; each of the tensor's dtype.
        """
        assert self._file is not None, "used outside of its context"
        assert self._waiting and self._waiting[0] == name, f"{name} is not next; that is {self._waiting[:1]}"
        dtype, shape = self._entries[name]
        written = 0
        for chunk in chunks:
            assert chunk.dtype is dtype, f"{name}: a piece is {chunk.dtype}, the tensor {dtype}"
            self._file.write(memoryview(chunk.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
            written += chunk.numel()
        assert written == math.prod(shape), f"{name}: {written} elements written, {math.prod(shape)} declared"
        self._waiting.pop(0)

    def __exit__(self, kind: type | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        if problem is not None:
            self._abandon()
            return
        try:
            assert not self._waiting, f"not written: {', '.join(self._waiting[:4])}"
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


def _header(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
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


def header_problems(
    files: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[str]:
    """Where tensors are not what they must be.

    Args:
        files: name of every tensor -> the open safetensors file that holds it.
        shapes: name -> shape of every tensor that must be there.
        dtype: of all of them.
    """
    yield from (f"{name} is missing" for name in shapes if name not in files)
    yield from (f"{name} does not belong there" for name in sorted(files.keys() - shapes.keys()))
    for name in shapes.keys() & files.keys():
        stored = files[name].get_slice(name)
        if tuple(stored.get_shape()) != shapes[name]:
            yield f"{name} has shape {stored.get_shape()}, must be {list(shapes[name])}"
        if stored.get_dtype() != DTYPE_NAMES[dtype]:
            yield f"{name} is {stored.get_dtype()}, config.json says {DTYPE_NAMES[dtype]}"
