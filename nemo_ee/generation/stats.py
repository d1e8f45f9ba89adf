# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding statistics: one event for each token, failures, and sums over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from nemo_ee.generation.decoding_model import ExitPoint

FINAL = "final"  # the name under which the final exit (None in an event) is counted


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """One token, generated or scored.

    Attributes:
        sequence: index of the sequence in the call.
        position: position of this token in its sequence, prompt included, from 0.
        token: token id.
        exit: name of the exit that produced it, in mode `self_speculative` as a draft; None = the final exit.
        layer: number of layers below that exit.
        confidence: that exit's confidence, by the policy's criterion.
        logprob: ln of the token's probability, before temperature and penalties, at that exit; in mode
            `self_speculative` always at the final exit.
        finish_reason: None while the sequence goes on; `stop` (a stop token, or the request's `ends`) or `length` at
            its last token.
        top: (token, ln p) of the request's `num_top` most likely tokens, the most likely first, from the same
            distribution as `logprob`.
        rejected: name of the exit whose draft at this position was rejected; None = there was no such draft.
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
    rejected: str | None = None


@dataclasses.dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of a prompt's tokens, where a request has `prompt_logprobs`; comes before its first token.

    Attributes:
        sequence: index of the sequence in the call.
        logprobs: ln of the probability of each prompt token but the first, at the end of the stack, in mode
            `static_depth` at the one exit.
        top: for each of them (token, ln p) of the request's `prompt_logprobs` most likely tokens; empty where it is 0.
        finish_reason: `length` where no token was to be generated, else None.
    """

    sequence: int
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Failure:
    """The last event of a sequence that fails: a reason instead of a token. Other sequences go on.

    Attributes:
        sequence: index of the sequence in the call.
        position: position of the token at which it failed.
        message: the problem and the way out.
        cause: the exception behind it; None = the model's logits.
        finish_reason: `error`.
    """

    sequence: int
    position: int
    message: str
    cause: Exception | None = None
    finish_reason: str = "error"

    @classmethod
    def of_logits(cls, sequence: int, position: int, exit: str | None) -> Failure:
        """The failure where an exit's (None: the final one's) logits for a position are not numbers."""
        source = "the final exit" if exit is None else f"exit {exit!r}"
        return cls(
            sequence,
            position,
            f"sequence {sequence}: the logits for position {position} from {source} are not numbers "
            "(NaN or inf); check the checkpoint for broken weights, or decode in bf16 or fp32, not fp16",
        )


Event = TokenEvent | PromptScores | Failure


def raise_failures(events: Iterable[Event]) -> None:
    """Raise one `RuntimeError` with every failure among the events; do nothing without any."""
    failures = [event for event in events if isinstance(event, Failure)]
    if failures:
        raise RuntimeError("\n".join(failure.message for failure in failures)) from failures[0].cause


@dataclasses.dataclass(frozen=True)
class DecodingStats:
    """Sums over the tokens of a call.

    Attributes:
        num_prompt_tokens: number of tokens that ran as prompt or context.
        num_tokens: number of tokens generated or scored.
        tokens_per_exit: exit name -> number of tokens from it, in depth order, `final` last.
        mean_depth: mean number of layers below the exits that the tokens came from.
        num_layers: number of the model's layers.
        computed_layers: sum over all positions of the layers that were run for them (half layers count), prompt and
            rejected drafts included. It measures the work; `mean_depth` is only the layers at which tokens left.
        evaluations: exit name -> number of rows at which it was evaluated, `final` included: the work of the heads.
        drafted, accepted: number of drafted tokens that were verified or dropped, and of those that were accepted
            (`self_speculative`).
        num_verifications: number of verifications, each of all drafts of one sequence.
        num_fallbacks: number of sequences that stopped evaluating their exits because of `cost_rule`.
    """

    num_prompt_tokens: int
    num_tokens: int
    tokens_per_exit: dict[str, int]
    mean_depth: float
    num_layers: int
    computed_layers: float
    evaluations: dict[str, int]
    drafted: int = 0
    accepted: int = 0
    num_verifications: int = 0
    num_fallbacks: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were accepted; 0.0 without drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Accepted tokens per verification; 0.0 without any."""
        return self.accepted / self.num_verifications if self.num_verifications else 0.0

    @property
    def computed_depth(self) -> float:
        """Mean number of layers run per token of prompt and answer; above `num_layers` if many drafts are rejected."""
        tokens = self.num_prompt_tokens + self.num_tokens
        return self.computed_layers / tokens if tokens else 0.0

    def to_mapping(self) -> dict[str, Any]:
        """Plain numbers for a report."""
        rates = ("acceptance_rate", "mean_accepted_length", "computed_depth")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in rates}


def exit_histogram(events: Iterable[TokenEvent], exits: Sequence[ExitPoint]) -> dict[str, int]:
    """Number of tokens from each exit of the model, in its order, then `final`."""
    counts = {point.name: 0 for point in exits} | {FINAL: 0}
    for event in events:
        counts[FINAL if event.exit is None else event.exit] += 1
    return counts


def mean_depth(events: Sequence[TokenEvent]) -> float:
    """Mean number of layers below the exits that produced the tokens; 0.0 without tokens."""
    return sum(event.layer for event in events) / len(events) if events else 0.0
