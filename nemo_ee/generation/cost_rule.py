# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether exits save time: seconds per token under a policy against those at full depth, from a cost table.

A share p_i of a sequence's tokens runs past the i-th stop with an exit. With B sequences like it in the session, the
forward pass runs segment i if a token of any of them does, together with the tokens that are pending since the last
time:

    a_i = 1 - (1 - p_i)^B,    t(policy) = sum_i a_i [start + halves_i c(1 / a_i) + exit_i] + a_end final
    t(full) = start + halves c(1) + final;    exits pay iff run * t(policy) <= emitted * t(full)

c(m): seconds of a half layer on m rows of each of B sequences. A matrix product reads its weights once for all rows.
Where c is flat (one sequence) pending tokens therefore save time; where it is steep (many sequences) they do not.

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
from nemo_ee.exits.criteria import CRITERIA
from nemo_ee.generation.decoding_model import DecodingModel, TokenPositions
from nemo_ee.generation.policy import EvaluatedExit, ExitPlan
from nemo_ee.generation.staged_forward import StagedForward, TokenInput

COST_RULES = ("none", "fallback")

# When a sequence decides; see `CostRule.trial_tokens`.
_CLEARLY = 0.05
_TRIALS = 4
# Rows of each sequence that are measured, and how often, in turns.
_ROWS = (1, 2, 4, 8)
_TURNS = 3
_CONTEXT = 96


@dataclasses.dataclass(frozen=True)
class CostTable:
    """Measured seconds for a batch of `num_sequences` sequences, all at one context length.

    `measure_costs` uses a context of `_CONTEXT` tokens. Longer contexts cost more attention time, which this table
    ignores: where attention is much of a half layer, decisions for long texts can be wrong. The table does not follow
    a session's `max_length`, because that may come from the longest sequence of a batch: neighbours must not matter.

    Attributes:
        num_sequences: B.
        half_layer: (rows of each sequence, seconds of a half layer), ascending from 1 row.
        exits: exit name -> seconds of evaluating it at one row of each sequence.
        final: seconds of evaluating the final exit at one row of each sequence.
        start: seconds of starting another segment, in addition to its half layers.
    """

    num_sequences: int
    half_layer: tuple[tuple[float, float], ...]
    exits: Mapping[str, float]
    final: float
    start: float = 0.0

    def seconds(self, rows: float) -> float:
        """Seconds of a half layer on `rows` (from 1) rows of each sequence; linear between measured points."""
        points = self.half_layer
        if len(points) == 1:
            return points[0][1] * rows
        last = next((i for i, (count, _) in enumerate(points) if count >= rows and i), len(points) - 1)
        (low, under), (high, over) = points[last - 1 : last + 1]
        return under + (over - under) * (rows - low) / (high - low)


@dataclasses.dataclass(frozen=True)
class CostRule:
    """When a sequence stops evaluating its exits.

    Attributes:
        table: the costs, for sessions of `table.num_sequences` slots.
        trial_tokens: number of tokens in which a sequence follows its policy. From then on it stops evaluating exits
            as soon as they cost more than `_CLEARLY` extra time; after `_TRIALS` times as many tokens it decides
            finally. It decides only without unverified drafts, because it is not known how many are accepted.
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

    def verdict(self, plan: ExitPlan, num_layers: int, left: Mapping[str | None, int], emitted: int) -> bool | None:
        """Whether a sequence's exits pay; None = not decided yet. Arguments: see `pays`."""
        num_run = sum(left.values())
        if num_run < self.trial_tokens:
            return None
        if num_run >= _TRIALS * self.trial_tokens:
            return self.pays(plan, num_layers, left, emitted)
        return None if self.pays(plan, num_layers, left, emitted * (1 + _CLEARLY)) else False

    def pays(self, plan: ExitPlan, num_layers: int, left: Mapping[str | None, int], emitted: float) -> bool:
        """Whether exits pay for a sequence that goes on as it began.

        Args:
            plan: with at least one exit.
            num_layers: number of the model's layers.
            left: exit name -> number of tokens that left there; None = ran to the end.
            emitted: number of these tokens in the answer, from 1; fewer where drafts were rejected.
        """
        table, num_run = self.table, sum(left.values())
        going, depth, policy = 1.0, 0, 0.0

        def segment(stop: int) -> float:
            """Seconds from `depth` to `stop`; 0 where every token has left."""
            passing = self._any(going)
            return 0.0 if passing == 0 else passing * (table.start + (stop - depth) * table.seconds(1 / passing))

        for exit in plan.exits:
            if exit.point.stop > depth:
                policy += segment(exit.point.stop)
                depth = exit.point.stop
            policy += self._any(going) * table.exits[exit.point.name]
            going = max(0.0, going - left.get(exit.point.name, 0) / num_run)
        policy += segment(2 * num_layers) + self._any(going) * table.final
        full = table.start + 2 * num_layers * table.seconds(1) + table.final
        return num_run * policy <= emitted * full

    def _any(self, share: float) -> float:
        """Share of forward passes in which at least one sequence does what this share of the tokens does."""
        return 1 - (1 - share) ** self.table.num_sequences


