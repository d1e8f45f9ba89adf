# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoding engine: validates a call, then generates, streams or scores.

    early_exit         a token is read at the first active exit whose confidence passes its threshold
    self_speculative   such a token is a draft, verified by the final exit: the output is the full model's
    static_depth       every token is read from one exit, and nothing past it ever runs
    full               every token is read from the final exit

The prompt runs at full depth and the first new token comes from the final exit; in `static_depth` both end at the one
exit. Every sequence of a batch gets what it gets alone: decisions, random numbers and stops are per sequence. For the
algorithm without caches and batches read `nemo_ee/generation/reference.py` first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial

from nemo_ee.generation.cost_rule import COST_RULES, CostRule, CostTable, measure_costs, unknown_cost_rule
from nemo_ee.generation.decoding_model import DecodingModel
from nemo_ee.generation.policy import MODES, ExitPolicy, unknown_mode, unused_cap
from nemo_ee.generation.request import Request
from nemo_ee.generation.sampling import GREEDY, SamplingParams
from nemo_ee.generation.scoring import Scorer, ScoreResult
from nemo_ee.generation.session import DecodingSession
from nemo_ee.generation.stats import DecodingStats, Event, Failure, TokenEvent, raise_failures
from nemo_ee.generation.validation import (
    is_whole,
    per_sequence,
    plan_or_problem,
    plan_request,
    raise_all,
    token_problems,
)

__all__ = ["MODES", "EarlyExitEngine", "GenerationResult", "Request"]


