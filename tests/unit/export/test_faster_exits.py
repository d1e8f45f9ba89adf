# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The choice of exits by time, with times that a made-up server has; no vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nemo_ee.export.vllm.faster_exits import FIRST_ROUND, PERIOD, FasterExits, Measured

STOPS, HALVES = (4, 8, 16), 24


class Server:
    """Steps with given times; row r of a step is read at `read_at[r]` if every exit is evaluated."""

    def __init__(self, half: float, head: float, skip: float, steps: Sequence[tuple[int, ...]], full: float) -> None:
        self.half, self.head, self.skip, self.steps, self.full = half, head, skip, steps, full
        self.choice = FasterExits(STOPS, HALVES, lambda chosen: chosen)
        self.count, self.seconds, self.evaluated = 0, 0.0, []

    def step(self) -> None:
        read_at = self.steps[self.count % len(self.steps)]
        self.count += 1
        evaluated, timed = self.choice.next(len(read_at))
        self.evaluated.append(evaluated)
        read = [next((index for index in evaluated if index >= own), len(STOPS)) for own in read_at]
        end = max(read)
        heads = {index: self.head for index in evaluated if index <= end}
        skipped = (HALVES - STOPS[end]) // 2 if end < len(STOPS) else 0
        seconds = self.full
        if evaluated:
            halves = STOPS[end] if end < len(STOPS) else HALVES
            seconds = halves * self.half + sum(heads.values()) + skipped * self.skip
        self.seconds += seconds
        if timed:
            measured = Measured(self.half, self.skip if skipped else None, heads, tuple(read)) if evaluated else None
            self.choice.record(len(read_at), seconds, measured)


@pytest.mark.parametrize(
    ("steps", "head", "chosen"),
    [
        ([(0,)], 1.0, (0,)),  # every step ends at the first exit
        ([(3,)], 1.0, ()),  # none ends early
        ([(2,), (2,), (2,), (3,)], 1.0, (2,)),  # the last exit only
        ([(0,), (3,)], 30.0, ()),  # heads cost more than they save
        ([(0, 2), (0, 3), (1, 1), (0, 0)], 2.0, (1, 2)),  # the slowest row counts
    ],
)
def test_the_exits_with_the_least_time(steps: list[tuple[int, ...]], head: float, chosen: tuple[int, ...]) -> None:
    server = Server(1.0, head, 0.2, steps, full=24.5)
    for _ in range(PERIOD):
        server.step()
    assert server.evaluated[-1] == chosen


def test_a_choice_that_is_not_faster_is_given_up() -> None:
    """Full steps are faster than the half layers of the measurement say, as compiled ones are."""
    server = Server(1.0, 0.5, 0.2, [(0,), (3,), (3,)], full=9.0)
    for _ in range(PERIOD):
        server.step()
    assert server.evaluated[-1] == ()


@pytest.mark.parametrize("steps", [[(3,)], [(3,) * 7], [(0,), *[(3,)] * 19]])
def test_measuring_costs_little_where_exits_do_not_pay(steps: list[tuple[int, ...]]) -> None:
    server = Server(1.0, 2.0, 0.2, steps, full=24.5)
    for _ in range(20 * PERIOD):
        server.step()
    assert server.seconds < 1.02 * 24.5 * server.count
    assert server.count > sum(FIRST_ROUND), "control"
    assert any(evaluated for evaluated in server.evaluated[PERIOD:]), "control: it measures again"


def test_ranks_with_other_times_run_the_same_exits() -> None:
    """The second rank takes what the first one chose, though its own times would choose none."""
    made: list[tuple[int, ...]] = []
    first = Server(1.0, 0.5, 0.2, [(0,), (3,)], full=24.5)
    first.choice.agree = lambda chosen: made.append(chosen) or chosen
    second = Server(1.0, 40.0, 0.2, [(0,), (3,)], full=24.5)
    second.choice.agree = lambda chosen: made.pop(0)
    for _ in range(3 * PERIOD):
        first.step()
        second.step()
    assert first.evaluated == second.evaluated and (0,) in first.evaluated
    alone = Server(1.0, 40.0, 0.2, [(0,), (3,)], full=24.5)
    for _ in range(PERIOD):
        alone.step()
    assert alone.evaluated[-1] == (), "control"


def test_steps_that_are_never_recorded_choose_nothing() -> None:
    choice = FasterExits(STOPS, HALVES, lambda chosen: chosen)
    assert [choice.next(1)[0] for _ in range(PERIOD)][-1] == ()


def test_sizes_are_apart() -> None:
    server = Server(1.0, 1.0, 0.2, [(0,), (3,) * 8], full=24.5)
    for _ in range(2 * PERIOD):
        server.step()
    assert server.evaluated[-2:] == [(0,), ()]
