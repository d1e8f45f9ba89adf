# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What decoding says about itself: an event per token, what failed, and sums over them.

May import: the standard library and `nemo_ee.generation.items`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from .early_exit_generation_items import ExitPoint

FINAL = "final"  # the name under which the final exit (None in an event) is counted


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """One token, generated or scored.

    Attributes:
        sequence: index of the sequence in the call.
        position: of this token in its sequence, the prompt included, from 0.
        token: its id.
        exit: name of the exit that produced it, in mode `self_speculative` as a draft; None = the final exit.
        layer: how many layers that exit stands on.
        confidence: of that exit, by the policy's criterion.
        logprob: ln of the token's probability, before temperature and penalties, at that exit; in mode
            `self_speculative` always at the final exit.
        finish_reason: None while the sequence goes on; `stop` (a stop token, or the request's `ends`) or `length` with
            its last token.
        top: (token, ln p) of the request's `num_top` most likely tokens, the most likely first; from the
            distribution of `logprob`.
    """

    sequence: int
    position: int
    token: int
    exit: str | None
    layer: int
    confidence: float
    logprob: float
    finish_reason: str | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Failure:
    """A sequence's last event when it ends by a fault of its own: no token, the reason instead. Others go on.

    Attributes:
        sequence: index of the sequence in the call.
        position: of the token at which it happened.
        message: what is wrong, and the way out.
        cause: the exception behind it; None = the model's logits.
        finish_reason: `error`.
    """

    sequence: int
    position: int
    message: str
    cause: Exception | None = None
    finish_reason: str = "error"


def raise_failures(events: Iterable[TokenEvent | Failure]) -> None:
    """One `RuntimeError` with every failure among the events; nothing without any."""
    failures = [event for event in events if isinstance(event, Failure)]
    if failures:
        raise RuntimeError("\n".join(failure.message for failure in failures)) from failures[0].cause


@dataclasses.dataclass(frozen=True)
class DecodingStats:
    """Sums over the tokens of a call.

    Attributes:
        num_prompt_tokens: tokens that ran as prompt or context.
        num_tokens: tokens generated or scored.
        tokens_per_exit: how many came from each exit the model has, in depth order, `final` last.
        mean_depth: mean number of layers below the exits they came from.
        num_layers: of the model.
        computed_layers: sum over all positions of the layers that were really run for them (halves count), prompt
            and thrown-away drafts included; the work, where `mean_depth` is only where tokens left.
        asked: how many times each exit of the model was asked, `final` included; the work of the heads.
        drafted, accepted: tokens drafted and checked or thrown away, and those of them that stayed
            (`self_speculative`).
        checks: how many times drafts of a sequence were checked.
        num_fallbacks: sequences that stopped asking their exits because they did not pay (`cost_rule`).
    """

    num_prompt_tokens: int
    num_tokens: int
    tokens_per_exit: dict[str, int]
    mean_depth: float
    num_layers: int
    computed_layers: float
    asked: dict[str, int]
    drafted: int = 0
    accepted: int = 0
    checks: int = 0
    num_fallbacks: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that stayed; 0.0 without drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Drafted tokens that stayed, per check; 0.0 without checks."""
        return self.accepted / self.checks if self.checks else 0.0

    @property
    def computed_depth(self) -> float:
        """Layers run for each token of prompt and answer, on average; above `num_layers` where much is thrown away."""
        tokens = self.num_prompt_tokens + self.num_tokens
        return self.computed_layers / tokens if tokens else 0.0

    def to_mapping(self) -> dict[str, Any]:
        """Plain numbers for a report."""
        rates = ("acceptance_rate", "mean_accepted_length", "computed_depth")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in rates}


def exit_histogram(events: Iterable[TokenEvent], exits: Sequence[ExitPoint]) -> dict[str, int]:
    """How many tokens each exit produced: every exit of the model in its order, then `final`."""
    counts = {point.name: 0 for point in exits} | {FINAL: 0}
    for event in events:
        counts[FINAL if event.exit is None else event.exit] += 1
    return counts


def mean_depth(events: Sequence[TokenEvent]) -> float:
    """Mean number of layers below the exits that produced the tokens; 0.0 without tokens."""
    return sum(event.layer for event in events) / len(events) if events else 0.0
