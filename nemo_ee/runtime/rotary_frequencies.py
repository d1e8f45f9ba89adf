# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies of a Hugging Face config, and the order of dimensions that the runtime stores.

Hugging Face pairs dimension j with j + d/2. The loader reorders the rows of the query and key projections once
(`pairs_together`), which changes no attention score, so that one complex multiplication rotates all heads
(`nemo_ee.generation.rotary`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_ee.families.architecture import Architecture


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
