# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoding engine: checks a call, then generates, streams or scores.

Modes: `early_exit` (a token is read at the first active exit that is sure), `full` (always the final exit). The prompt
runs at full depth and the first new token comes from the final exit. Every sequence of a batch gets what it would get
alone: decisions, random numbers and stops are its own.

May import: `nemo_ee.exits` and `nemo_ee.generation`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from nemo_ee.exits.confidence import CRITERIA
from nemo_ee.generation.items import DecodingModel
from nemo_ee.generation.policy import AskedExit, ExitPolicy
from nemo_ee.generation.sampling import GREEDY, SamplingParams
from nemo_ee.generation.scoring import Scorer, ScoreResult
from nemo_ee.generation.session import DecodingSession, Request
from nemo_ee.generation.stats import DecodingStats, TokenEvent

MODES = ("early_exit", "full")
LATER_MODES = ("self_speculative", "static_depth")


@dataclass(frozen=True)
class GenerationResult:
    """What `EarlyExitEngine.generate` returns.

    Attributes:
        tokens: new tokens of each sequence, a stop token included.
        finish_reasons: `stop` or `length` for each sequence.
        events: an event per token in the order they came.
        stats: sums over the events.
    """

    tokens: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[str, ...]
    events: tuple[TokenEvent, ...]
    stats: DecodingStats

    def events_of(self, sequence: int) -> tuple[TokenEvent, ...]:
        """The events of one sequence."""
        return tuple(event for event in self.events if event.sequence == sequence)


