# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The writer against the safetensors library's own reader, bitwise; and what an unfinished file leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_ee.export.safetensors_writer import SafetensorsWriter, safetensors_file

TENSORS = {
    "b.weight": torch.randn(7, 5, dtype=torch.float32),
    "a.weight": torch.randn(3, 4).to(torch.bfloat16),
    "half": torch.randn(11).to(torch.float16),
    "empty": torch.zeros(0, 4),
}
ENTRIES = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_what_is_written_reads_back_bitwise(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with safetensors_file(path, ENTRIES) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor.split(2))
        assert not path.exists(), "the name appears when the file is whole"
    read = load_file(path)
    assert list(tmp_path.iterdir()) == [path] and read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype is tensor.dtype and torch.equal(read[name], tensor)


def test_pieces_that_are_no_contiguous_rows(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    with safetensors_file(tmp_path / "x.safetensors", {"x": (torch.float32, (4, 3))}) as writer:
        writer.write("x", (whole[start : start + 2, 1:4] for start in (0, 2)))
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], whole[:, 1:4])


def _in_another_order(writer: SafetensorsWriter) -> None:
    writer.write("half", [TENSORS["half"]])


def _too_little(writer: SafetensorsWriter) -> None:
    writer.write("b.weight", [TENSORS["b.weight"][:3]])


def _another_dtype(writer: SafetensorsWriter) -> None:
    writer.write("b.weight", [TENSORS["b.weight"].half()])


def _not_all(writer: SafetensorsWriter) -> None:
    writer.write("b.weight", [TENSORS["b.weight"]])


def _interrupted(writer: SafetensorsWriter) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("work", [_in_another_order, _too_little, _another_dtype, _not_all, _interrupted])
def test_an_unfinished_file_leaves_nothing(work, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, KeyboardInterrupt)), safetensors_file(tmp_path / "x", ENTRIES) as writer:
        work(writer)
    assert list(tmp_path.iterdir()) == []


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot write torch.int64; only float32, float16 and bfloat16"):
        safetensors_file(tmp_path / "x", {"x": (torch.int64, (1,))}).__enter__()
    assert list(tmp_path.iterdir()) == []
