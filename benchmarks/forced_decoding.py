# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Forced decoding: given text runs token by token under an exit policy, each token scored at the exit it left at.

    perplexity = exp(-sum of ln p / tokens)

The work of a step is that of generation (the staged forward with pending tokens, an argmax and ln p); only the next
token is given instead of chosen. So speed and quality are measured on the same tokens. For the choice of a policy one
pass at full depth evaluates every exit at every token, which gives the perplexity and the cost of any policy.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.touched_weights import CountingModel
from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.generation.exit_trace import ExitTrace, TracePass
from nemo_ee.generation.policy import ExitPolicy, plan_exits
from nemo_ee.generation.staged_forward import StagedForward, TokenInput

THRESHOLDS = tuple(number / 100 for number in range(20, 100, 2)) + (0.99, 0.995, 0.998)
Outcome = tuple[float, float, tuple[float, ...]]  # (mean excess in nats, seconds, thresholds)
PRICES = 14  # steps of the bisection
FILLED = 5  # rows of a step that runs pending tokens too


@dataclass(frozen=True)
class Forced:
    """Results of one window. For each token after the first: ln p at the exit it left at, that exit's choice and its
    layer; and the number of weights that were read."""

    logprobs: list[float]
    choices: list[int]
    layers: list[int]
    touched: int


@torch.inference_mode()
def force(model: CountingModel, tokens: Sequence[int], policy: ExitPolicy | None) -> Forced:
    """Run `tokens` one by one; the first is read from the final exit, as a prompt is. `policy`: None = full depth."""
    plan = plan_exits("full" if policy is None else "early_exit", policy, model.exits, model.num_layers)
    forward = StagedForward(model, model.new_cache(1, len(tokens), plan.exit_names))
    forward.admit(0, plan)
    before, result = model.touched, Forced([], [], [], 0)
    for position, (token, target) in enumerate(itertools.pairwise(tokens)):
        cap = plan.max_pending_tokens
        allow_exit = position > 0 and bool(plan.exits) and (cap is None or forward.num_pending(0) < cap)
        (output,) = forward.step({0: TokenInput(position, (token,), allow_exit)})
        row = output.logits[0]
        result.logprobs.append(float(row[target] - row.logsumexp(dim=0)))
        result.choices.append(int(row.argmax()))
        result.layers.append(output.layer)
    return Forced(result.logprobs, result.choices, result.layers, model.touched - before)


def perplexity(windows: Sequence[Forced]) -> float:
    """Perplexity of all tokens of some windows."""
    return math.exp(-math.fsum(itertools.chain.from_iterable(own.logprobs for own in windows)) / _count(windows))


def agreement(windows: Sequence[Forced], full: Sequence[Forced]) -> float:
    """Share of the tokens at which the exit chooses the final exit's token."""
    pairs = zip(windows, full, strict=True)
    same = sum(a == b for own, other in pairs for a, b in zip(own.choices, other.choices, strict=True))
    return same / _count(windows)


def mean_depth(windows: Sequence[Forced]) -> float:
    """Mean number of layers below the exits that tokens left at."""
    return sum(sum(own.layers) for own in windows) / _count(windows)


def _count(windows: Sequence[Forced]) -> int:
    return sum(len(own.logprobs) for own in windows)


