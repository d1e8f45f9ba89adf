# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a piece of work, recorded and timed alone: no step of the same method is faster."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import wait_for
from nemo_ee.planning.operation_trace import flops_of


class MatrixProducts(TorchDispatchMode):
    """Records the matrix products, and attention in one call, that run inside the block, and runs the like alone."""

    _KINDS = ("mm", "addmm", "bmm", "baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[tuple, int] = {}  # (function, operands) -> calls
        self._flops = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        kind, flops = function.__name__.split(".")[0].rstrip("_"), flops_of(function, args, kwargs or {}, result)
        if flops or kind in self._KINDS:
            if kind in self._KINDS:
                function, args = None, [a for a in args if isinstance(a, torch.Tensor)][-2:]
            key = function, tuple(_layout_of(value) for value in args)
            self.counts[key] = self.counts.get(key, 0) + 1
            self._flops += flops
        return result

    def flop(self) -> float:
        """Floating-point operations of all that was recorded."""
        return self._flops

    def replay(self) -> float:
        """Seconds of all that was recorded, each shape and memory layout timed on its own."""
        total = 0.0
        for (function, operands), count in self.counts.items():
            args = [_random_like(*value) if isinstance(value, _Layout) else value for value in operands]
            more = {}
            if function is None:
                function = torch.bmm if args[0].dim() == 3 else torch.mm
                more = {"out": function(*args)}  # no fresh pages to touch
            repeats, device = min(count, 8), next(value.device for value in args if isinstance(value, torch.Tensor))
            wait_for(device)
            start = time.perf_counter()
            for _ in range(repeats):
                function(*args, **more)
            wait_for(device)
            total += count / repeats * (time.perf_counter() - start)
        return total


class _Layout(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _layout_of(value: object) -> object:
    """What a tensor is like; anything else is itself."""
    if not isinstance(value, torch.Tensor):
        return tuple(value) if isinstance(value, list) else value
    return _Layout(tuple(value.shape), tuple(value.stride()), value.dtype, value.device)


def _random_like(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of that layout; strides may be 0 or not in order."""
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return torch.randn(extent, dtype=dtype, device=device).as_strided(shape, stride)
