# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether exits save time: seconds per token under a policy against those at full depth, from a cost table.

A share p_i of a sequence's tokens runs past the i-th stop with an exit. With B sequences like it in the session, n of
them run segment i in a step, each with the tokens that are pending since it last did:

    n_i ~ Binomial(B, p_i)
    t(policy) = sum_i E[(n_i > 0) start + halves_i c(n_i, 1 / p_i)] + E[exit_i(n_i)] + E[final(n)]
    (with `criterion: probe` an exit is evaluated only at tokens that leave there)
    t(full) = start + halves c(B, 1) + final(B);    exits pay iff run * t(policy) <= emitted * t(full)

c(n, m): seconds of a half layer on m rows of each of n sequences. A matrix product reads its weights once for all
rows, attention reads the cache of each sequence once for all of its rows. Where rows cost little (few sequences), or
where caches cost much (many sequences, long texts), pending tokens save time.

Each sequence decides alone: by its tokens, the table and B, the number of slots of the session (free ones count),
never by its neighbours. So for one table and one B a batch gives each sequence what it gets alone.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_ee.exits.confidence import confidence
from nemo_ee.exits.criteria import OF_LOGITS, PROBE
from nemo_ee.generation.decoding_model import DecodingModel, TokenPositions
from nemo_ee.generation.forward_rows import TokenInput
from nemo_ee.generation.policy import EvaluatedExit, ExitPlan
from nemo_ee.generation.staged_forward import StagedForward

COST_RULES = ("none", "fallback")

# When a sequence decides; see `CostRule.trial_tokens`.
_CLEARLY = 0.05
_TRIALS = 4
# Rows of each sequence that are measured: of one sequence, of any; how often, in turns; and after how many tokens.
_FEWEST_ROWS, _MOST_ROWS = 8, 16
_TURNS = 3
_CONTEXT = 96
_LONGER_CONTEXT, _LONGER_SEQUENCES = 384, 4  # for the share of attention
_DEVIATIONS = 4.0  # standard deviations of a number of sequences


Points = tuple[tuple[int, float], ...]  # (number, seconds), ascending from 1


@dataclasses.dataclass(frozen=True)
class CostTable:
    """Measured seconds of a session with `num_sequences` slots.

    Attributes:
        num_sequences: B.
        half_layer: number of sequences -> (rows of each, seconds of a half layer); ascending, from 1 to B sequences
            and from 1 row.
        exits: exit name -> (number of sequences, seconds of evaluating it at one row of each).
        final: (number of rows, seconds of evaluating the final exit).
        start: seconds of starting another segment, in addition to its half layers.
        context: tokens of each sequence before the rows that were timed.
        attention: seconds that a half layer takes longer for each sequence and token of a longer context.
    """

    num_sequences: int
    half_layer: tuple[tuple[int, Points], ...]
    exits: Mapping[str, Points]
    final: Points
    start: float = 0.0
    context: int = _CONTEXT
    attention: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for points that are none: they would fail at a verdict, in the middle of a text."""
        for points in (self.half_layer, self.final, *self.exits.values(), *(own for _, own in self.half_layer)):
            numbers = [number for number, _ in points]
            if not numbers or numbers[0] != 1 or numbers != sorted(set(numbers)):
                raise ValueError(f"the points of a cost table must ascend from 1, not be at {numbers}")

    def of_rows(self, rows: float, context: int) -> Callable[[int], float]:
        """Number of sequences -> seconds of a half layer on `rows` rows of each, behind a context of so many tokens.
        Linear between measured points."""
        points = [(count, _between(own, rows)) for count, own in self.half_layer]
        longer = self.attention * (context - self.context)
        return lambda sequences: max(0.0, _between(points, sequences) + longer * sequences)

    def of_exit(self, name: str, sequences: float = 1) -> float:
        """Seconds of evaluating an exit at one row of so many sequences."""
        return _between(self.exits[name], sequences)

    def of_final(self, rows: float) -> float:
        """Seconds of evaluating the final exit at so many rows."""
        return _between(self.final, rows)

    @classmethod
    def from_mapping(cls, stored: Mapping[str, Any]) -> CostTable:
        """A table that `dataclasses.asdict` made and JSON stored.

        Raises:
            ValueError: it is not one.
        """
        try:
            return cls(
                **{
                    **stored,
                    "half_layer": tuple((count, _points(own)) for count, own in stored["half_layer"]),
                    "exits": {name: _points(own) for name, own in stored["exits"].items()},
                    "final": _points(stored["final"]),
                }
            )
        except (TypeError, KeyError, AttributeError, ValueError) as problem:
            raise ValueError(f"not a table of costs ({problem!r})") from problem


def _points(stored: Any) -> Points:
    return tuple((int(number), float(seconds)) for number, seconds in stored)


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Linear between points, and beyond them along the nearest two; through 0 where there is one."""
    if len(points) == 1:
        return points[0][1] * at / points[0][0]
    last = next((i for i, (number, _) in enumerate(points) if number >= at and i), len(points) - 1)
    (low, under), (high, over) = points[last - 1 : last + 1]
    return under + (over - under) * (at - low) / (high - low)


