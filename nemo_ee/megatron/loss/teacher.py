# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The final exit as the teacher of earlier ones, chunk by chunk.

    q = softmax(z / T), z the final exit's logits; with top-k: q of the k most likely tokens, scaled to sum 1

Two forms, both small enough to travel from the last pipeline stage to earlier ones: the final hidden state, from which
a stage that holds the output weight forms all of q again, or the k token ids and their probabilities.

Shapes: n tokens, c of a chunk, h hidden, v padded vocabulary, k top.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from nemo_ee.megatron.loss.vocab_parallel import (
    VocabularyShard,
    chunk_bytes_on,
    chunk_logits,
    num_buffers,
    token_chunks,
)


class TeacherChunk(Protocol):
    """q of some tokens over this rank's part of the vocabulary."""

    log_total: Tensor  # [c] fp64, to be subtracted from `excess`

    def excess(self, values: Tensor, temperature: float) -> Tensor:
        """[c] sum over this shard of q * (ln q + log_total - values / T), values [c, v/tp].

        One sum of differences: two sums of which the difference is taken would lose the digits of a small divergence.
        """

    def subtract_from(self, grad: Tensor, factor: Tensor) -> None:
        """grad [c, v/tp] -= factor [c] * q, in place."""


class Teacher(Protocol):
    """q of all tokens of a microbatch."""

    num_buffers: int  # logit-sized buffers that a chunk and its comparison take

    def chunk(self, part: slice, vocabulary: VocabularyShard) -> TeacherChunk:
        """q of the tokens in `part`. Every rank of the tensor-parallel group must call it."""


@dataclass(frozen=True)
class _DenseChunk:
    probabilities: Tensor  # [c, v/tp]
    shifted: Tensor  # [c, v/tp] z / T less the largest of the whole vocabulary
    log_total: Tensor
    num_valid: int  # rows that are tokens

    def excess(self, values: Tensor, temperature: float) -> Tensor:
        difference = torch.sub(self.shifted, values, alpha=1.0 / temperature)
        difference[:, self.num_valid :] = 0.0  # padding has q = 0 and may be infinite after division by T
        return torch.einsum("cv,cv->c", self.probabilities, difference)

    def subtract_from(self, grad: Tensor, factor: Tensor) -> None:
        grad.addcmul_(self.probabilities, factor.unsqueeze(-1), value=-1.0)


@dataclass(frozen=True)
class _TopKChunk:
    rows: Tensor  # [c, k] rows of this shard
    probabilities: Tensor  # [c, k], 0 for tokens of other shards
    log_total: Tensor

    def excess(self, values: Tensor, temperature: float) -> Tensor:
        # xlogy: 0 for tokens of other shards
        expected = self.probabilities * values.gather(-1, self.rows)
        return (torch.xlogy(self.probabilities, self.probabilities) - expected / temperature).sum(dim=-1)

    def subtract_from(self, grad: Tensor, factor: Tensor) -> None:
        grad.scatter_add_(-1, self.rows, -factor.unsqueeze(-1) * self.probabilities)


@dataclass(frozen=True)
class FullTeacher:
    """All of q, formed again from the final hidden state.

    Attributes:
        hidden: [n, h] the final norm's output, the same on every tensor-parallel rank.
        weight: [v/tp, h] the backbone's output weight, in the dtype of the matrix product.
        temperature: T.
    """

    hidden: Tensor
    weight: Tensor
    temperature: float
    num_buffers: int = 3

    def chunk(self, part: slice, vocabulary: VocabularyShard) -> _DenseChunk:
        """See `Teacher`."""
        scaled = chunk_logits([self.hidden], [self.weight], part, self.weight.dtype, vocabulary)
        scaled.div_(self.temperature)
        peak = vocabulary.reduce(scaled.amax(dim=-1), ReduceOp.MAX).unsqueeze(-1)
        scaled.sub_(peak)
        probabilities = scaled.exp()
        total = vocabulary.reduce(probabilities.sum(dim=-1))
        log_total = total.double().log()
        return _DenseChunk(probabilities.div_(total.unsqueeze(-1)), scaled, log_total, vocabulary.num_valid)

    def formed(self, tokens: Tensor, vocabulary: VocabularyShard) -> FormedTeacher:
        """q of the tokens with these indices, [c], to be read by several exits. See `Teacher.chunk`."""
        own = replace(self, hidden=self.hidden[tokens])
        return FormedTeacher(own.chunk(slice(None), vocabulary), num_buffers=self.num_buffers)


@dataclass(frozen=True)
class FormedTeacher:
    """q of a chunk of tokens, formed already; see `FullTeacher.formed`."""

    whole: _DenseChunk
    num_buffers: int

    def chunk(self, part: slice, vocabulary: VocabularyShard) -> _DenseChunk:
        """See `Teacher`."""
        whole = self.whole
        return _DenseChunk(whole.probabilities[part], whole.shifted[part], whole.log_total[part], whole.num_valid)


@dataclass(frozen=True)
class TopKTeacher:
    """q of the k most likely tokens.

    Attributes:
        ids: [n, k] token ids, the same on every tensor-parallel rank.
        probabilities: [n, k] fp32, sum 1.
    """

    ids: Tensor
    probabilities: Tensor
    num_buffers: int = 0

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        *,
        top_k: int,
        temperature: float,
        vocabulary: VocabularyShard,
        chunk_bytes: int | None = None,
    ) -> TopKTeacher:
        """From the final hidden state. Every rank of the tensor-parallel group must call it.

        Args:
            hidden: [n, h] the final norm's output.
            weight: [v/tp, h] the backbone's output weight, in the dtype of the matrix product.
            top_k: k; at most the vocabulary's size.
            temperature: T.
            vocabulary: this rank's part of the vocabulary.
            chunk_bytes: size of one chunk of fp32 logits; None: see `chunk_bytes_on`.
        """
        rows, buffers = weight.shape[0], num_buffers(weight.dtype)
        chunk_bytes = chunk_bytes or chunk_bytes_on(hidden.device, rows, buffers=buffers)
        all_ids, all_logits = [], []
        for part in token_chunks(hidden.shape[0], rows, chunk_bytes, buffers=buffers):
            logits = chunk_logits([hidden], [weight], part, weight.dtype, vocabulary)
            logits, local = logits.topk(min(top_k, rows), dim=-1)
            logits, ids = vocabulary.gather(logits), vocabulary.gather(local + vocabulary.start)
            logits, places = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
            all_ids.append(ids.gather(-1, places))
            all_logits.append(logits)
        probabilities = torch.softmax(torch.cat(all_logits) / temperature, dim=-1)
        return cls(torch.cat(all_ids), probabilities)

    def chunk(self, part: slice, vocabulary: VocabularyShard) -> _TopKChunk:
        """See `Teacher`."""
        rows, here = vocabulary.local_ids(self.ids[part])
        probabilities = self.probabilities[part] * here
        return _TopKChunk(rows, probabilities, torch.zeros_like(probabilities[:, 0], dtype=torch.float64))
