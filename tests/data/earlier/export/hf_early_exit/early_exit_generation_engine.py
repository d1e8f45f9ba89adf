# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoding engine: checks a call, then generates, streams or scores.

    early_exit         a token is read at the first active exit that is sure
    self_speculative   such a token is a draft, checked against the final exit: the full model's output
    static_depth       every token is read from one exit, and nothing below it ever runs
    full               every token is read from the final exit

The prompt runs at full depth and the first new token comes from the final exit, except in `static_depth`, where both
end at the one exit. Every sequence of a batch gets what it would get alone: decisions, random numbers and stops are
its own.

May import: `nemo_ee.exits` and `nemo_ee.generation`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from .early_exit_generation_checks import is_whole, per_sequence, raise_all, request_faults, token_faults
from .early_exit_generation_cost_rule import COST_RULES, CostRule, CostTable, measure_costs, unknown_cost_rule
from .early_exit_generation_items import DecodingModel
from .early_exit_generation_policy import MODES, ExitPolicy, course_of, unknown_mode
from .early_exit_generation_request import Request, resolve
from .early_exit_generation_sampling import GREEDY, SamplingParams
from .early_exit_generation_scoring import Scorer, ScoreResult
from .early_exit_generation_session import DecodingSession
from .early_exit_generation_stats import DecodingStats, Failure, TokenEvent, raise_failures