class EarlyExitEngine:
    """Generates and scores text with a model that has exits.

    Args:
        model: anything that follows `DecodingModel`.
    """

    def __init__(self, model: DecodingModel) -> None:
        stops = [point.stop for point in model.exits]
        assert stops == sorted(stops), "DecodingModel.exits is sorted by stop"
        assert all(0 < stop <= 2 * model.num_layers for stop in stops), f"stops {stops} of {model.num_layers} layers"
        self.model = model

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        mode: str = "early_exit",
        policy: ExitPolicy | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
        stop_tokens: Collection[int] = (),
    ) -> GenerationResult:
        """Generate until every sequence has ended.

        Args:
            prompts: token ids of each sequence, ragged.
            max_new_tokens: for all, or one per prompt.
            mode: `early_exit` or `full`.
            policy: where tokens may leave; needed for `early_exit`, ignored by `full` but for its criterion.
            sampling: for all, or one per prompt.
            stop_tokens: ids that end a sequence.

        Raises:
            ValueError: with every fault of the call, before anything runs.
        """
        session = self.start(self._requests(prompts, max_new_tokens, sampling, stop_tokens), mode=mode, policy=policy)
        events: list[TokenEvent] = []
        while not session.finished:
            events += session.step()
        tokens: list[list[int]] = [[] for _ in session.requests]
        reasons = [""] * len(session.requests)
        for event in events:
            tokens[event.sequence].append(event.token)
            reasons[event.sequence] = event.finish_reason or ""
        return GenerationResult(
            tokens=tuple(map(tuple, tokens)),
            finish_reasons=tuple(reasons),
            events=tuple(events),
            stats=session.stats(events),
        )

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        mode: str = "early_exit",
        policy: ExitPolicy | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
        stop_tokens: Collection[int] = (),
    ) -> Iterator[TokenEvent]:
        """`generate`, token by token: an iterator over the events as they come. The call is checked at once."""
        session = self.start(self._requests(prompts, max_new_tokens, sampling, stop_tokens), mode=mode, policy=policy)
        return (event for _ in iter(lambda: session.finished, True) for event in session.step())

    def start(
        self, requests: Sequence[Request], *, mode: str = "early_exit", policy: ExitPolicy | None = None
    ) -> DecodingSession:
        """A session over these requests, each with its own length, sampling and stop tokens.

        Raises:
            ValueError: with every fault of the call.
        """
        faults = [fault for index, own in enumerate(requests) for fault in self._request_faults(index, own)]
        if not requests:
            faults.append("no prompts were given; give at least one")
        exits, criterion, max_waiting = self._resolve(mode, policy, faults)
        return DecodingSession(self.model, requests, exits, criterion, max_waiting)

    def score(
        self,
        tokens: Sequence[Sequence[int]],
        num_context: int | Sequence[int],
        *,
        mode: str = "early_exit",
        policy: ExitPolicy | None = None,
    ) -> ScoreResult:
        """Score known text: each token after the context at the exit it would leave at.

        The first scored token is read from the final exit, as the first generated one is.

        Args:
            tokens: token ids of each sequence, ragged, context included.
            num_context: how many leading tokens are context (at least 1), for all or one per sequence.
            mode: `early_exit` or `full`.
            policy: as in `generate`.

        Raises:
            ValueError: with every fault of the call, before anything runs.
        """
        faults: list[str] = [] if tokens else ["no sequences were given; give at least one"]
        contexts = _per_sequence("num_context", num_context, len(tokens), int, faults)
        for index, (own, context) in enumerate(zip(tokens, contexts, strict=False)):
            faults += self._token_faults(f"sequence {index}", own)
            if not _is_whole(context) or not 1 <= context < len(own):
                faults.append(
                    f"sequence {index}: num_context = {context!r} must be at least 1 and leave one of its {len(own)} "
                    "tokens to score; put a begin-of-text token before text without context"
                )
            if len(own) > self.model.max_positions:
                faults.append(
                    f"sequence {index}: {len(own)} tokens are more than the model's {self.model.max_positions} "
                    "positions; shorten it or score it in windows"
                )
        exits, criterion, max_waiting = self._resolve(mode, policy, faults)
        return Scorer(self.model, exits, criterion, max_waiting).score(tokens, contexts)

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sampling: SamplingParams | Sequence[SamplingParams],
        stop_tokens: Collection[int],
    ) -> list[Request]:
        faults: list[str] = []
        lengths = _per_sequence("max_new_tokens", max_new_tokens, len(prompts), int, faults)
        params = _per_sequence("sampling", sampling, len(prompts), SamplingParams, faults)
        _raise(faults)
        stops = frozenset(stop_tokens)
        return [
            Request(tuple(prompt), length, own, stops)
            for prompt, length, own in zip(prompts, lengths, params, strict=True)
        ]

    def _resolve(
        self, mode: str, policy: ExitPolicy | None, faults: list[str]
    ) -> tuple[tuple[AskedExit, ...], str, int | None]:
        """The exits to ask, the criterion and the cap; raises these faults and the ones of mode and policy."""
        exits: tuple[AskedExit, ...] = ()
        if mode in LATER_MODES:
            faults.append(f"mode = {mode!r} is not available yet; use one of {', '.join(MODES)}")
        elif mode not in MODES:
            faults.append(f"mode = {mode!r} is unknown; use one of {', '.join(MODES)}")
        elif mode == "early_exit":
            if policy is None:
                faults.append("mode = 'early_exit' needs a policy; pass ExitPolicy(thresholds=...) or use mode='full'")
            else:
                try:
                    exits = policy.asked_exits(self.model.exits)
                except ValueError as error:
                    faults.append(str(error))
        _raise(faults)
        criterion = CRITERIA[0] if policy is None else policy.criterion
        return exits, criterion, None if policy is None else policy.max_waiting

    def _request_faults(self, index: int, request: Request) -> Iterator[str]:
        yield from self._token_faults(f"prompt {index}", request.prompt)
        yield from (
            f"stop token {token!r} is not in the vocabulary 0..{self.model.vocab_size - 1}; remove it"
            for token in request.stop_tokens
            if not self._in_vocabulary(token)
        )
        new, limit = request.max_new_tokens, self.model.max_positions
        if not _is_whole(new) or new < 1:
            yield f"prompt {index}: max_new_tokens = {new!r} must be a whole number from 1"
        elif len(request.prompt) + new > limit:
            yield (
                f"prompt {index}: {len(request.prompt)} prompt tokens + max_new_tokens = {new} are more than the "
                f"model's {limit} positions; shorten the prompt or ask for at most "
                f"{max(limit - len(request.prompt), 0)} new tokens"
            )

    def _token_faults(self, what: str, tokens: Sequence[int]) -> Iterator[str]:
        if len(tokens) == 0:
            yield f"{what} is empty; give at least one token, e.g. the begin-of-text token"
        outside = [token for token in tokens if not self._in_vocabulary(token)]
        if outside:
            more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
            yield (
                f"{what}: token {', '.join(map(repr, outside[:3]))}{more} outside the vocabulary "
                f"0..{self.model.vocab_size - 1}; use the tokenizer the model was trained with"
            )

    def _in_vocabulary(self, token: object) -> bool:
        return _is_whole(token) and 0 <= token < self.model.vocab_size


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _per_sequence(key: str, value: Any, count: int, kind: type, faults: list[str]) -> list[Any]:
    """`value` for every sequence: itself `count` times when it is a `kind`, else one each."""
    if isinstance(value, kind):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        faults.append(
            f"{key} = {value!r} must be one {kind.__name__}, or a list with one for each of {count} sequences"
        )
        return []
    return list(value)


def _raise(faults: Sequence[str]) -> None:
    faults = list(dict.fromkeys(faults))  # a stop token shared by all prompts is one fault
    if len(faults) == 1:
        raise ValueError(faults[0])
    if faults:
        raise ValueError("\n".join([f"the call has {len(faults)} faults:", *(f"  - {fault}" for fault in faults)]))
