# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Weighs the tokens of a microbatch by what they are worth for the accepted length of its draft runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nemo_ee.megatron.loss.accepted_length import accepted_length_weights, label_probabilities
from nemo_ee.megatron.model.exit_head import ExitHead
from nemo_ee.megatron.model.microbatch import MicroBatch, StageOutput
from nemo_ee.megatron.pipeline.exit_loss import exit_terms
from nemo_ee.megatron.pipeline.stage_context import StageContext


@dataclass
class DraftWeights:
    """A `Weigh` of one microbatch: the gradient of its weighted cross-entropy is that of -E, the expected number of
    accepted drafts under the exit as it is now.

    Attributes:
        runs: [r, k] indices into [b * s], b * s behind the end of a run; the labels there are the verifier's tokens.
        expected: E per run, a number for each call.
    """

    runs: Tensor
    expected: list[float] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, context: StageContext, head: ExitHead, batch: MicroBatch, output: StageOutput) -> MicroBatch:
        """See `Weigh`. Every rank of the tensor-parallel group must call it."""
        size, length = batch.tokens.shape
        with context.mixed_precision():
            inputs, weights = exit_terms(head, output.taps[head.exit.stop], batch, output.rotary_pos_emb)
        needed = self.runs[self.runs < size * length].unique()
        rows = needed % length * size + needed // length  # hidden states are [s, b]
        found = label_probabilities(
            [x[rows] for x in inputs],
            weights,
            batch.labels.flatten()[needed],
            vocabulary=context.model.vocabulary(),
            dtype=context.autocast,
            chunk_bytes=context.chunk_bytes,
        )
        probabilities = torch.zeros(size * length + 1, device=found.device)  # the last one: behind the end
        probabilities[needed] = found
        expected, shares = accepted_length_weights(probabilities[self.runs])
        self.expected.append(float(expected.mean()) if len(expected) else 0.0)
        mask = torch.zeros_like(probabilities).index_add_(0, self.runs.flatten(), shares.flatten())
        return replace(batch, loss_mask=mask[:-1].view(size, length))
