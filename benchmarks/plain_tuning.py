# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The baseline: exit tuning the plain way, on the same Megatron modules and the same numbers.

The method of EE-Tuning's reference implementation on one device (arXiv 2402.00518): the backbone runs without
gradients, every exit's logits are materialised in fp32, the graphs of all exits stay alive until one backward of the
summed loss, the final norm, output layer and its loss are computed although nobody trains on them, and one clipping
and one optimizer serve all exits. The cross-entropy is torch's own kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.microbatch import MicroBatch


class PlainTuning:
    """A tuning step on a full-depth model.

    Args:
        model: the whole model on one rank, without vocabulary padding.
        optim: lr, betas, eps, weight_decay of AdamW.
        max_norm: clipping of the gradients of all exits together.
    """

    def __init__(self, model: EarlyExitGPTModel, optim: dict, *, max_norm: float) -> None:
        assert model.true_vocab_size == model.vocab_size, "padding rows would take part in the softmax"
        self.model, self.max_norm = model, max_norm
        self.parameters = [p for p in model.exits.parameters() if p.requires_grad]
        options = {key: optim[key] for key in ("lr", "betas", "eps", "weight_decay")}
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True, **options)  # one kernel, as ours

    def __call__(self, batches: Sequence[MicroBatch]) -> float:
        """One step; returns the sum of the exits' losses per token."""
        self.optimizer.zero_grad()
        loss = sum(self._microbatch(batch, 1 / len(batches)) for batch in batches)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        return loss

    def _microbatch(self, batch: MicroBatch, scale: float) -> float:
        stage = self.model.forward_to_taps(batch)
        with torch.no_grad():
            _mean_loss(linear(stage.hidden, self.model.backbone_output_weight()), batch)
        total = torch.zeros(())
        for head in self.model.exits:
            hidden = head(stage.taps[head.exit.stop], rotary_pos_emb=stage.rotary_pos_emb)
            terms = [linear(inputs, weight) for inputs, weight in head.output_terms(hidden)]
            total = total + _mean_loss(reduce(torch.add, terms), batch)
            del terms
        total = total * scale
        total.backward()
        return total.item()


def _mean_loss(logits: Tensor, batch: MicroBatch) -> Tensor:
    """Mean cross-entropy over the tokens that count, of logits [s, b, v]."""
    labels, mask = batch.flat_labels()
    losses = cross_entropy(logits.float().flatten(0, 1), labels, reduction="none")  # [s * b]
    return (losses * mask).sum() / mask.sum()
