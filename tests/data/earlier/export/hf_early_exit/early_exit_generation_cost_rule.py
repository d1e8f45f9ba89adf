# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether exits pay: seconds of a token under a policy against seconds of a token at full depth, from a cost table.

Of a sequence's fed tokens a share p_i goes past the i-th of the stops where its exits are. With B sequences like it in
the session, a flight runs segment i if any of them goes there, with the tokens that have waited since the last time:

    a_i = 1 - (1 - p_i)^B,    t(policy) = sum_i a_i [start + halves_i c(1 / a_i) + asked_i] + a_end final
    t(full) = start + halves c(1) + final;    exits pay iff fed * t(policy) <= emitted * t(full)

c(m): seconds of a half layer on m rows of each of B sequences. Products read their weights once for many rows, so
where c is flat (one sequence) tokens that wait save time, and where it is steep (many sequences) they do not.

The decision is one sequence's own: it depends on its tokens, on the table and on B, the places in the session, taken
or not; never on who its neighbours are. So for one table and one B a batch gives each sequence what it gets alone.

May import: torch, `nemo_ee.exits` and `nemo_ee.generation.{descent,items,policy}`.
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

from .early_exit_exits_confidence import CRITERIA, confidence
from .early_exit_generation_descent import Descent, Feed
from .early_exit_generation_items import DecodingModel, Items
from .early_exit_generation_policy import AskedExit, Course

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
    """Seconds, with so many sequences in one flight.

    All of them at one length of the sequences, in a table of `measure_costs` `_CONTEXT` tokens. Longer ones attend to
    more, which it does not say: where attention is much of a half layer a verdict on long texts can be wrong. It does
    not follow a session's `max_length`, which may come from the longest of a batch: neighbours would then matter.

    Attributes:
        num_sequences: B.
        half_layer: (rows of each sequence, seconds of a half layer), ascending from 1 row.
        asked: of asking each exit about one row of each sequence, by name.
        final: of reading one row of each sequence from the final exit.
        start: of beginning another segment, beside its half layers.
    """

    num_sequences: int
    half_layer: tuple[tuple[float, float], ...]
    asked: Mapping[str, float]
    final: float
    start: float = 0.0

    def seconds(self, rows: float) -> float:
        """Of a half layer on `rows` (from 1) of each sequence: linear between, and beyond, what was measured."""
        points = self.half_layer
        if len(points) == 1:
            return points[0][1] * rows
        last = next((i for i, (count, _) in enumerate(points) if count >= rows and i), len(points) - 1)
        (low, under), (high, over) = points[last - 1 : last + 1]
        return under + (over - under) * (rows - low) / (high - low)


@dataclasses.dataclass(frozen=True)
class CostRule:
    """When a sequence stops asking its exits.

    Attributes:
        table: for sessions of `table.num_sequences` places.
        trial_tokens: fed tokens in which a sequence follows its policy. Then it stops asking as soon as that is slower
            by more than `_CLEARLY`; after `_TRIALS` times as many tokens it decides for good. It decides only when no
            drafts wait, as they are fed tokens of which nobody knows yet whether they are emitted.
    """

    table: CostTable
    trial_tokens: int = 16

    def faults(self, asked: Sequence[str], num_slots: int) -> Iterator[str]:
        """Why it cannot be that of a session of so many places in which these exits are asked."""
        if isinstance(self.trial_tokens, bool) or not isinstance(self.trial_tokens, int) or self.trial_tokens < 1:
            yield f"the cost rule's trial_tokens = {self.trial_tokens!r} must be a whole number from 1"
        if self.table.num_sequences != num_slots:
            yield (
                f"the cost rule's table is of num_sequences = {self.table.num_sequences}, the session has {num_slots} "
                "places; give a table that was measured with as many, or cost_rule='fallback'"
            )
        yield from self.missing(asked)

    def missing(self, asked: Sequence[str]) -> Iterator[str]:
        """The fault of exits whose seconds its table does not have."""
        missing = [name for name in asked if name not in self.table.asked]
        if missing:
            yield (
                f"the cost rule's table has no seconds of asking exit {', '.join(missing)}, only of "
                f"{', '.join(self.table.asked) or 'none'}; measure with every exit that may be asked"
            )

    def is_due(self, fed: int) -> bool:
        """Whether this is the end of the trial, or of the time to decide: drafts that wait then are checked first, or
        without a cap on them there might never be a verdict."""
        return fed in (self.trial_tokens, _TRIALS * self.trial_tokens)

    def verdict(self, course: Course, num_layers: int, left: Mapping[str | None, int], emitted: int) -> bool | None:
        """Whether a sequence's exits pay; None while that is open. Arguments: see `pays`."""
        fed = sum(left.values())
        if fed < self.trial_tokens:
            return None
        if fed >= _TRIALS * self.trial_tokens:
            return self.pays(course, num_layers, left, emitted)
        return None if self.pays(course, num_layers, left, emitted * (1 + _CLEARLY)) else False

    def pays(self, course: Course, num_layers: int, left: Mapping[str | None, int], emitted: float) -> bool:
        """Whether exits pay for a sequence that goes on as it began.

        Args:
            course: asks at least one exit.
            num_layers: of the model.
            left: how many of its fed tokens left at each exit; None = went to the end.
            emitted: how many of them are tokens of its answer, from 1; fewer where drafts were rejected.
        """
        table, fed = self.table, sum(left.values())
        going, depth, policy = 1.0, 0, 0.0

        def segment(stop: int) -> float:
            """From `depth` on; where every token leaves nothing deeper is counted."""
            passing = self._any(going)
            return 0.0 if passing == 0 else passing * (table.start + (stop - depth) * table.seconds(1 / passing))

        for exit in course.exits:
            if exit.point.stop > depth:
                policy += segment(exit.point.stop)
                depth = exit.point.stop
            policy += self._any(going) * table.asked[exit.point.name]
            going = max(0.0, going - left.get(exit.point.name, 0) / fed)
        policy += segment(2 * num_layers) + self._any(going) * table.final
        full = table.start + 2 * num_layers * table.seconds(1) + table.final
        return fed * policy <= emitted * full

    def _any(self, share: float) -> float:
        """Of flights in which at least one of the sequences does what this share of the tokens does."""
        return 1 - (1 - share) ** self.table.num_sequences