@torch.inference_mode()
def measure_costs(model: DecodingModel, exits: Sequence[str], num_sequences: int) -> CostTable:
    """Time a few tokens after a context of `_CONTEXT` tokens (or what there is room for); the least of some turns.

    Takes as long as about fifty steps of decoding.

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
        raise ValueError("cost_rule = 'fallback' cannot time a model on several ranks; use 'none', or one rank")
    rows = [count for count in _ROWS if count == 1 or 2 * count <= model.max_positions]
    context = max(1, min(_CONTEXT, model.max_positions - rows[-1]))
    slots, cache = range(num_sequences), model.new_cache(num_sequences, context + rows[-1], tuple(exits))
    forward = StagedForward(model, cache)
    # Infinite thresholds: no token leaves, but exits with a layer of their own write their keys and values.
    plan = ExitPlan(tuple(EvaluatedExit(point, math.inf) for point in model.exits if point.name in exits))
    for slot in slots:
        forward.admit(slot, plan)
    forward.step({slot: TokenInput(0, [0] * context) for slot in slots}, read_ends=False)
    calls = _calls(model, exits, rows, dict.fromkeys(slots, context), cache)
    seconds = dict.fromkeys(calls, math.inf)
    for _ in range(_TURNS):
        for kind, call in calls.items():
            for _ in range(2):  # the first call fills the processor caches
                started = time.perf_counter()
                call()
                seconds[kind] = min(seconds[kind], time.perf_counter() - started)
                for slot in slots:
                    cache.truncate(slot, context)
    halves = tuple((count, seconds[count] / (2 * model.num_layers)) for count in rows)
    start = max(0.0, seconds["start"] - seconds["half layer"])
    return CostTable(num_sequences, halves, {name: seconds[name] for name in exits}, seconds[None], start)


def _calls(
    model: DecodingModel, exits: Sequence[str], rows: Sequence[int], places: Mapping[int, int], cache: Any
) -> dict[int | str | None, Callable[[], object]]:
    """The timed calls, by number of rows, "start", "half layer" and exit name. `places`: slot -> next position."""
    device = model.device

    def embedded(count: int) -> tuple[Tensor, TokenPositions]:
        spans = {slot: range(place, place + count) for slot, place in places.items()}
        rows, tokens = TokenPositions.with_tokens(spans, None, device)
        return model.embed(tokens, rows), rows

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def run(count: int) -> None:
        model.run(*embedded(count), 0, 2 * model.num_layers, cache)
        wait()

    hidden, positions = embedded(1)

    def start() -> None:
        again = torch.cat(hidden.split(1))
        fresh = TokenPositions.of({slot: range(place, place + 1) for slot, place in places.items()}, device)
        model.run(again, fresh, 0, 1, cache)
        wait()

    def half_layer() -> None:
        model.run(hidden, positions, 0, 1, cache)
        wait()

    def evaluate(name: str | None, at: Tensor) -> list[float]:
        return confidence(model.exit_logits(name, at, positions, cache), CRITERIA[0]).tolist()

    stops = {point.name: point.stop for point in model.exits} | {None: 2 * model.num_layers}
    taps = {}
    for name in (*exits, None):
        taps[name] = model.run(hidden, positions, 0, stops[name], cache)
        for slot, place in places.items():
            cache.truncate(slot, place)

    calls: dict[int | str | None, Callable[[], object]] = {count: partial(run, count) for count in rows}
    calls |= {"start": start, "half layer": half_layer}
    return calls | {name: partial(evaluate, name, at) for name, at in taps.items()}


def unknown_cost_rule(rule: object) -> str:
    """The message for a rule that is not one of `COST_RULES`."""
    return f"cost_rule = {rule!r} is unknown; use one of {', '.join(COST_RULES)}"