__all__ = ["MODES", "EarlyExitEngine", "GenerationResult", "Request"]


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
        cost_rule: `none`, or `fallback`: a sequence whose exits do not pay stops asking them (`generation.cost_rule`),
            by a table that is measured when a session of that many places is first started; or a rule with a table. A
            session that is started without an exit to ask has none.

    Raises:
        ValueError: an unknown rule.
    """

    def __init__(self, model: DecodingModel, *, cost_rule: str | CostRule = "none") -> None:
        if not isinstance(cost_rule, CostRule) and cost_rule not in COST_RULES:
            raise ValueError(unknown_cost_rule(cost_rule))
        self._cost_rule = cost_rule
        self._tables: dict[tuple[int, tuple[str, ...]], CostTable] = {}
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
            mode: one of `MODES`.
            policy: where tokens may leave; needed by every mode except `full`. `full` and `static_depth` ignore its
                thresholds, `static_depth` takes its one active exit.
            sampling: for all, or one per prompt.
            stop_tokens: ids that end a sequence.

        Raises:
            ValueError: with every fault of the call, before anything runs.
            RuntimeError: with every sequence whose logits are not numbers, after all have ended.
        """
        requests = self._requests(prompts, max_new_tokens, sampling, stop_tokens)
        session = self.start(requests, mode=mode, policy=policy)
        events: list[TokenEvent] = []
        while not session.finished:
            events += session.step()
        raise_failures(events)
        tokens: list[list[int]] = [[] for _ in requests]
        reasons = [""] * len(requests)
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
        return _events_of(session)

    def start(
        self,
        requests: Sequence[Request],
        *,
        mode: str = "early_exit",
        policy: ExitPolicy | None = None,
        exits: Sequence[str] | None = None,
        num_slots: int | None = None,
        max_length: int | None = None,
    ) -> DecodingSession:
        """A session over these requests, each with its own length, sampling and stops, to which more can be added.

        Args:
            requests: may be empty where `num_slots` is given.
            mode, policy: of requests that do not say.
            exits: names of the exits that later requests may use, beside those of these requests; None = those of the
                session's mode and policy.
            num_slots: most sequences at a time; None = as many as there are requests.
            max_length: most tokens of a sequence, prompt included; None = of these requests, or the model's positions
                where there are none.

        Raises:
            ValueError: with every fault of the call.
        """
        faults: list[str] = []
        courses = []
        for index, own in enumerate(requests):
            faults += request_faults(self.model, f"prompt {index}", own)
            courses.append(resolve(self.model, own, mode, policy, faults))
        if policy is not None or (exits is None and not requests):
            course = resolve(self.model, Request((), 1), mode, policy, faults)
            courses += [course] if exits is None else []
        elif mode not in MODES:
            faults.append(unknown_mode(mode))
        faults += self._room_faults(requests, exits, num_slots)
        raise_all(faults)
        needed = max((len(own.prompt) + own.max_new_tokens for own in requests), default=1)
        if max_length is None:
            max_length = needed if requests else self.model.max_positions
        elif not is_whole(max_length) or not needed <= max_length <= self.model.max_positions:
            raise ValueError(
                f"max_length = {max_length!r} must be at least what the requests need ({needed}) and at most the "
                f"model's {self.model.max_positions} positions"
            )
        names = {name for course in courses for name in course.exit_names} | set(exits or ())
        num_slots = num_slots or len(requests)
        asked = {exit.point.name for course in courses for exit in course.exits} | set(exits or ())
        rule = self._rule_for(asked, num_slots)
        session = DecodingSession(self.model, mode, policy, names, num_slots, max_length, rule)
        for own, course in zip(requests, courses, strict=False):
            session.admit(own, course)
        return session

    def _rule_for(self, asked: Collection[str], num_slots: int) -> CostRule | None:
        """The cost rule of a session of so many places that asks these exits, None without any; measures its table if
        there is none yet."""
        rule = self._cost_rule
        if rule == "none" or not asked:
            return None
        if isinstance(rule, CostRule):
            raise_all(list(rule.faults(sorted(asked), num_slots)))
            return rule
        key = (num_slots, tuple(sorted(asked)))
        if key not in self._tables:
            self._tables[key] = measure_costs(self.model, key[1], num_slots)
        return CostRule(self._tables[key])

    def _room_faults(
        self, requests: Sequence[Request], exits: Sequence[str] | None, num_slots: int | None
    ) -> Iterator[str]:
        if not requests and num_slots is None:
            yield "no prompts were given; give at least one, or num_slots for sequences to come"
        if num_slots is not None and (not is_whole(num_slots) or num_slots < max(1, len(requests))):
            yield f"num_slots = {num_slots!r} must be a whole number from 1 and not below the {len(requests)} requests"
        known = [point.name for point in self.model.exits]
        for name in exits or ():
            if name not in known:
                its_own = ", ".join(known) or "none"
                yield f"exits names {name!r}, which the model does not have; its exits are {its_own}"

    def score(
        self,
        tokens: Sequence[Sequence[int]],
        num_context: int | Sequence[int],
        *,
        mode: str = "early_exit",
        policy: ExitPolicy | None = None,
    ) -> ScoreResult:
        """Score known text: each token after the context at the exit it would leave at.

        The first scored token is read from the final exit, as the first generated one is; in `static_depth` from the
        one exit, as every token.

        Args:
            tokens: token ids of each sequence, ragged, context included.
            num_context: how many leading tokens are context (at least 1), for all or one per sequence.
            mode: one of `MODES`; `self_speculative` scores as `full` does.
            policy: as in `generate`.

        Raises:
            ValueError: with every fault of the call, before anything runs.
        """
        faults: list[str] = [] if tokens else ["no sequences were given; give at least one"]
        contexts = per_sequence("num_context", num_context, len(tokens), int, faults)
        for index, (own, context) in enumerate(zip(tokens, contexts, strict=False)):
            faults += token_faults(self.model, f"sequence {index}", own)
            if not is_whole(context) or not 1 <= context < len(own):
                faults.append(
                    f"sequence {index}: num_context = {context!r} must be at least 1 and leave one of its {len(own)} "
                    "tokens to score; put a begin-of-text token before text without context"
                )
            if len(own) > self.model.max_positions:
                faults.append(
                    f"sequence {index}: {len(own)} tokens are more than the model's {self.model.max_positions} "
                    "positions; shorten it or score it in windows"
                )
        try:
            own_mode = "full" if mode == "self_speculative" else mode
            course = course_of(own_mode, policy, self.model.exits, self.model.num_layers)
        except ValueError as error:
            faults.append(str(error))
        raise_all(faults)
        return Scorer(self.model, course).score(tokens, contexts)

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sampling: SamplingParams | Sequence[SamplingParams],
        stop_tokens: Collection[int],
    ) -> list[Request]:
        faults: list[str] = []
        lengths = per_sequence("max_new_tokens", max_new_tokens, len(prompts), int, faults)
        params = per_sequence("sampling", sampling, len(prompts), SamplingParams, faults)
        raise_all(faults)
        stops = frozenset(stop_tokens)
        return [
            Request(tuple(prompt), length, own, stops)
            for prompt, length, own in zip(prompts, lengths, params, strict=True)
        ]


def _events_of(session: DecodingSession) -> Iterator[TokenEvent]:
    """The tokens of a session as they come; what failed is raised when the others have ended."""
    failures: list[Failure] = []
    while not session.finished:
        for event in session.step():
            if isinstance(event, Failure):
                failures.append(event)
            else:
                yield event
    raise_failures(failures)
