# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Rotary positions as complex numbers: a pair of dimensions of a head is one number, turned by exp(i m f).

    (q[2j] + i q[2j+1]) * exp(i m f_j)     at position m (RoFormer, arXiv 2104.09864, equation 34)

Hugging Face pairs dimension j with j + d/2; the loader reorders the rows of the query and key projections once
(`pairs_together`), which changes no attention score, so that one multiplication turns all heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_ee.families.architecture import Architecture
from nemo_ee.generation.decoding_model import TokenPositions


def pairs_together(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection in the order j, j + d/2 within each head. `[heads * d, ...]` -> the same."""
    by_head = rows.unflatten(0, (-1, 2, head_dim // 2))  # [heads, 2, d/2, ...]
    return by_head.transpose(1, 2).reshape(rows.shape)


def inverse_frequencies(architecture: Architecture) -> Tensor:
    """The angle per position of each pair of dimensions of a head. Returns `[d/2]`, fp32.

    `linear` divides all of them by `factor`; `llama3` only the wavelengths beyond the original context length, with a
    blend between (Llama 3.1's own rule).
    """
    head_dim, scaling = architecture.kv_channels, architecture.rotary_scaling
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (architecture.rotary_base**exponents)
    if scaling is None:
        return frequencies
    if scaling["type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


class RotaryTable:
    """exp(i m f) by position, grown on demand.

    Args:
        frequencies: `[d/2]`, fp32, from `inverse_frequencies`.
        device: where the table is.
    """

    def __init__(self, frequencies: Tensor, device: torch.device) -> None:
        self._frequencies, self._device = frequencies.to(device), device
        self._table = torch.empty((0, len(frequencies)), dtype=torch.complex64, device=device)

    def at(self, positions: TokenPositions) -> Tensor:
        """For the positions' positions. Returns `[n, 1, d/2]`, complex64."""
        groups = positions.groups
        table = self._reaching(max(group.length for group in groups))
        if len(groups) == 1 and isinstance(groups[0].positions, range):
            return table[groups[0].positions.start : groups[0].length, None]
        return table[positions.position][:, None]

    def _reaching(self, length: int) -> Tensor:
        """The table with at least so many positions. Threads may grow it at the same time, each gets one that does."""
        table = self._table
        if length > table.shape[0]:
            length = max(length, 2 * table.shape[0], 256)
            angles = torch.arange(length, device=self._device).float()[:, None] * self._frequencies
            table = self._table = torch.polar(torch.ones_like(angles), angles)
        return table
