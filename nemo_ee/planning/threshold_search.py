# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Search for thresholds: the least expected time of a token within a limit on quality.

The search needs what every exit would do at every token of a text (its confidence, and what reading the token there
loses) and what the model's parts cost. Its outcome for the text is exact but for the costs, because an exit's
distribution at a position of given text does not depend on where earlier tokens left
(`nemo_ee.generation.exit_trace`).

    seconds of a token that leaves at exit i = half layers up to stop_i + (2 L - stop_i) row
                                               + evaluations of the exits up to i

Odd half layers are attention, even ones MLPs. `row` is the time of one more row in a half layer: a pending token runs
through the deeper layers later, together with a token that goes deeper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

THRESHOLDS = tuple(number / 100 for number in range(20, 100, 2)) + (0.99, 0.995, 0.998)
NEVER = 1.0  # no confidence is above it
Outcome = tuple[float, float, tuple[float, ...]]  # (mean loss, seconds, thresholds)
PRICES = 14  # steps of the bisection


@dataclasses.dataclass(frozen=True)
class DecodingCosts:
    """Costs of the parts of a model when it decodes one token at batch one, in any unit, such as seconds.

    Attributes:
        attention, mlp: cost of the two halves of a layer.
        row: cost of one more row in a half layer.
        heads: exit -> cost of one evaluation; the final exit under None.
    """

    attention: float
    mlp: float
    row: float
    heads: Mapping[str | None, float]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Thresholds and what the search expects of them.

    Attributes:
        thresholds: exit -> threshold, of the exits in use; empty: full depth.
        lost: mean loss per token.
        seconds: mean cost per token, in the unit of the costs.
        depth: mean number of half layers below the exits.
    """

    thresholds: dict[str, float]
    lost: float
    seconds: float
    depth: float


class ThresholdSearch:
    """Finds a threshold for each exit, without exits that cost more time than they save.

    For a price of a loss, seconds + price x loss is lowered by the one change of one threshold that helps most,
    again and again until none helps; the price is searched by bisection. In the fastest thresholds seen within the
    limit those in use are then moved within it.

    Args:
        names: names of the exits, the shallowest first.
        stops: half layers below each exit, and those of the whole model.
        confidences: `[n, e]`, fp32, of each exit at each token; higher is more certain.
        losses: `[n, e + 1]`, what is lost where a token is read at each exit, 0 at the final exit, which is the last:
            nats above its own, or 1 where its token is another one.
        costs: costs of the model's parts.
    """

    def __init__(
        self,
        names: Sequence[str],
        stops: Sequence[int],
        confidences: Tensor,
        losses: Tensor,
        costs: DecodingCosts,
    ) -> None:
        self.names, self.confidences = list(names), confidences
        self.losses = losses.double()
        self.stops = torch.tensor(stops).double()
        ways = [
            (own + 1) // 2 * costs.attention + own // 2 * costs.mlp + (stops[-1] - own) * costs.row for own in stops
        ]
        self.way = torch.tensor(ways).double()
        self.evaluation = torch.tensor([costs.heads[name] for name in (*self.names, None)]).double()

    @property
    def full_depth_seconds(self) -> float:
        """Seconds of a token without exits."""
        return float(self.way[-1] + self.evaluation[-1])

    def fastest(self, limit: float, most_active: int | None = None) -> Choice:
        """The least expected time with at most so many exits (None = any number) and a mean loss of at most `limit`;
        full depth where nothing is faster."""
        never = (NEVER,) * len(self.names)
        seen = [(*self._outcome(own), own) for own in (never, *self._neighbours(never, range(len(never))))]
        low, high = 0.0, 100 * seen[0][1]
        for _ in range(PRICES):
            price = (low + high) / 2
            seen += self._descend(price, most_active or len(self.names))
            low, high = (price, high) if seen[-1][0] > limit else (low, price)
        best, least = self._fastest(seen, limit)
        while True:
            in_use = [index for index, own in enumerate(best) if own < NEVER]
            seen = [(*self._outcome(own), own) for own in (best, *self._neighbours(best, in_use))]
            found, seconds = self._fastest(seen, limit)
            if seconds >= least:
                break
            best, least = found, seconds
        return self._choice(best)

    def at(self, thresholds: Mapping[str, float]) -> Choice:
        """What these thresholds give; an exit that is not named is not evaluated."""
        return self._choice([thresholds.get(name, NEVER) for name in self.names])

    def _choice(self, numbers: Sequence[float]) -> Choice:
        chosen = {name: own for name, own in zip(self.names, numbers, strict=True) if own < NEVER}
        return Choice(chosen, *self._outcome(numbers), self.stops[self._choices(numbers)].mean().item())

    @staticmethod
    def _neighbours(numbers: Sequence[float], indices: Iterable[int]) -> list[tuple[float, ...]]:
        """The policies with another threshold at one of these exits."""
        return [(*numbers[:own], value, *numbers[own + 1 :]) for own in indices for value in THRESHOLDS]

    @staticmethod
    def _fastest(seen: Iterable[Outcome], limit: float) -> tuple[tuple[float, ...], float]:
        """(thresholds, seconds) of the fastest policy seen within the limit."""
        seconds, numbers = min((seconds, numbers) for lost, seconds, numbers in seen if lost <= limit)
        return numbers, seconds

    def _descend(self, price: float, most_active: int) -> Iterator[Outcome]:
        """Every step down, the policy that never leaves first."""
        numbers = (NEVER,) * len(self.names)
        lost, score = self._outcome(numbers)
        yield lost, score, numbers
        while True:
            trials = []
            for index in range(len(numbers)):
                others = sum(own < NEVER for own in (*numbers[:index], *numbers[index + 1 :]))
                trials += [self._best_threshold(index, numbers, price)] if others < most_active else []
            lowest, index, threshold = min(trials)
            if lowest > score - 1e-9:
                return
            numbers, score = (*numbers[:index], threshold, *numbers[index + 1 :]), lowest
            yield (*self._outcome(numbers), numbers)

    def _best_threshold(self, index: int, numbers: Sequence[float], price: float) -> tuple[float, int, float]:
        """(seconds + price x loss, index, threshold) of the best threshold of one exit, the others as they are."""
        without = (*numbers[:index], NEVER, *numbers[index + 1 :])
        choice, total = self._choices(without), self._totals(without)
        here = choice > index  # tokens that come this far
        stay = total[choice] + price * _at(self.losses, choice)
        leave = self._totals((*numbers[:index], 0.0, *numbers[index + 1 :]))[index] + price * self.losses[:, index]
        gain = (leave - stay - self.evaluation[index])[here]
        place = torch.bucketize(self.confidences[here, index], torch.tensor(THRESHOLDS))  # leaves below so many
        gains = torch.zeros(len(THRESHOLDS) + 1, dtype=torch.float64).index_add_(0, place, gain)
        # For threshold i: the tokens whose confidence is above it.
        sums = gains.flip(0).cumsum(0).flip(0)[1:] + self.evaluation[index] * here.sum()
        best = int(sums.argmin())
        nothing = (stay.mean().item(), index, NEVER)
        return min(nothing, (((stay.sum() + sums[best]) / len(stay)).item(), index, THRESHOLDS[best]))

    def _outcome(self, numbers: Sequence[float]) -> tuple[float, float]:
        """(mean loss, expected seconds) per token."""
        choice = self._choices(numbers)
        return _at(self.losses, choice).mean().item(), self._totals(numbers)[choice].mean().item()

    def _choices(self, numbers: Sequence[float]) -> Tensor:
        """The exit at which each token leaves, `[tokens]`."""
        passes = self.confidences > torch.tensor(numbers)
        return torch.cat([passes, torch.ones(len(passes), 1, dtype=torch.bool)], dim=1).int().argmax(dim=1)

    def _totals(self, numbers: Sequence[float]) -> Tensor:
        """Seconds of a token that leaves at each exit, with the evaluations on its way, `[e + 1]`."""
        active = torch.tensor([*(own < NEVER for own in numbers), True])
        return self.way + (self.evaluation * active).cumsum(0)


def _at(values: Tensor, choice: Tensor) -> Tensor:
    return values.gather(1, choice[:, None])[:, 0]
