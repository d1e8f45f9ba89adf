# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of a tensor's values: NaN and infinities, and bytes that differ from the written ones.

`torch.save` writes a zip with a CRC-32 of every record, which `torch.load` does not check. Every tensor of a
distributed checkpoint is such a zip, so damage is found while it is read, in files of any age, without a further pass.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from typing import IO

import torch
from torch import Tensor

_SHOWN = 20


def load_checked(stream: IO[bytes], *, check: bool) -> Tensor:
    """Read a tensor that `torch.save` wrote, without running code in it.

    Args:
        stream: seekable stream with the tensor alone.
        check: whether its bytes are compared with the stored checksums.

    Raises:
        ValueError: the bytes differ from the written ones.
        Exception: a damaged file may raise any exception.
    """
    tensor = torch.load(stream, map_location="cpu", weights_only=True)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"there is a {type(tensor).__name__}, not a tensor")
    if check:
        stream.seek(0)
        with zipfile.ZipFile(stream) as records:
            _compare_checksums(records, tensor)
    return tensor


def _compare_checksums(records: zipfile.ZipFile, tensor: Tensor) -> None:
    infos = records.infolist()
    if not any(info.CRC for info in infos):
        return  # written with torch.serialization.set_crc32_options(False)
    for info in infos:
        if not info.filename.endswith("/data/0"):
            records.read(info)  # compares the checksum
            continue
        content = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        if zlib.crc32(memoryview(content.numpy())) != info.CRC:
            raise ValueError("its bytes do not have the checksum that was stored with them")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities; one pass without a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def non_finite_message(file: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """One message about all tensors that are not finite.

    Args:
        file: the file or directory that holds them, for the message.
        tensors: pairs of (name with its file, values), read one after the other.
    """
    found = []
    for name, tensor in tensors:
        if not is_finite(tensor):
            nan, size = int(tensor.isnan().sum()), tensor.numel()
            found.append(f"{name}: {nan} NaN and {int(tensor.isinf().sum())} infinite of {size} numbers")
    more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    listed = "\n  ".join(found[:_SHOWN])
    return (
        f"{file} holds weights that are not finite:\n  {listed}{more}\n"
        "No model computes with them; get the file again, or take a checkpoint from before the training diverged."
    )
