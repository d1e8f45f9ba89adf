# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The expected number of accepted drafts, as token weights of the label's cross-entropy.

A draft run proposes up to k tokens. With p_i the exit's probability of the verifier's i-th token, and drafts drawn
from the exit, the first i of them are accepted with probability p_1 ... p_i:

    E = sum_i prod_{j <= i} p_j          dE / d ln p_j = sum_{i >= j} prod_{l <= i} p_l =: w_j

So the gradient of E is that of sum_j w_j ln p_j with w as constants. It is exact: no draft has to be drawn for it, and
the runs need not be those of the present exit. (DVI, arXiv 2510.05421, estimates it from the drawn ones.)

Shapes: r runs, k longest run, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_ee.megatron.loss.vocab_parallel import (
    VocabularyShard,
    chunk_bytes_on,
    chunk_logits,
    label_and_total,
    num_buffers,
    token_chunks,
)
from nemo_ee.megatron.loss.weight_casts import WeightCasts


def accepted_length_weights(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Expected accepted drafts of each run, and the weight of each of its tokens.

    Args:
        probabilities: [r, k] fp32, 0 behind the end of a run.

    Returns:
        [r] E, and [r, k] w; both 0 behind the end of a run.
    """
    accepted = probabilities.cumprod(dim=-1)
    return accepted.sum(dim=-1), accepted.flip(-1).cumsum(dim=-1).flip(-1)


@torch.no_grad()
def label_probabilities(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    labels: Tensor,
    *,
    vocabulary: VocabularyShard,
    dtype: torch.dtype | None = None,
    casts: WeightCasts | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """[n] fp32 probability of each label. Every rank of the tensor-parallel group must call it.

    See `linear_cross_entropy` for the arguments.
    """
    dtype = dtype or inputs[0].dtype
    cast = (casts or WeightCasts()).of(weights, dtype)
    height, buffers = weights[0].shape[0], num_buffers(dtype)
    size = chunk_bytes or chunk_bytes_on(labels.device, height, buffers=buffers)
    found = torch.empty(len(labels), dtype=torch.float32, device=labels.device)
    for part in token_chunks(len(labels), height, size, buffers=buffers):
        logits = chunk_logits(inputs, cast, part, dtype, vocabulary)
        _, label, total = label_and_total(logits, labels[part], vocabulary)
        found[part] = label.exp() / total
    return found
