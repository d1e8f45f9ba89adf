# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoding engine: checks a call, runs prompts, feeds tokens, samples, stops each sequence, reports.

Modes: `early_exit` (a token is read at the first active exit that is sure), `full` (always the final exit). The prompt
runs at full depth and the first new token comes from the final exit. Every sequence of a batch gets what it would get
alone: decisions, random numbers and stops are its own.

May import: torch and `nemo_ee.generation`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_ee.exits.confidence import CRITERIA
from nemo_ee.generation.descent import Descent, Reading
from nemo_ee.generation.items import DecodingModel
from nemo_ee.generation.policy import AskedExit, ExitPolicy
from nemo_ee.generation.sampling import SamplingParams, sample
from nemo_ee.generation.scoring import Scorer, ScoreResult
from nemo_ee.generation.stats import DecodingStats, TokenEvent, exit_histogram, mean_depth

MODES = ("early_exit", "full")
LATER_MODES = ("self_speculative", "static_depth")


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at least 1.
        sampling: how its tokens are chosen.
        stop_tokens: ids that end it; the one that does is its last token.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_tokens: frozenset[int] = frozenset()


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


class DecodingSession:
    """Decoding of one batch, a step at a time. Made by `EarlyExitEngine.start`.

    Attributes:
        cache: the model's key/value storage.
        finished: whether every sequence has ended.
    """

    def __init__(
        self,
        model: DecodingModel,
        requests: Sequence[Request],
        exits: Sequence[AskedExit],
        criterion: str,
        max_waiting: int | None,
    ) -> None:
        self.requests = tuple(requests)
        max_length = max(len(own.prompt) + own.max_new_tokens for own in self.requests)
        with torch.inference_mode():
            self.cache: Any = model.new_cache(
                len(self.requests), max_length, tuple(exit.point.name for exit in exits)
            )
        self._model = model
        self._descent = Descent(model, self.cache, exits, criterion, max_waiting)
        self._tokens = [list(own.prompt) for own in self.requests]  # with the new ones
        self._running = list(range(len(self.requests)))
        self._prompts_have_run = False

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return not self._running

    @torch.inference_mode()
    def step(self) -> tuple[TokenEvent, ...]:
        """The next token of every sequence that has not ended, in the order of the sequences.

        Raises:
            RuntimeError: the model returned logits that are not numbers.
        """
        if self.finished:
            return ()
        if self._prompts_have_run:
            newest = {index: (len(self._tokens[index]) - 1, self._tokens[index][-1]) for index in self._running}
            readings = self._descent.step(newest)
        else:
            readings = self._descent.prompt({index: self._tokens[index] for index in self._running})
            self._prompts_have_run = True
        events = self._choose(readings)
        self._running = [event.sequence for event in events if event.finish_reason is None]
        return events

    @torch.inference_mode()
    def flush(self) -> None:
        """Run everything that waits, of ended sequences too, to full depth.

        Afterwards every position that was fed has its keys and values in every layer, as after a full-depth run.
        """
        self._descent.flush()

    def waiting(self, sequence: int) -> int:
        """How many tokens of the sequence wait for deeper layers."""
        return self._descent.waiting(sequence)

    def stats(self, events: Sequence[TokenEvent]) -> DecodingStats:
        """Sums over these events and over the work done so far."""
        return DecodingStats(
            num_prompt_tokens=sum(len(own.prompt) for own in self.requests),
            num_tokens=len(events),
            tokens_per_exit=exit_histogram(events, self._model.exits),
            mean_depth=mean_depth(events),
            num_layers=self._model.num_layers,
            computed_layers=self._descent.computed_half_layers / 2,
            asked=dict(self._descent.asked),
        )

    def _choose(self, readings: Sequence[Reading]) -> tuple[TokenEvent, ...]:
        """Sample a token from each reading and record it."""
        logits = torch.stack([reading.logits for reading in readings])
        indices = [reading.sequence for reading in readings]
        positions = [len(self._tokens[index]) for index in indices]
        chosen = sample(
            logits,
            [self.requests[index].sampling for index in indices],
            positions,
            [self._tokens[index] for index in indices],
        )
        of_chosen = logits.gather(1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0]
        logprobs = (of_chosen - logits.logsumexp(dim=1)).tolist()
        events = []
        for reading, position, token, logprob in zip(readings, positions, chosen, logprobs, strict=True):
            if math.isnan(logprob):
                raise RuntimeError(
                    f"sequence {reading.sequence}: the logits for position {position} from "
                    f"{'the final exit' if reading.exit is None else f'exit {reading.exit!r}'} are not numbers (NaN or "
                    "inf); check the checkpoint for broken weights, or decode in bf16 or fp32 instead of fp16"
                )
            self._tokens[reading.sequence].append(token)
            events.append(
                TokenEvent(
                    sequence=reading.sequence,
                    position=position,
                    token=token,
                    exit=reading.exit,
                    layer=reading.layer,
                    confidence=reading.confidence,
                    logprob=logprob,
                    finish_reason=self._finish_reason(reading.sequence),
                )
            )
        return tuple(events)

    def _finish_reason(self, index: int) -> str | None:
        request, tokens = self.requests[index], self._tokens[index]
        if tokens[-1] in request.stop_tokens:
            return "stop"
        return "length" if len(tokens) - len(request.prompt) >= request.max_new_tokens else None


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
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 (frozen)
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
        session = self.start(
            self._requests(prompts, max_new_tokens, sampling, stop_tokens), mode=mode, policy=policy
        )
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
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 (frozen)
        stop_tokens: Collection[int] = (),
    ) -> Iterator[TokenEvent]:
        """`generate`, token by token: an iterator over the events as they come. The call is checked at once."""
        session = self.start(
            self._requests(prompts, max_new_tokens, sampling, stop_tokens), mode=mode, policy=policy
        )
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
            if index == 0 and not self._in_vocabulary(token)
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
    return isinstance(value, int) and not isinstance(value, bool)


def _per_sequence(key: str, value: Any, count: int, kind: type, faults: list[str]) -> list[Any]:
    """`value` for every sequence: itself `count` times when it is a `kind`, else one each."""
    if isinstance(value, kind):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        faults.append(f"{key} = {value!r} must be one {kind.__name__}, or a list with one for each of {count} sequences")
        return []
    return list(value)


def _raise(faults: Sequence[str]) -> None:
    if len(faults) == 1:
        raise ValueError(faults[0])
    if faults:
        raise ValueError("\n".join([f"the call has {len(faults)} faults:", *(f"  - {fault}" for fault in faults)]))
