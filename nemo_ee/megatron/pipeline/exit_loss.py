# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Forward, loss and backward of one exit on one microbatch: its graph lives here and nowhere else.

Losses travel as (sum, count) and are divided once, when they are logged (see `TokenSums`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ee.exits.objective import CROSS_ENTROPY, Objective
from nemo_ee.megatron.loss.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from nemo_ee.megatron.loss.teacher import Teacher
from nemo_ee.megatron.loss.vocab_parallel import VocabularyShard
from nemo_ee.megatron.model.exit_head import ExitHead


@dataclass(frozen=True)
class MicroBatch:
    """What a pipeline stage needs to know of one microbatch.

    Attributes:
        tokens: [b, s] int64 input ids.
        labels: [b, s] int64 ids of the next tokens.
        loss_mask: [b, s] float, 0 where a position does not count.
        position_ids: [b, s] int64.
        attention_mask: None for plain causal attention, else Megatron's boolean [b or 1, 1, s, s], True = masked.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Tensor | None], device: torch.device) -> MicroBatch:
        """From a batch of Megatron's GPT data sets, moved to `device`."""
        moved = {k: None if v is None else v.to(device, non_blocking=True) for k, v in batch.items()}
        return cls(
            moved["tokens"],
            moved["labels"],
            moved["loss_mask"].float(),
            moved["position_ids"],
            moved["attention_mask"],
        )

    def flat_labels(self) -> tuple[Tensor, Tensor]:
        """Labels and mask in the order of [s, b] hidden states, each [s * b]."""
        return self.labels.t().reshape(-1), self.loss_mask.t().reshape(-1)


def tune_exit(
    head: ExitHead,
    tap: Tensor,
    batch: MicroBatch,
    *,
    rotary_pos_emb: Tensor | None,
    vocabulary: VocabularyShard,
    grad_scale: float,
    objective: Objective = CROSS_ENTROPY,
    teacher: Teacher | None = None,
    autocast: torch.dtype | None = None,
) -> LinearCrossEntropy:
    """One exit's forward, loss and backward. Gradients are added to the head's parameters; none reaches the tap.

    Args:
        head: the exit.
        tap: [s, b, h] hidden state at its tap ([s/tp, b, h] under sequence parallelism).
        batch: the microbatch.
        rotary_pos_emb: the stage's rotary embedding, read by `layer` exits.
        vocabulary: this rank's part of the vocabulary.
        grad_scale: factor on the gradient of the summed loss.
        objective: what the loss is made of.
        teacher: the final exit's distributions, for objectives that have one.
        autocast: dtype of mixed precision, None for none.
    """
    with torch.enable_grad(), _autocast(tap, autocast):
        hidden = head(tap.detach(), attention_mask=batch.attention_mask, rotary_pos_emb=rotary_pos_emb)
        terms = [(x.flatten(0, 1), weight) for x, weight in head.output_terms(hidden)]
    inputs = [x for x, _ in terms]
    labels, mask = batch.flat_labels()
    result = linear_cross_entropy(
        inputs,
        [weight for _, weight in terms],
        labels,
        mask,
        vocabulary=vocabulary,
        objective=objective,
        teacher=teacher,
        grad_scale=grad_scale,
        dtype=autocast,
    )
    used = [(x, grad) for x, grad in zip(inputs, result.input_grads, strict=True) if grad is not None]
    # Megatron's linears restore autocast in their backward on CUDA only; on the CPU the backward has to run under it.
    in_backward = autocast if tap.device.type == "cpu" else None
    if used:
        with _autocast(tap, in_backward):
            torch.autograd.backward([x for x, _ in used], [grad for _, grad in used])
    return result


@torch.no_grad()
def evaluate_exit(
    head: ExitHead,
    tap: Tensor,
    batch: MicroBatch,
    *,
    rotary_pos_emb: Tensor | None,
    vocabulary: VocabularyShard,
    want_argmax: bool,
    objective: Objective = CROSS_ENTROPY,
    teacher: Teacher | None = None,
    autocast: torch.dtype | None = None,
) -> LinearCrossEntropy:
    """One exit's sums without gradients, entropy too; `want_argmax` adds its most likely tokens, [s * b].

    A teacher adds the divergence from it. See `tune_exit`.
    """
    with _autocast(tap, autocast):
        hidden = head(tap, attention_mask=batch.attention_mask, rotary_pos_emb=rotary_pos_emb)
        terms = head.output_terms(hidden)
    labels, mask = batch.flat_labels()
    return linear_cross_entropy(
        [x.flatten(0, 1) for x, _ in terms],
        [weight for _, weight in terms],
        labels,
        mask,
        vocabulary=vocabulary,
        objective=objective,
        teacher=teacher,
        want_argmax=want_argmax,
        want_entropy=True,
        dtype=autocast,
    )


def _autocast(tap: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(tap.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
