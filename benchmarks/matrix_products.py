# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a piece of work, recorded and timed alone: no step of the same method is faster."""

from __future__ import annotations

import math
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import wait_for


class MatrixProducts(TorchDispatchMode):
    """Records the matrix products that run inside the block, and runs products of the same shapes alone."""

    _KINDS = ("mm", "addmm", "bmm", "baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[tuple, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0].rstrip("_")
        if name in self._KINDS:
            left, right = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            key = tuple((tuple(t.shape), tuple(t.stride()), t.dtype, t.device) for t in (left, right))
            self.counts[key] = self.counts.get(key, 0) + 1
        return function(*args, **(kwargs or {}))

    def flop(self) -> float:
        """Floating-point operations of all recorded products."""
        return sum(2 * math.prod(left[0]) * right[0][-1] * count for (left, right), count in self.counts.items())

    def replay(self) -> float:
        """Seconds of all recorded products, each shape and memory layout timed on its own."""
        total = 0.0
        for operands, count in self.counts.items():
            left, right = (_random_like(*operand) for operand in operands)
            product = torch.bmm if left.dim() == 3 else torch.mm
            result, repeats = product(left, right), min(count, 8)
            wait_for(left.device)
            start = time.perf_counter()
            for _ in range(repeats):
                product(left, right, out=result)
            wait_for(left.device)
            total += count / repeats * (time.perf_counter() - start)
        return total


def _random_like(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of that layout; strides may be 0 or not in order."""
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return torch.randn(extent, dtype=dtype, device=device).as_strided(shape, stride)
