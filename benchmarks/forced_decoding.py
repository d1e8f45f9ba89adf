# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Forced decoding: known text is fed token by token under an exit policy, each token scored at the exit it left at.

    perplexity = exp(-sum of ln p / tokens)

The work of a step is that of generation, the engine's own descent with its waiting tokens, an argmax and ln p; only
the next token is given instead of chosen. So speed and quality are of the same tokens. And the choice of a policy:
one pass at full depth asks every exit about every token, which gives the perplexity and the price of any policy.

May import: torch, nemo_ee, the modules beside it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.touched_weights import CountingModel
from nemo_ee.generation.descent import Descent, Feed
from nemo_ee.generation.exit_table import ExitTable, TablePass
from nemo_ee.generation.items import Items
from nemo_ee.generation.policy import ExitPolicy, course_of

THRESHOLDS = tuple(number / 100 for number in range(20, 100, 2)) + (0.99, 0.995)
MOST_ACTIVE = 3  # exits of a policy: asking one costs about as much as a layer


@dataclass(frozen=True)
class Forced:
    """One window. By token after the first: ln p at the exit it left at, that exit's choice and its layer; and the
    weights that were read."""

    logprobs: list[float]
    choices: list[int]
    layers: list[int]
    touched: int


@torch.inference_mode()
def force(model: CountingModel, tokens: Sequence[int], policy: ExitPolicy | None) -> Forced:
    """Feed `tokens` one by one; the first is read from the final exit, as a prompt is. `policy`: None = full depth."""
    course = course_of("full" if policy is None else "early_exit", policy, model.exits, model.num_layers)
    descent = Descent(model, model.new_cache(1, len(tokens), course.exit_names))
    descent.admit(0, course)
    before, result = model.touched, Forced([], [], [], 0)
    for position, (token, target) in enumerate(itertools.pairwise(tokens)):
        cap = course.max_waiting
        may_leave = position > 0 and bool(course.exits) and (cap is None or descent.waiting(0) < cap)
        (reading,) = descent.step({0: Feed(position, (token,), may_leave)})
        row = reading.logits[0]
        result.logprobs.append(float(row[target] - row.logsumexp(dim=0)))
        result.choices.append(int(row.argmax()))
        result.layers.append(reading.layer)
    return Forced(result.logprobs, result.choices, result.layers, model.touched - before)


def perplexity(windows: Sequence[Forced]) -> float:
    """Of all tokens of some windows."""
    return math.exp(-math.fsum(itertools.chain.from_iterable(own.logprobs for own in windows)) / _count(windows))


def agreement(windows: Sequence[Forced], full: Sequence[Forced]) -> float:
    """Share of the tokens at which the exit chooses what the final exit does."""
    pairs = zip(windows, full, strict=True)
    same = sum(a == b for own, other in pairs for a, b in zip(own.choices, other.choices, strict=True))
    return same / _count(windows)


def mean_depth(windows: Sequence[Forced]) -> float:
    """Mean number of layers below the exits that tokens left at."""
    return sum(sum(own.layers) for own in windows) / _count(windows)


def _count(windows: Sequence[Forced]) -> int:
    return sum(len(own.logprobs) for own in windows)


class PolicyChoice:
    """Finds policies on given windows: any one to three exits, one threshold for them.

    Args:
        model: with exits.
        windows: token ids.
    """

    def __init__(self, model: Any, windows: Sequence[Sequence[int]]) -> None:
        passes = TablePass(model, None, "max_probability")
        self.table = ExitTable.join([passes.run([own], [1]) for own in windows])
        self.costs = _measured_costs(model)
        self.num_layers = model.num_layers

    def fastest(self, allowed: float, most_active: int = MOST_ACTIVE) -> ExitPolicy:
        """The policy of least expected time with at most so many exits whose perplexity is at most `1 + allowed` times
        that of full depth; where there is none, one that never leaves."""
        names = [point.name for point in self.table.exits]
        sizes = range(1, min(most_active, len(names)) + 1)
        best, least = ExitPolicy(1.0), math.inf
        for active in itertools.chain.from_iterable(itertools.combinations(range(len(names)), size) for size in sizes):
            for threshold in THRESHOLDS:
                ratio, cost = self._outcome(active, threshold)
                if ratio <= 1 + allowed and cost < least:
                    best, least = ExitPolicy(threshold, active=tuple(names[own] for own in active)), cost
        return best

    def _outcome(self, active: Sequence[int], threshold: float) -> tuple[float, float]:
        """(perplexity by that of full depth, expected seconds of a token)."""
        table, num_exits = self.table, len(self.table.exits)
        numbers = [threshold if index in active else 1.0 for index in range(num_exits)]
        choice = table.choices(numbers)
        chosen = table.logprobs.gather(2, choice[..., None])[..., 0]
        excess = (table.logprobs[..., -1] - chosen)[table.valid].double().mean()
        counts = torch.bincount(choice[table.valid], minlength=num_exits + 1).tolist()
        asking, seconds = 0.0, 0.0
        for index, point in enumerate(table.exits):
            if index in active:
                asking += self.costs[point.name]
                seconds += counts[index] * (point.stop * self.costs["half"] + asking)
        seconds += counts[-1] * (2 * self.num_layers * self.costs["half"] + asking + self.costs[None])
        return math.exp(float(excess)), seconds / sum(counts)


def _measured_costs(model: Any) -> dict[str | None, float]:
    """Seconds of a half layer ("half") and of a question to each exit, for one token in a short text."""
    names = tuple(point.name for point in model.exits)
    cache, items = model.new_cache(1, 256, names), Items.of({0: [255]})
    hidden = model.embed(torch.tensor([1]), items)
    bottom = 2 * model.num_layers
    calls = {"half": lambda: model.run(hidden, items, 0, bottom, cache)}
    for name in (*names, None):
        calls[name] = lambda name=name: model.exit_logits(name, hidden, items, cache).softmax(dim=1).max().item()
    # The least of many, in turns: what is chosen should not depend on what else the machine does.
    costs = dict.fromkeys(calls, math.inf)
    for _ in range(100):
        for name, call in calls.items():
            start = time.process_time()
            call()
            costs[name] = min(costs[name], time.process_time() - start)
    costs["half"] /= bottom
    return costs
