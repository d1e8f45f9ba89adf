# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Weighs the tokens of a step by what they are worth for the accepted length of their draft runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_ee.megatron.loss.accepted_length import accepted_length_weights, label_probabilities
from nemo_ee.megatron.model.exit_head import ExitHead
from nemo_ee.megatron.model.microbatch import MicroBatch, StageOutput
from nemo_ee.megatron.pipeline.exit_loss import exit_terms
from nemo_ee.megatron.pipeline.stage_context import StageContext


@dataclass
class DraftWeights:
    """A `Weigh` of a step's microbatches: the gradient of their weighted cross-entropy is that of -E, the expected
    number of accepted drafts under the exit as it is now.

    Attributes:
        runs: each microbatch and its draft runs, [r, k] indices into [b * s], b * s behind the end of a run; the
            labels there are the verifier's tokens.
        accepted: sum of E over the runs seen so far.
        num_runs: their number.
    """

    runs: Sequence[tuple[MicroBatch, Tensor]]
    accepted: float = 0.0
    num_runs: int = 0

    @property
    def expected(self) -> float:
        """Mean of E, 0 without runs."""
        return self.accepted / max(1, self.num_runs)

    @torch.no_grad()
    def __call__(self, context: StageContext, head: ExitHead, batch: MicroBatch, output: StageOutput) -> MicroBatch:
        """See `Weigh`. Every rank of the tensor-parallel group must call it."""
        (runs,) = (own for of, own in self.runs if of is batch)
        size, length = batch.tokens.shape
        with context.mixed_precision():
            inputs, weights = exit_terms(head, output.taps[head.exit.stop], batch, output.rotary_pos_emb)
        needed = runs[runs < size * length].unique()
        rows = needed % length * size + needed // length  # hidden states are [s, b]
        found = label_probabilities(
            [x[rows] for x in inputs],
            weights,
            batch.labels.flatten()[needed],
            vocabulary=context.model.vocabulary(),
            dtype=context.autocast,
            casts=context.casts,
            chunk_bytes=context.chunk_bytes,
        )
        probabilities = torch.zeros(size * length + 1, device=found.device)  # the last one: behind the end
        probabilities[needed] = found
        expected, shares = accepted_length_weights(probabilities[runs])
        self.accepted += float(expected.sum())
        self.num_runs += len(runs)
        mask = torch.zeros_like(probabilities).index_add_(0, runs.flatten(), shares.flatten())
        return replace(batch, loss_mask=mask[:-1].view(size, length))