@dataclass(frozen=True)
class GenerationResult:
    """The result of `EarlyExitEngine.generate`.

    Attributes:
        tokens: new tokens of each sequence, a stop token included.
        finish_reasons: `stop` or `length` for each sequence.
        events: one event for each token, in the order of generation.
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
        model: a `DecodingModel`.
        cost_rule: `none`; `fallback`: a sequence whose exits do not save time stops evaluating them
            (`generation.cost_rule`), by a cost table that is measured when the first session with that number of
            slots starts; or a `CostRule` with a table. A session without an exit to evaluate uses no rule.
        cost_tables: (number of slots, exits) -> a table measured before; those that are measured here are added. The
            rule and drafts by value (`generation.draft_value`, one slot) use them.

    Raises:
        ValueError: an unknown rule.
    """

    def __init__(
        self,
        model: DecodingModel,
        *,
        cost_rule: str | CostRule = "none",
        cost_tables: MutableMapping[tuple[int, tuple[str, ...]], CostTable] | None = None,
    ) -> None:
        if not isinstance(cost_rule, CostRule) and cost_rule not in COST_RULES:
            raise ValueError(unknown_cost_rule(cost_rule))
        self._cost_rule = cost_rule
        self._tables = {} if cost_tables is None else cost_tables
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
            max_new_tokens: one number for all prompts, or one for each.
            mode: one of `MODES`.
            policy: where tokens may leave; needed by every mode except `full`. `full` and `static_depth` ignore its
                thresholds, `static_depth` takes its one active exit.
            sampling: one for all prompts, or one for each.
            stop_tokens: ids that end a sequence.

        Raises:
            ValueError: with every problem of the call, before anything runs.
            RuntimeError: with every sequence whose logits are not numbers, after all have ended.
        """
        _refuse_unused_cap(mode, policy)
        requests = self._requests(prompts, max_new_tokens, sampling, stop_tokens)
        return run_to_end(self.start(requests, mode=mode, policy=policy), len(requests))

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
        """Start a session with these requests, to which more can be added.

        Args:
            requests: each with its own length, sampling and stops; may be empty where `num_slots` is given.
            mode, policy: for requests without their own.
            exits: names of the exits that later requests may use, in addition to those of these requests; None = those
                of the session's mode and policy.
            num_slots: largest number of sequences at a time; None = the number of requests.
            max_length: largest number of tokens of a sequence, prompt included; None = what these requests need, or
                the model's positions where there are none.

        Raises:
            ValueError: with every problem of the call.
        """
        problems: list[str] = []
        plans, usual = [], []
        for index, own in enumerate(requests):
            plans.append(plan_request(self.model, f"prompt {index}", own, mode, policy, problems))
        if policy is not None or (exits is None and not requests):
            usual = [plan_or_problem(self.model, mode, policy, problems)]
            plans += usual if exits is None else []
        elif mode not in MODES:
            problems.append(unknown_mode(mode))
        problems += self._room_problems(requests, exits, num_slots)
        raise_all(problems)
        needed = max((len(own.prompt) + own.max_new_tokens for own in requests), default=1)
        if max_length is None:
            max_length = needed if requests else self.model.max_positions
        elif not is_whole(max_length) or not needed <= max_length <= self.model.max_positions:
            raise ValueError(
                f"max_length = {max_length!r} must be at least what the requests need ({needed}) and at most the "
                f"model's {self.model.max_positions} positions"
            )
        names = {name for plan in plans for name in plan.exit_names} | set(exits or ())
        num_slots = num_slots or len(requests)
        evaluated = {exit.point.name for plan in plans for exit in plan.exits} | set(exits or ())
        rule = self._rule_for(evaluated, num_slots)
        alone = partial(self._table, num_slots=1)
        for plan in [*plans, *usual]:
            if plan.by_value and plan.exits:
                alone(plan.exit_names)  # not in the middle of other sequences' answers
        session = DecodingSession(self.model, mode, policy, names, num_slots, max_length, rule, alone)
        for own, plan in zip(requests, plans, strict=False):
            session.admit(own, plan)
        return session

    def _rule_for(self, evaluated: Collection[str], num_slots: int) -> CostRule | None:
        """The cost rule of a session with so many slots that evaluates these exits; None without exits. Measures the
        cost table where there is none yet."""
        rule = self._cost_rule
        if rule == "none" or not evaluated:
            return None
        if isinstance(rule, CostRule):
            raise_all(list(rule.problems(sorted(evaluated), num_slots)))
            return rule
        return CostRule(self._table(evaluated, num_slots))

    def _table(self, exits: Collection[str], num_slots: int) -> CostTable:
        """The cost table of these exits in a session with so many slots; measured where there is none yet."""
        key = (num_slots, tuple(sorted(exits)))
        if key not in self._tables:
            self._tables[key] = measure_costs(self.model, key[1], num_slots)
        return self._tables[key]

    def _room_problems(
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
        """Score given text: each token after the context at the exit at which it would leave.

        The first scored token is read from the final exit, as the first generated one is; in `static_depth` every
        token is read from the one exit.

        Args:
            tokens: token ids of each sequence, ragged, context included; at most the model's positions and one, since
                the last token is predicted and not read.
            num_context: number of leading tokens that are context (at least 1), for all sequences or for each.
            mode: one of `MODES`; `self_speculative` scores as `full` does.
            policy: as in `generate`.

        Raises:
            ValueError: with every problem of the call, before anything runs.
        """
        _refuse_unused_cap(mode, policy)
        problems: list[str] = [] if tokens else ["no sequences were given; give at least one"]
        contexts = per_sequence("num_context", num_context, len(tokens), int, problems)
        for index, (own, context) in enumerate(zip(tokens, contexts, strict=False)):
            problems += token_problems(self.model.vocab_size, f"sequence {index}", own)
            if not is_whole(context) or not 1 <= context < len(own):
                problems.append(
                    f"sequence {index}: num_context = {context!r} must be at least 1 and leave one of its {len(own)} "
                    "tokens to score; put a begin-of-text token before text without context"
                )
            if len(own) - 1 > self.model.max_positions:  # the last token is only predicted
                problems.append(
                    f"sequence {index}: {len(own) - 1} tokens before the last one are more than the model's "
                    f"{self.model.max_positions} positions; shorten it or score it in windows"
                )
        plan = plan_or_problem(self.model, "full" if mode == "self_speculative" else mode, policy, problems)
        raise_all(problems)
        return Scorer(self.model, plan).score(tokens, contexts)

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sampling: SamplingParams | Sequence[SamplingParams],
        stop_tokens: Collection[int],
    ) -> list[Request]:
        problems: list[str] = []
        lengths = per_sequence("max_new_tokens", max_new_tokens, len(prompts), int, problems)
        params = per_sequence("sampling", sampling, len(prompts), SamplingParams, problems)
        raise_all(problems)
        stops = frozenset(stop_tokens)
        return [
            Request(tuple(prompt), length, own, stops)
            for prompt, length, own in zip(prompts, lengths, params, strict=True)
        ]


def run_to_end(
    session: DecodingSession, num_sequences: int, after_step: Callable[[Sequence[Event]], None] = lambda events: None
) -> GenerationResult:
    """Run a session with the sequences that it was started with until all have ended.

    Args:
        after_step: called with the events of each step.

    Raises:
        RuntimeError: with every sequence that failed, after all have ended.
    """
    events: list[Event] = []
    while not session.finished:
        new = session.step()
        after_step(new)
        events += new
    raise_failures(events)
    tokens: list[list[int]] = [[] for _ in range(num_sequences)]
    reasons = [""] * num_sequences
    for event in events:
        tokens[event.sequence].append(event.token)
        reasons[event.sequence] = event.finish_reason or ""
    return GenerationResult(
        tokens=tuple(map(tuple, tokens)),
        finish_reasons=tuple(reasons),
        events=tuple(events),
        stats=session.stats(events),
    )


def _events_of(session: DecodingSession) -> Iterator[TokenEvent]:
    """The tokens of a session as they are generated. Failures are raised when all sequences have ended."""
    failures: list[Failure] = []
    while not session.finished:
        for event in session.step():
            if isinstance(event, Failure):
                failures.append(event)
            else:
                yield event
    raise_failures(failures)


def _refuse_unused_cap(mode: str, policy: ExitPolicy | None) -> None:
    """For calls whose mode and policy belong together; a session's policy may serve requests of several modes."""
    problem = policy and unused_cap(mode, policy.max_pending_tokens, policy.num_draft_tokens)
    if problem:
        raise ValueError(problem)
