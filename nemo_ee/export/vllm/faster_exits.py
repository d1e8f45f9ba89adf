# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Which exits a step evaluates: those that save time at its number of rows, by measurement.

An exit costs its head in every step that reaches it, and saves the rest of the stack in a step whose rows all leave.
With more rows a step leaves less often. In regular rounds a few steps evaluate every exit and a few none. They give
the seconds of a half layer, of each head, of a skipped layer and of a full step, and the exit of each row.
The set of exits with the least expected time follows from these:

    t(S) = mean over observed steps of  half_layers(end) * t_half + sum of t_head over S up to the end
                                        + skipped_layers * t_skip,   end = last exit in S at which a row is read

A row that would be read at an exit outside S counts as read at the next one in S. No set is evaluated whose steps took
as long as full ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

PERIOD = 512  # steps of one size between two rounds of measurement
FIRST_ROUND, LATER_ROUNDS = (4, 12), (2, 6)  # steps at full depth, steps with every exit
LEAST_GAIN = 0.01  # of a full step, for each exit that is added
_CHECKED = 32  # steps after the choice; every fourth at full depth, and the choice must be faster than those
_MARGIN = 0.02
_KEPT = 64  # measured steps with every exit
_KEPT_FULL = 16  # few: the time of a full step changes with the length of the texts


@dataclass
class Measured:
    """Seconds of one timed step, and the index of the exit at which each row was read (number of exits = final).

    Attributes:
        half_layer, skipped_layer: of one; None = none was run.
        heads: index of an exit -> seconds of evaluating it.
    """

    half_layer: float | None = None
    skipped_layer: float | None = None
    heads: dict[int, float] = field(default_factory=dict)
    read_at: tuple[int, ...] = ()


class FasterExits:
    """The choice for every number of rows.

    Args:
        stops: taps of the exits in half layers, ascending.
        half_layers: of the model.
        agree: gives every tensor-parallel rank the first rank's value; each rank calls it in the same steps.
    """

    def __init__(
        self, stops: Sequence[int], half_layers: int, agree: Callable[[tuple[int, ...]], tuple[int, ...]]
    ) -> None:
        self.stops, self.half_layers, self.agree = tuple(stops), half_layers, agree
        self._by_size: dict[int, _OfSize] = {}

    def next(self, rows: int) -> tuple[tuple[int, ...], bool]:
        """Indices of the exits to evaluate in the next step of this many rows, and whether to time it."""
        return self._of(rows).next(self)

    def record(self, rows: int, seconds: float, measured: Measured | None) -> None:
        """Take in a timed step: its seconds, and what was measured in it if it evaluated exits."""
        self._of(rows).record(seconds, measured)

    def _of(self, rows: int) -> _OfSize:
        # Sizes to the next power of two are one: a batch shrinks and grows with its requests.
        return self._by_size.setdefault((rows - 1).bit_length(), _OfSize(len(self.stops)))

    def least(self, known: Sequence[Measured], full: float) -> tuple[int, ...]:
        """The exits with the least expected time of a step.

        Args:
            known: timed steps with every exit.
            full: seconds of a step at full depth.
        """
        half = median(one.half_layer for one in known if one.half_layer is not None)
        skips = [one.skipped_layer for one in known if one.skipped_layer is not None]
        skip = median(skips) if skips else half
        seconds = [[one.heads[index] for one in known if index in one.heads] for index in range(len(self.stops))]
        heads = [median(own) if own else float("inf") for own in seconds]
        final = max(full - half * self.half_layers, 0.0)

        def expected(chosen: tuple[int, ...]) -> float:
            if not chosen:
                return full
            return fmean(self._seconds(chosen, one.read_at, half, skip, heads, final) for one in known)

        best, least = (), full
        while True:
            added = [tuple(sorted({*best, index})) for index in range(len(self.stops)) if index not in best]
            times = [(expected(chosen), chosen) for chosen in added]
            if not times or min(times)[0] > least - LEAST_GAIN * full:
                return best
            least, best = min(times)

    def _seconds(
        self,
        chosen: Sequence[int],
        read_at: Sequence[int],
        half: float,
        skip: float,
        heads: Sequence[float],
        final: float,
    ) -> float:
        end = max(next((index for index in chosen if index >= own), len(self.stops)) for own in read_at)
        time = sum(heads[index] for index in chosen if index <= end)
        if end == len(self.stops):
            return time + half * self.half_layers + final
        return time + half * self.stops[end] + skip * ((self.half_layers - self.stops[end]) // 2)


class _OfSize:
    """The state of one size."""

    def __init__(self, exits: int) -> None:
        self.all = tuple(range(exits))
        self.chosen: tuple[int, ...] = ()
        self.full: deque[float] = deque(maxlen=_KEPT_FULL)
        self.known: deque[Measured] = deque(maxlen=_KEPT)
        self.as_chosen: list[float] = []
        self.step, self.round = 0, FIRST_ROUND

    def next(self, choice: FasterExits) -> tuple[tuple[int, ...], bool]:
        full, every = self.round
        if self.step == full + every:
            known = [one for one in self.known if one.half_layer is not None]
            best = choice.least(known, median(self.full)) if known and self.full else ()
            self.chosen = choice.agree(best)
            self.as_chosen.clear()
            self.full.clear()
        if self.step == full + every + _CHECKED and self.chosen:
            faster = self.full and _mean(self.as_chosen) < (1 - _MARGIN) * _mean(self.full)
            self.chosen = choice.agree(self.chosen if faster else ())
        if self.step == full + every + PERIOD:
            self.step, self.round = 0, LATER_ROUNDS
            full, every = self.round
        self.step += 1
        if self.step <= full:
            return (), True
        if self.step <= full + every:
            return self.all, True
        is_checked = bool(self.chosen) and self.step <= full + every + _CHECKED
        return () if is_checked and self.step % 4 == 0 else self.chosen, is_checked

    def record(self, seconds: float, measured: Measured | None) -> None:
        if measured is None:
            self.full.append(seconds)
        elif self.step <= sum(self.round):
            self.known.append(measured)
        else:
            self.as_chosen.append(seconds)


def _mean(seconds: Iterable[float]) -> float:
    """The mean without the largest tenth: a busy moment of the machine is no property of a step."""
    kept = sorted(seconds)
    return fmean(kept[: len(kept) - len(kept) // 10])