@dataclasses.dataclass(frozen=True)
class CostRule:
    """When a sequence stops evaluating its exits.

    Attributes:
        table: the costs, for sessions of `table.num_sequences` slots.
        trial_tokens: number of tokens in which a sequence follows its policy. After them, and after so many more, it
            stops evaluating exits if they cost more than `_CLEARLY` extra time; after `_TRIALS` times as many it
            decides finally. It decides only without unverified drafts, because it is not known how many are accepted.
    """

    table: CostTable
    trial_tokens: int = 16

    def problems(self, evaluated: Sequence[str], num_slots: int) -> Iterator[str]:
        """The problems of the rule in a session with so many slots that evaluates these exits."""
        if isinstance(self.trial_tokens, bool) or not isinstance(self.trial_tokens, int) or self.trial_tokens < 1:
            yield f"the cost rule's trial_tokens = {self.trial_tokens!r} must be a whole number from 1"
        if self.table.num_sequences != num_slots:
            yield (
                f"the cost rule's table is of num_sequences = {self.table.num_sequences}, the session has {num_slots} "
                "slots; give a table that was measured with as many, or cost_rule='fallback'"
            )
        yield from self.missing(evaluated)

    def missing(self, evaluated: Sequence[str]) -> Iterator[str]:
        """The problem of exits that are not in the table."""
        missing = [name for name in evaluated if name not in self.table.exits]
        if missing:
            yield (
                f"the cost rule's table has no seconds of evaluating exit {', '.join(missing)}, only of "
                f"{', '.join(self.table.exits) or 'none'}; measure with every exit that may be evaluated"
            )

    def is_due(self, num_run: int) -> bool:
        """Whether a verdict is due after so many tokens. Drafts are then verified first: without a cap on them there
        might never be a verdict."""
        return num_run in (self.trial_tokens, _TRIALS * self.trial_tokens)

    def next_after(self, num_run: int) -> int:
        """The number of tokens after which the next verdict is due, after one at `num_run` that decided nothing."""
        last = _TRIALS * self.trial_tokens
        return num_run + self.trial_tokens if num_run >= last else min(num_run + self.trial_tokens, last)

    def verdict(
        self, plan: ExitPlan, num_layers: int, left: Mapping[str | None, int], emitted: int, length: int
    ) -> bool | None:
        """Whether a sequence's exits pay; None = not decided yet. Arguments: see `pays`."""
        num_run = sum(left.values())
        if num_run < self.trial_tokens:
            return None
        if num_run >= _TRIALS * self.trial_tokens:
            return self.pays(plan, num_layers, left, emitted, length)
        return None if self.pays(plan, num_layers, left, emitted * (1 + _CLEARLY), length) else False

    def pays(
        self, plan: ExitPlan, num_layers: int, left: Mapping[str | None, int], emitted: float, length: int
    ) -> bool:
        """Whether exits pay for a sequence that goes on as it began.

        Args:
            plan: with at least one exit.
            num_layers: number of the model's layers.
            left: exit name -> number of tokens that left there; None = ran to the end.
            emitted: number of these tokens in the answer, from 1; fewer where drafts were rejected.
            length: its tokens, prompt included.
        """
        table, num_run = self.table, sum(left.values())
        count = table.num_sequences
        going, depth, policy = 1.0, 0, 0.0

        def segment(stop: int) -> float:
            """Seconds from `depth` to `stop`; 0 where every token has left."""
            if not going:
                return 0.0
            half_layer = table.of_rows(1 / going, length)
            return _expected(count, going, lambda n: table.start + (stop - depth) * half_layer(n))

        for exit in plan.exits:
            if exit.point.stop > depth:
                policy += segment(exit.point.stop)
                depth = exit.point.stop
            leaving = left.get(exit.point.name, 0) / num_run
            # A probe costs next to nothing, and the head runs only for tokens that leave.
            evaluated = leaving if plan.criterion == PROBE else going
            policy += _expected(count, evaluated, partial(table.of_exit, exit.point.name))
            going = max(0.0, going - leaving)
        policy += segment(2 * num_layers)
        # A verification reads the pending tokens too, in one product.
        read = 1 / going if plan.verify and going else 1.0
        policy += _expected(count, going, lambda n: table.of_final(n * read))
        full = table.start + 2 * num_layers * table.of_rows(1, length)(count) + table.of_final(count)
        return num_run * policy <= emitted * full


