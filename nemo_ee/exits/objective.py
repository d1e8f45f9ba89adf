# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The training objective of an exit: labels, the final exit of the same forward pass, or both.

    loss_i = w_i (a CE_i + b T^2 KL(q_i || p_i)) / sum_j w_j

CE is the label's cross-entropy, q and p the final exit's and this exit's softmax of logits / T (Hinton et al., arXiv
1503.02531, whose T^2 keeps the gradient's size independent of T). Token weights w are 1, or the exit's own largest
probability (EE-Tuning, arXiv 2402.00518, section 3; here normalised, so they do not shrink the loss).
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_ee.exits.config import EarlyExitConfig


@dataclass(frozen=True)
class Objective:
    """One exit's training loss.

    Attributes:
        label_weight: a, share of the label's cross-entropy.
        teacher_weight: b, share of the divergence from the final exit.
        temperature: T, > 0.
        top_k: only the final exit's k most likely tokens count, their probabilities scaled to sum 1; None = all.
        by_confidence: weigh tokens by the exit's largest probability.
    """

    label_weight: float = 1.0
    teacher_weight: float = 0.0
    temperature: float = 1.0
    top_k: int | None = None
    by_confidence: bool = False

    @classmethod
    def of(cls, early_exit: EarlyExitConfig, name: str) -> Objective:
        """The objective of exit `name`."""
        share = {"cross_entropy": 0.0, "distillation": 1.0, "mixed": early_exit.distillation.weight}
        teacher = share[early_exit.objective_of(name)]
        return cls(
            label_weight=1.0 - teacher,
            teacher_weight=teacher,
            temperature=early_exit.distillation.temperature,
            top_k=early_exit.distillation.top_k,
            by_confidence=early_exit.token_weights == "confidence",
        )

    @property
    def has_teacher(self) -> bool:
        """Whether the final exit has to be run."""
        return self.teacher_weight > 0.0


CROSS_ENTROPY = Objective()
