# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes a GGUF file with the `gguf` package, one tensor in memory at a time.

Vectors (norms, biases) and positions are fp32, which llama.cpp needs. Matrices have the wanted type; `q8_0` needs rows
of a multiple of 32 numbers, and matrices with other rows are fp16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_ee.checkpoint.atomic import atomic_file
from nemo_ee.checkpoint.gguf_file import gguf_library
from nemo_ee.export.readings import Reading, WrittenTensor
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.families.gguf_metadata import ARCHITECTURE
from nemo_ee.families.tensors import POSITIONS

# Setting -> the type of the matrices, and the number of the file's type in `general.file_type`.
KINDS = {"float32": ("F32", 0), "float16": ("F16", 1), "q8_0": ("Q8_0", 7), "bfloat16": ("BF16", 32)}
_READ_IN = {"F16": torch.float16, "BF16": torch.bfloat16}  # others in fp32
_BLOCK = 32  # numbers with one scale in Q8_0


@dataclass(frozen=True)
class GgufArtifact:
    """One file to write.

    Attributes:
        name: name of the file.
        metadata: its keys; whole numbers are stored as uint32, floats as float32.
        plan: readings of its tensors.
        extra: further vectors, fp32.
        entry: its entry in the manifest.
    """

    name: str
    metadata: dict[str, Any]
    plan: list[Reading]
    extra: Mapping[str, Sequence[float]]
    entry: Mapping[str, Any] = field(default_factory=dict)


def kind_of(reading: Reading, dtype: str) -> str:
    """The type in which a reading's tensors are stored."""
    if len(reading.shape) == 1 or reading.origin.key == POSITIONS:
        return "F32"
    kind = KINDS[dtype][0]
    return "F16" if kind == "Q8_0" and reading.shape[-1] % _BLOCK else kind


def read_for(source: EarlyExitSource, reading: Reading, kind: str) -> Tensor:
    """The canonical tensor in the dtype from which `packed` makes a type."""
    return source.read(reading.origin, reading.shape, _READ_IN.get(kind, torch.float32))


def packed(written: WrittenTensor, tensor: Tensor, kind: str) -> Any:
    """The stored array of a tensor, cut from its canonical tensor (see `read_for`)."""
    whole = torch.cat(list(written.chunks(tensor))).contiguous()
    if kind == "Q8_0":
        library = gguf_library()
        return library.quantize(whole.numpy(), library.GGMLQuantizationType.Q8_0)
    return (whole.view(torch.uint8) if whole.dtype is torch.bfloat16 else whole).numpy()


def num_bytes(plan: Sequence[Reading], dtype: str) -> int:
    """About the size of a file in bytes."""
    sizes = {"F32": 4.0, "F16": 2.0, "BF16": 2.0, "Q8_0": 34 / 32}
    return int(sum(reading.num_elements * sizes[kind_of(reading, dtype)] for reading in plan))


def write_gguf(
    folder: Path, artifact: GgufArtifact, source: EarlyExitSource, dtype: str, on_bytes: Callable[[int], Any]
) -> None:
    """Write a file; it gets its name when it is complete.

    Args:
        dtype: a key of `KINDS`.
        on_bytes: called with the number of bytes written.
    """
    library, readings = gguf_library(), [reading for reading in artifact.plan if reading.written]
    vectors = {name: np.array(values, np.float32) for name, values in artifact.extra.items()}
    with atomic_file(folder / artifact.name) as partial:
        writer = library.GGUFWriter(partial, artifact.metadata[ARCHITECTURE])
        _add_keys(writer, artifact.metadata)
        for name, values in vectors.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for reading in readings:
            kind = library.GGMLQuantizationType[kind_of(reading, dtype)]
            block, size = library.GGML_QUANT_SIZES[kind]
            for own in reading.written:
                stored = math.prod(own.shape) // block * size
                writer.add_tensor_info(own.name, own.shape, np.dtype(np.float32), stored, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in vectors.values():
            writer.write_tensor_data(values)
        for reading in readings:
            kind = kind_of(reading, dtype)
            tensor = read_for(source, reading, kind)
            for own in reading.written:
                array = packed(own, tensor, kind)
                writer.write_tensor_data(array)
                on_bytes(array.nbytes)
        writer.close()


def _add_keys(writer: Any, metadata: Mapping[str, Any]) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if key != ARCHITECTURE:  # the writer has it
            adders.get(type(value), writer.add_array)(key, value)
