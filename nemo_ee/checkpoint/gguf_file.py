# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads the metadata and parts of the tensors of a GGUF file, dequantised by the `gguf` package.

The file is memory-mapped: only the rows that are read are dequantised.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SUFFIX = ".gguf"
_SPLIT = "split.count"
_BLOCK_NUMBERS = 4 << 20  # dequantised at a time
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def gguf_library() -> ModuleType:
    """The `gguf` package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError as missing:
        raise ValueError(f"GGUF files need the package gguf ({missing}); run pip install 'gguf>=0.17'") from None
    return gguf


class GgufFile:
    """A GGUF file; its tensors as in `huggingface_files.TensorFiles`, with torch's order of dimensions.

    Args:
        path: the file.
        dequantised: dtype of quantised tensors; float32 holds their numbers exactly. Others keep theirs.

    Attributes:
        metadata: key -> value. Floats are the shortest decimals of the stored fp32 numbers.

    Raises:
        ValueError: the package is not installed, or the file is damaged, in a newer format or one of several parts.
    """

    def __init__(self, path: str | Path, dequantised: torch.dtype = torch.float32) -> None:
        self.path, self._dequantised, self._library = Path(path), dequantised, gguf_library()
        if not self.path.is_file():
            raise ValueError(f"{path}: no such file; give a {SUFFIX} file, not the name of a hub")
        try:
            reader = self._library.GGUFReader(self.path)
            self.metadata: dict[str, Any] = {key: self._value(field) for key, field in reader.fields.items()}
        except Exception as problem:  # noqa: BLE001  of a damaged file the package may raise anything at all
            raise ValueError(
                f"{path}: damaged or no GGUF file ({type(problem).__name__}: {problem}); fetch it again"
            ) from problem
        if self.metadata.get(_SPLIT, 1) > 1:
            raise ValueError(
                f"{path}: one of {self.metadata[_SPLIT]} parts; join them with llama-gguf-split --merge first"
            )
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each tensor -> its shape."""
        return {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()}

    def names(self) -> set[str]:
        """The stored names."""
        return set(self._tensors)

    def file_of(self, name: str) -> str:
        """The name of the file."""
        return self.path.name

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype | str:
        """The dtype in which a tensor is read, or the name of its type if the package does not dequantise it."""
        kind = self._tensors[name].tensor_type
        return _FLOATS.get(kind.name) or (self._dequantised if self._is_readable(name) else kind.name)

    def read(self, name: str, ranges: tuple[tuple[int, int], ...]) -> Tensor:
        """The part [start, stop) of a tensor along every axis."""
        tensor, (rows, *columns) = self._tensors[name], ranges
        if not columns:
            return self._numbers(tensor, tensor.data)[slice(*rows)].to(self.dtype(name))
        part = torch.empty([stop - start for start, stop in ranges], dtype=self.dtype(name))
        step = max(_BLOCK_NUMBERS // self.shape(name)[1], 1)
        for start in range(rows[0], rows[1], step):
            stop = min(start + step, rows[1])
            block = self._numbers(tensor, tensor.data[start:stop])
            part[start - rows[0] : stop - rows[0]] = block[:, slice(*columns[0])]
        return part

    def stored(self, name: str) -> Any:
        """The stored array of a tensor: numbers of its type, or the bytes of its rows."""
        return self._tensors[name].data

    def _numbers(self, tensor: Any, data: Any) -> Tensor:
        return torch.from_numpy(self._library.dequantize(data.copy(), tensor.tensor_type))

    def _is_readable(self, name: str) -> bool:
        tensor = self._tensors[name]
        try:
            self._numbers(tensor, tensor.data[:1])
        except (NotImplementedError, ValueError):
            return False
        return True

    def _value(self, field: Any) -> Any:
        if field.types and field.types[0] is self._library.GGUFValueType.FLOAT32:
            return float(str(field.parts[-1][0]))
        return field.contents()