@torch.inference_mode()
def measure_costs(model: DecodingModel, exits: Sequence[str], num_sequences: int) -> CostTable:
    """Run a few tokens after a context of `_CONTEXT`, or what there is room for, and take the time: the least of some
    turns. Takes as long as some fifty steps of decoding.

    Args:
        model: on one stage.
        exits: names of those that may be asked.
        num_sequences: in a flight.

    Raises:
        ValueError: the model stands on several ranks, or its cache cannot be truncated.
    """
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    if getattr(model, "fill_ahead", None) is not None or not (alone or torch.distributed.get_world_size() == 1):
        # Ranks that share layers would each measure their own times, and decide differently.
        raise ValueError("cost_rule = 'fallback' cannot time a model on several ranks; use 'none', or one rank")
    rows = [count for count in _ROWS if count == 1 or 2 * count <= model.max_positions]
    context = max(1, min(_CONTEXT, model.max_positions - rows[-1]))
    slots, cache = range(num_sequences), model.new_cache(num_sequences, context + rows[-1], tuple(exits))
    if not hasattr(cache, "truncate"):
        raise ValueError("cost_rule = 'fallback' needs a model whose cache can be truncated; use 'none'")
    descent = Descent(model, cache)
    # Never sure, but heard of by its exits: those with a layer of their own have keys and values of the context.
    course = Course(tuple(AskedExit(point, math.inf) for point in model.exits if point.name in exits))
    for slot in slots:
        descent.admit(slot, course)
    descent.step({slot: Feed(0, [0] * context) for slot in slots}, reading=False)
    calls = _calls(model, exits, rows, dict.fromkeys(slots, context), cache)
    seconds = dict.fromkeys(calls, math.inf)
    for _ in range(_TURNS):
        for kind, call in calls.items():
            for _ in range(2):  # the first brings back into the caches what other calls drove out
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
    """What is timed: by number of rows, "start", "half layer", name of an exit. `places`: slot -> next position."""
    device = getattr(model, "device", torch.device("cpu"))

    def embedded(count: int) -> tuple[Tensor, Items]:
        positions = {slot: range(place, place + count) for slot, place in places.items()}
        items, tokens = Items.with_tokens(positions, None, device)
        return model.embed(tokens, items), items

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def run(count: int) -> None:
        model.run(*embedded(count), 0, 2 * model.num_layers, cache)
        wait()

    hidden, items = embedded(1)

    def start() -> None:
        again = torch.cat(hidden.split(1))
        fresh = Items.of({slot: range(place, place + 1) for slot, place in places.items()}, device)
        model.run(again, fresh, 0, 1, cache)
        wait()

    def half_layer() -> None:
        model.run(hidden, items, 0, 1, cache)
        wait()

    def ask(name: str | None, at: Tensor) -> list[float]:
        return confidence(model.exit_logits(name, at, items, cache), CRITERIA[0]).tolist()

    stops = {point.name: point.stop for point in model.exits} | {None: 2 * model.num_layers}
    taps = {}
    for name in (*exits, None):
        taps[name] = model.run(hidden, items, 0, stops[name], cache)
        for slot, place in places.items():
            cache.truncate(slot, place)

    calls: dict[int | str | None, Callable[[], object]] = {count: partial(run, count) for count in rows}
    calls |= {"start": start, "half layer": half_layer}
    return calls | {name: partial(ask, name, at) for name, at in taps.items()}


def unknown_cost_rule(rule: object) -> str:
    """The fault of a rule that is none of `COST_RULES`."""
    return f"cost_rule = {rule!r} is unknown; use one of {', '.join(COST_RULES)}"
