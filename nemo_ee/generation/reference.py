# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoding algorithm on one page: no cache, no batch, nothing pending. Read it before `engine.py`.

Every step recomputes the whole sequence, so a token's hidden states exist at every stop and an exit can be read
anywhere. The engine gives the same tokens and exits with each (token, half layer) computed at most once: tokens that
leave early are *pending* there, and run through the deeper layers together with the next token that goes deeper. Here
`pending` is only counted, because the cap on it changes where tokens leave. The tests compare the engine with this
file.

A stop is a depth in half layers (see `decoding_model.py`). Greedy decoding only; for sampling see `sampling.py` and
`verification.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from nemo_ee.exits.probe import ExitProbe
from nemo_ee.generation.decoding_model import ExitPoint


class PlainModel(Protocol):
    """A causal model that recomputes everything. s = length of the sequence, v = size of the vocabulary."""

    num_layers: int
    exits: tuple[ExitPoint, ...]  # sorted by stop

    def hidden_states(self, tokens: Sequence[int]) -> list[Tensor]:
        """The hidden states `[s, h]` at every stop 0..2 num_layers."""
        ...

    def logits(self, exit: str | None, states: Sequence[Tensor]) -> Tensor:
        """The logits `[s, v]` of an exit, or of the final exit (None)."""
        ...


class Decoded(NamedTuple):
    """New tokens, the exit each is read from (None = the final exit), and the logits `[v]` there."""

    tokens: list[int]
    exits: list[str | None]
    logits: list[Tensor]


class Speculated(NamedTuple):
    """New tokens, the exit that drafted each (None = the final exit's own), and (drafted, accepted) of every
    verification."""

    tokens: list[int]
    exits: list[str | None]
    verifications: list[tuple[int, int]]


def passes(logits: Tensor, criterion: str, threshold: float, hidden: Tensor, probe: ExitProbe | None) -> bool:
    """Whether a token with these logits `[v]` and this hidden state `[h]` at the exit's tap leaves."""
    if criterion == "probe":
        h, w = hidden.tolist(), probe.weight.tolist()
        rms = math.sqrt(sum(x * x for x in h) / len(h))
        return 1 / (1 + math.exp(-sum(a * b for a, b in zip(h, w, strict=True)) / rms - probe.bias)) > threshold
    p = logits.double().softmax(dim=0).tolist()
    first, second = sorted(p, reverse=True)[:2]
    if criterion == "max_probability":
        return first > threshold
    if criterion == "margin":
        return first - second > threshold
    assert criterion == "entropy", f"no formula for {criterion}"
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    return entropy < threshold


def decode(
    model: PlainModel,
    prompt: Sequence[int],
    num_new_tokens: int,
    *,
    thresholds: Mapping[str, float],
    criterion: str = "max_probability",
    max_pending_tokens: int | None = None,
    forced: Sequence[int] | None = None,
) -> Decoded:
    """Mode `early_exit`: each token is read at the first exit whose confidence passes its threshold.

    Args:
        thresholds: exit name -> threshold, for the active exits.
        max_pending_tokens: see `ExitPolicy`.
        forced: run these tokens instead of the most likely ones (scoring).
    """
    tokens, exits, rows, pending = list(prompt), [], [], 0
    for step in range(num_new_tokens):
        states = model.hidden_states(tokens)
        # The first new token comes from the final exit, because the prompt runs at full depth.
        may_exit = step > 0 and (max_pending_tokens is None or pending < max_pending_tokens)
        exit, stop = None, 2 * model.num_layers
        for point in model.exits if may_exit else ():
            if point.name in thresholds:
                row = model.logits(point.name, states)[-1]
                if passes(row, criterion, thresholds[point.name], states[point.stop][-1], point.probe):
                    exit, stop = point.name, point.stop
                    break
        row = model.logits(exit, states)[-1]
        # A token that reaches the end of the stack takes all pending ones with it.
        pending = pending + 1 if stop < 2 * model.num_layers else 0
        tokens.append(int(row.argmax()) if forced is None else forced[step])
        exits.append(exit)
        rows.append(row)
    return Decoded(tokens[len(prompt) :], exits, rows)


def speculate(
    model: PlainModel,
    prompt: Sequence[int],
    num_new_tokens: int,
    *,
    thresholds: Mapping[str, float],
    criterion: str = "max_probability",
    num_draft_tokens: int | None = None,
    stop_token: int | None = None,
) -> Speculated:
    """Mode `self_speculative`: exits draft tokens, the final exit verifies them; the output is the full model's.

    Args:
        num_draft_tokens: see `ExitPolicy`.
        stop_token: ends the sequence.
    """

    def full(tokens: Sequence[int]) -> int:
        return int(model.logits(None, model.hidden_states(tokens))[-1].argmax())

    def draft(tokens: Sequence[int]) -> tuple[int, str] | None:
        states = model.hidden_states(tokens)
        for point in model.exits:
            # An exit at the end of the stack saves nothing, so it does not draft.
            if point.name in thresholds and point.stop < 2 * model.num_layers:
                row = model.logits(point.name, states)[-1]
                if passes(row, criterion, thresholds[point.name], states[point.stop][-1], point.probe):
                    return int(row.argmax()), point.name
        return None

    end = len(prompt) + num_new_tokens
    tokens, exits, verifications = [*prompt, full(prompt)], [None], []
    drafts: list[tuple[int, str]] = []
    while len(tokens) < end and tokens[-1] != stop_token:
        # Draft until an exit does not pass, the cap is reached, or the sequence would end.
        ahead = [*tokens, *(token for token, _ in drafts)]
        would_end = bool(drafts) and drafts[-1][0] == stop_token or len(ahead) + 1 == end
        at_cap = num_draft_tokens is not None and len(drafts) >= num_draft_tokens
        proposal = None if would_end or at_cap else draft(ahead)
        if proposal is not None:
            drafts.append(proposal)
            continue
        # Verify: accept drafts up to the first that is not the full model's token; that token replaces it.
        accepted = 0
        for token, exit in drafts:
            tokens.append(full(tokens))
            exits.append(exit if tokens[-1] == token else None)
            if tokens[-1] != token:
                break
            accepted += 1
        if accepted == len(drafts) and tokens[-1] != stop_token:
            tokens.append(full(tokens))  # the verification also gives the token after the drafts
            exits.append(None)
        if drafts:
            verifications.append((len(drafts), accepted))
        drafts = []
    return Speculated(tokens[len(prompt) :], exits, verifications)