def _expected(count: int, share: float, seconds: Callable[[int], float]) -> float:
    """The expectation of `seconds` of the number of sequences, of `count`, that do what a share of the tokens does.
    None of them takes no time. Numbers that are further than `_DEVIATIONS` from the mean are left out."""
    if share in (0.0, 1.0):
        return seconds(count) if share else 0.0
    spread = _DEVIATIONS * math.sqrt(count * share * (1 - share))
    low, high = max(1, math.floor(count * share - spread)), min(count, math.ceil(count * share + spread))
    numbers = range(low, high + 1)
    ways = [math.lgamma(count + 1) - math.lgamma(n + 1) - math.lgamma(count - n + 1) for n in numbers]  # logarithms
    does, does_not = math.log(share), math.log1p(-share)
    chances = [math.exp(way + n * does + (count - n) * does_not) for n, way in zip(numbers, ways, strict=True)]
    return sum(chance * seconds(n) for n, chance in zip(numbers, chances, strict=True))


@torch.inference_mode()
def measure_costs(model: DecodingModel, exits: Sequence[str], num_sequences: int) -> CostTable:
    """Time a few tokens after a context of `_CONTEXT` tokens (or what there is room for); the least of some turns.

    Takes as long as one or two hundred steps of decoding.

    Args:
        model: a model on one rank.
        exits: names of the exits that may be evaluated.
        num_sequences: number of sequences in the forward pass.

    Raises:
        ValueError: the model is on several ranks.
    """
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    if model.run_pending_after is not None or not (alone or torch.distributed.get_world_size() == 1):
        # Ranks that share layers would each measure their own times, and decide differently.
        raise ValueError(
            "cost_rule = 'fallback' and draft_rule = 'value' cannot time a model on several ranks; use 'none' and "
            "'fixed', or one rank"
        )
    timer = _Timer(model, exits, num_sequences)
    counts = [*(1 << power for power in range((num_sequences - 1).bit_length())), num_sequences]
    rows = {count: timer.rows_of(count) for count in counts}
    calls: dict[Any, Callable[[], object]] = {
        (count, each): partial(timer.run, count, each) for count in counts for each in rows[count]
    }
    calls |= {(name, count): timer.evaluation(name, count, 1) for name in exits for count in counts}
    # Also more rows than there are sequences: a verification reads several of each.
    read = sorted({*counts, *(each for each in rows[1] if each > num_sequences)})
    calls |= {(None, n): timer.evaluation(None, *((n, 1) if n in counts else (1, n))) for n in read}
    calls |= {"start": partial(timer.start, again=True), "no start": partial(timer.start, again=False)}
    seconds = timer.seconds(calls)
    few = min(num_sequences, _LONGER_SEQUENCES)
    longer = _Timer(model, exits, few, context=_LONGER_CONTEXT)
    more = longer.seconds({few: partial(longer.run, few, 1)})[few] - seconds[few, 1]
    tokens = few * 2 * model.num_layers * (longer.context - timer.context)
    return CostTable(
        num_sequences,
        tuple(
            (count, tuple((each, seconds[count, each] / (2 * model.num_layers)) for each in rows[count]))
            for count in counts
        ),
        {name: tuple((count, seconds[name, count]) for count in counts) for name in exits},
        tuple((number, seconds[None, number]) for number in read),
        max(0.0, seconds["start"] - seconds["no start"]),
        timer.context,
        # A few tokens more would be lost in the noise.
        max(0.0, more / tokens) if longer.context >= timer.context + _CONTEXT else 0.0,
    )


