# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The confidence of an exit in its next token, and the rule by which a token leaves.

With p = softmax(logits), in fp32:

* `max_probability`: max p (EE-LLM, arXiv 2312.04916).
* `margin`: largest minus second-largest p (the "softmax response" of CALM, arXiv 2207.07061).
* `entropy`: -sum p ln p, in nats (BranchyNet, arXiv 1709.01686).
* `probe`: of the hidden state instead of the logits, see `nemo_ee.exits.probe`.

A token leaves iff confidence > threshold, for entropy iff entropy < threshold. So 1.0 (entropy: 0.0) never leaves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_ee.exits.criteria import CRITERIA, NEVER_LEAVES, OF_LOGITS, PROBE, SMALLER_IS_CONFIDENT
from nemo_ee.exits.probe import ExitProbe


def confidence(logits: Tensor, criterion: str) -> Tensor:
    """The criterion's value for each row of logits.

    Args:
        logits: `[..., v]`, any floating dtype, the full vocabulary.
        criterion: one of `OF_LOGITS`.

    Returns:
        `[...]`, fp32. NaN where the logits hold NaN, which no threshold lets leave.

    Raises:
        ValueError: unknown criterion, or `probe`.
    """
    check_criterion(criterion)
    if criterion not in OF_LOGITS:
        raise ValueError(f"criterion = {criterion!r} is not one of the logits; use one of {', '.join(OF_LOGITS)}")
    probabilities = torch.softmax(logits.float(), dim=-1)
    if criterion == "max_probability":
        return probabilities.amax(dim=-1)
    if criterion == "entropy":
        return torch.special.entr(probabilities).sum(dim=-1)  # entr(0) = 0: masked tokens (-inf) count nothing
    assert criterion == "margin", f"no formula for {criterion}"
    if probabilities.shape[-1] == 1:
        return probabilities[..., 0]
    top_two = probabilities.topk(2, dim=-1).values
    return top_two[..., 0] - top_two[..., 1]


def exit_confidence(criterion: str, logits: Tensor, hidden: Tensor, probe: ExitProbe | None) -> Tensor:
    """The confidence of each row of an exit, by any criterion.

    Args:
        criterion: one of `CRITERIA`.
        logits: `[n, v]`, the exit's.
        hidden: `[n, h]`, hidden states at its tap.
        probe: the exit's, which `criterion: probe` needs.

    Returns:
        `[n]`, fp32.
    """
    if criterion != PROBE:
        return confidence(logits, criterion)
    assert probe is not None, "an exit without a probe"
    return probe(hidden).to(logits.device)


def end_confidence(criterion: str, logits: Tensor) -> Tensor:
    """The confidence of each row where a sequence ends, which no threshold reads: at the final exit, or at the exit of
    `static_depth`. With `criterion: probe` it is `max_probability`. `logits`: `[n, v]`. Returns `[n]`, fp32."""
    return confidence(logits, OF_LOGITS[0] if criterion == PROBE else criterion)


def leaves(confidence: Tensor, threshold: float | Tensor, criterion: str) -> Tensor:
    """Whether tokens of this confidence leave at this threshold.

    Args:
        confidence: `[...]`, as from `confidence`.
        threshold: the exit's threshold, or one for each token.
        criterion: one of `CRITERIA`.

    Returns:
        `[...]`, bool.

    Raises:
        ValueError: unknown criterion.
    """
    check_criterion(criterion)
    return confidence < threshold if criterion in SMALLER_IS_CONFIDENT else confidence > threshold


def can_leave(threshold: float, criterion: str) -> bool:
    """Whether any distribution at all leaves at this threshold; if not, the exit need not be evaluated.

    Raises:
        ValueError: unknown criterion.
    """
    check_criterion(criterion)
    never = NEVER_LEAVES[criterion]
    return threshold > never if criterion in SMALLER_IS_CONFIDENT else threshold < never


def check_criterion(criterion: str) -> None:
    """Raises ValueError unless `criterion` is one of `CRITERIA`."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion = {criterion!r} is unknown; use one of {', '.join(CRITERIA)}")
