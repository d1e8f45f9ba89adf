# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: exp(i a_j(m)) for every position m, and the rotation of a pair of dimensions by it.

    (q[a] + i q[b]) * exp(i m f_j)     for pair j = (a, b) at position m (RoFormer, arXiv 2104.09864, equation 34)

The runtime stores the two dimensions of a pair side by side and multiplies complex numbers. Megatron keeps its own
order of dimensions and needs cosines and sines apart (`rotate`). Both read the same table.

Exactness: the table holds torch's own cos and sin of fp32 angles, so `rotate` equals Megatron's rotation bitwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_ee.generation.decoding_model import TokenPositions


class RotaryTable:
    """exp(i a) by position; grown on demand.

    Args:
        angles: number of positions -> angles `[length, r/2]`, fp32; r = rotated dimensions of a head.
        device: device of the table.
    """

    def __init__(self, angles: Callable[[int], Tensor], device: torch.device) -> None:
        self._angles, self._device = angles, device
        self._table = torch.empty(0, 0, dtype=torch.complex64, device=device)

    def at(self, positions: TokenPositions) -> Tensor:
        """The rotation of each row. Returns `[n, 1, r/2]`, complex64."""
        groups = positions.groups
        table = self._with_length(max((group.length for group in groups), default=0))
        if len(groups) == 1 and isinstance(groups[0].positions, range):
            return table[groups[0].positions.start : groups[0].length, None]
        return table[positions.position][:, None]

    def _with_length(self, length: int) -> Tensor:
        """The table with at least so many positions. Several threads may grow it at once; each gets a complete one."""
        table = self._table
        if length > table.shape[0]:
            angles = self._angles(max(length, 2 * table.shape[0], 256)).to(self._device)
            table = self._table = torch.complex(angles.cos(), angles.sin())
        return table


def cos_sin(rotation: Tensor, *, interleaved: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `rotate`.

    Args:
        rotation: `[n, 1, r/2]`, complex64, from `RotaryTable.at`.
        interleaved: see `rotate`.
        dtype: dtype of the result; values are rounded once, as Megatron does.

    Returns:
        Two `[n, 1, r]`; the sine of a pair's first dimension is negated.
    """
    cos, sin = rotation.real.to(dtype), rotation.imag.to(dtype)
    if interleaved:
        return cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate every pair of dimensions of each head by its angle.

    Args:
        heads: `[n, heads, d]`; dimensions past r are left alone.
        cos, sin: `[n, 1, r]` from `cos_sin`.
        interleaved: pairs are (0, 1), (2, 3), ...; otherwise (0, r/2), (1, r/2 + 1), ...

    Returns:
        `[n, heads, d]`.
    """
    size = cos.shape[-1]
    turned = heads if size == heads.shape[-1] else heads[..., :size]
    if interleaved:
        swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        swapped = turned.roll(size // 2, dims=-1)
    turned = turned * cos + swapped * sin
    return turned if size == heads.shape[-1] else torch.cat((turned, heads[..., size:]), dim=-1)