class _Timer:
    """Calls to time on a cache in which `num_sequences` sequences have a context."""

    def __init__(
        self, model: DecodingModel, exits: Sequence[str], num_sequences: int, *, context: int = _CONTEXT
    ) -> None:
        self._model, self._num_sequences = model, num_sequences
        self._most = max(1, min(_MOST_ROWS, model.max_positions // 2))
        self.context = max(1, min(context, model.max_positions - self._most))
        self._cache = model.new_cache(num_sequences, self.context + self._most, tuple(exits))
        forward = StagedForward(model, self._cache)
        # Infinite thresholds: no token leaves, but exits with a layer of their own write their keys and values.
        plan = ExitPlan(tuple(EvaluatedExit(point, math.inf) for point in model.exits if point.name in exits))
        for slot in range(num_sequences):
            forward.admit(slot, plan)
        tokens = [0] * self.context
        forward.step({slot: TokenInput(0, tokens) for slot in range(num_sequences)}, read_ends=False)
        self._hidden, self._positions = self._embedded(num_sequences, 1)
        self._drop()

    def rows_of(self, count: int) -> list[int]:
        """The rows of each of `count` sequences to time. In a session of B sequences about B tokens run at a time."""
        enough = max(2, 2 * self._num_sequences // count, _FEWEST_ROWS if count == 1 else 0)
        return [1 << power for power in range(5) if 1 << power <= min(enough, self._most)]

    def seconds(self, calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
        """The least seconds of each call over some turns."""
        found = dict.fromkeys(calls, math.inf)
        for _ in range(_TURNS):
            for kind, call in calls.items():
                for _ in range(2):  # the first call fills the processor caches
                    started = time.perf_counter()
                    call()
                    self._wait()
                    found[kind] = min(found[kind], time.perf_counter() - started)
                    self._drop()
        return found

    def _drop(self) -> None:
        for slot in range(self._num_sequences):
            self._cache.truncate(slot, self.context)
        self._wait()

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)

    def _embedded(self, count: int, each: int) -> tuple[Tensor, TokenPositions]:
        spans = {slot: range(self.context, self.context + each) for slot in range(count)}
        rows, tokens = TokenPositions.with_tokens(spans, None, self._model.device)
        return self._model.embed(tokens, rows), rows

    def run(self, count: int, each: int) -> None:
        """All layers on `each` rows of each of `count` sequences."""
        self._model.run(*self._embedded(count, each), 0, 2 * self._model.num_layers, self._cache)

    def start(self, *, again: bool) -> None:
        """A half layer, after what precedes a segment (`again`) or without it."""
        hidden, positions = self._hidden, self._positions
        if again:
            hidden = torch.cat(hidden.split(1))
            spans = {slot: range(self.context, self.context + 1) for slot in range(self._num_sequences)}
            positions = TokenPositions.of(spans, self._model.device)
        self._model.run(hidden, positions, 0, 1, self._cache)

    def evaluation(self, name: str | None, count: int, each: int) -> Callable[[], object]:
        """An exit at `each` rows of each of `count` sequences."""
        stops = {point.name: point.stop for point in self._model.exits} | {None: 2 * self._model.num_layers}
        hidden, positions = self._embedded(count, each)
        tap = self._model.run(hidden, positions, 0, stops[name], self._cache)
        self._drop()
        return lambda: confidence(self._model.exit_logits(name, tap, positions, self._cache), OF_LOGITS[0]).tolist()


def unknown_cost_rule(rule: object) -> str:
    """The message for a rule that is not one of `COST_RULES`."""
    return f"cost_rule = {rule!r} is unknown; use one of {', '.join(COST_RULES)}"