class PolicyChoice:
    """Finds policies on given windows: a threshold per exit, without exits that cost more time than they save.

    For a price of a nat, seconds + price x excess nats is lowered by the one change of one threshold that helps most,
    again and again until none helps; the price is searched by bisection. In the fastest policy seen within the limit
    the thresholds in use are then moved within it.

    Args:
        model: a model with exits.
        windows: token ids of each window.
    """

    def __init__(self, model: Any, windows: Sequence[Sequence[int]]) -> None:
        passes = TracePass(model, None, "max_probability")
        table = ExitTrace.join([passes.run([own], [1]) for own in windows])
        scored = table.valid.clone()
        scored[:, 0] = False  # the first token of a window is the final exit's under every policy
        self.names = [point.name for point in table.exits]
        self.confidences = table.confidences[scored]  # [tokens, e]
        # [tokens, e + 1] nats more than at the final exit
        self.excess = (table.logprobs[..., -1:] - table.logprobs)[scored].double()
        costs, bottom = _measured_costs(model), 2 * model.num_layers
        stops = [*(point.stop for point in table.exits), bottom]
        # [e + 1] seconds of a token that leaves there: its own layers, and later the rest as one more row of another
        # token.
        self.way = torch.tensor([own * costs["half"] + (bottom - own) * costs["row"] for own in stops]).double()
        self.evaluation = torch.tensor([costs[name] for name in (*self.names, None)]).double()

    def fastest(self, allowed: float, most_active: int | None = None) -> ExitPolicy:
        """The policy of least expected time with at most so many exits (None = any number) whose perplexity is at most
        `1 + allowed` times that of full depth; where there is none, one that never leaves."""
        limit, never = math.log1p(allowed), (1.0,) * len(self.names)
        seen = [(*self._outcome(own), own) for own in (never, *self._neighbours(never, range(len(never))))]
        low, high = 0.0, 100 * seen[0][1]
        for _ in range(PRICES):
            price = (low + high) / 2
            seen += self._descend(price, most_active or len(self.names))
            low, high = (price, high) if seen[-1][0] > limit else (low, price)
        best, least = self._fastest(seen, limit)
        while True:
            in_use = [index for index, own in enumerate(best) if own < 1.0]
            seen = [(*self._outcome(own), own) for own in (best, *self._neighbours(best, in_use))]
            found, seconds = self._fastest(seen, limit)
            if seconds >= least:
                break
            best, least = found, seconds
        chosen = {name: own for name, own in zip(self.names, best, strict=True) if own < 1.0}
        return ExitPolicy(chosen or 1.0, active=tuple(chosen))

    @staticmethod
    def _neighbours(numbers: Sequence[float], indices: Iterable[int]) -> list[tuple[float, ...]]:
        """The policies with another threshold at one of these exits."""
        return [(*numbers[:own], value, *numbers[own + 1 :]) for own in indices for value in THRESHOLDS]

    @staticmethod
    def _fastest(seen: Iterable[Outcome], limit: float) -> tuple[tuple[float, ...], float]:
        """(thresholds, seconds) of the fastest policy seen within the limit."""
        seconds, numbers = min((seconds, numbers) for excess, seconds, numbers in seen if excess <= limit)
        return numbers, seconds

    def _descend(self, price: float, most_active: int) -> Iterator[Outcome]:
        """Every step down, the policy that never leaves first."""
        numbers = (1.0,) * len(self.names)
        excess, score = self._outcome(numbers)
        yield excess, score, numbers
        while True:
            trials = []
            for index in range(len(numbers)):
                others = sum(own < 1.0 for own in (*numbers[:index], *numbers[index + 1 :]))
                trials += [self._best_threshold(index, numbers, price)] if others < most_active else []
            lowest, index, threshold = min(trials)
            if lowest > score - 1e-9:
                return
            numbers, score = (*numbers[:index], threshold, *numbers[index + 1 :]), lowest
            yield (*self._outcome(numbers), numbers)

    def _best_threshold(self, index: int, numbers: Sequence[float], price: float) -> tuple[float, int, float]:
        """(seconds + price x excess, index, threshold) of the best threshold of one exit, the others as they are."""
        without = (*numbers[:index], 1.0, *numbers[index + 1 :])
        choice, total = self._choices(without), self._totals(without)
        here = choice > index  # tokens that come this far
        stay = total[choice] + price * _at(self.excess, choice)
        leave = self._totals((*numbers[:index], 0.0, *numbers[index + 1 :]))[index] + price * self.excess[:, index]
        gain = (leave - stay - self.evaluation[index])[here]
        place = torch.bucketize(self.confidences[here, index], torch.tensor(THRESHOLDS))  # leaves below so many
        gains = torch.zeros(len(THRESHOLDS) + 1, dtype=torch.float64).index_add_(0, place, gain)
        # For threshold i: the tokens whose confidence is above it.
        sums = gains.flip(0).cumsum(0).flip(0)[1:] + self.evaluation[index] * here.sum()
        best = int(sums.argmin())
        nothing = (stay.mean().item(), index, 1.0)
        return min(nothing, (((stay.sum() + sums[best]) / len(stay)).item(), index, THRESHOLDS[best]))

    def _outcome(self, numbers: Sequence[float]) -> tuple[float, float]:
        """(mean excess in nats, expected seconds) per token."""
        choice = self._choices(numbers)
        return _at(self.excess, choice).mean().item(), self._totals(numbers)[choice].mean().item()

    def _choices(self, numbers: Sequence[float]) -> torch.Tensor:
        """The exit at which each token leaves, `[tokens]`."""
        passes = self.confidences > torch.tensor(numbers)
        return torch.cat([passes, torch.ones(len(passes), 1, dtype=torch.bool)], dim=1).int().argmax(dim=1)

    def _totals(self, numbers: Sequence[float]) -> torch.Tensor:
        """Seconds of a token that leaves at each exit, with the evaluations on its way, `[e + 1]`."""
        active = torch.tensor([*(own < 1.0 for own in numbers), True])
        return self.way + (self.evaluation * active).cumsum(0)


def _at(values: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
    return values.gather(1, choice[:, None])[:, 0]


def _measured_costs(model: Any) -> dict[str | None, float]:
    """Seconds of a half layer for one token in a short text ("half"), of one more row in it ("row"), and of evaluating
    each exit."""
    names = tuple(point.name for point in model.exits)
    cache, bottom, calls = model.new_cache(1, 256, names), 2 * model.num_layers, {}
    for rows in (1, FILLED):
        positions = TokenPositions.of({0: range(256 - rows, 256)})
        hidden = model.embed(torch.ones(rows, dtype=torch.long), positions)
        calls[rows] = lambda hidden=hidden, positions=positions: model.run(hidden, positions, 0, bottom, cache)
        if rows == 1:
            for name in (*names, None):
                calls[name] = lambda name=name, hidden=hidden, positions=positions: (
                    model.exit_logits(name, hidden, positions, cache).softmax(dim=1).max().item()
                )
    # The least of many, in turns, so that the choice does not depend on other work of the machine.
    costs = dict.fromkeys(calls, math.inf)
    for _ in range(100):
        for name, call in calls.items():
            start = time.process_time()
            call()
            costs[name] = min(costs[name], time.process_time() - start)
    one, several = costs.pop(1) / bottom, costs.pop(FILLED) / bottom
    return {**costs, "half": one, "row": (several - one) / (FILLED - 1)}
