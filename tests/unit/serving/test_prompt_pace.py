# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The pace of prompts on a machine whose times are known: a step takes 10 ms, and 2 ms for each prompt token."""

from __future__ import annotations

import pytest

from nemo_ee.serving.prompt_pace import PromptPace


def run(pace: PromptPace, steps: int, *, answers: float = 0.010, token: float = 0.002) -> list[int]:
    """Budgets of steps beside eight answers, with prompt tokens always waiting."""
    budgets = []
    for _ in range(steps):
        budgets.append(pace.budget(1, 8))
        pace.took(answers + token * budgets[-1], budgets[-1], 8)
    return budgets


@pytest.mark.parametrize(("share", "tokens"), [(0.5, 5), (0.75, 15), (0.1, 1)])
def test_prompts_take_their_share(share: float, tokens: int) -> None:
    budgets = run(PromptPace(share), 30)
    assert budgets[:2] == [0, 1], "both times are measured first"
    assert budgets[2:] == pytest.approx([tokens] * 28, abs=1)


def test_nobody_waits_where_nothing_else_runs_or_no_share_is_set() -> None:
    pace = PromptPace(0.5)
    assert pace.budget(1, 0) is None and PromptPace(None).budget(1, 8) is None
    pace.took(2.0, 1000, 0)  # a prompt alone: the time of a token is known
    assert pace.budget(1, 8) == 0
    pace.took(0.010, 0, 8)
    assert pace.budget(1, 8) == 5
    assert pace.budget(0, 8) is None and pace.budget(3, 8) == 15, "each gets its share"


def test_a_batch_that_fills_up_is_not_taken_for_slow_prompts() -> None:
    """A step takes 10 ms and 2 ms for each answer, 1 ms for each prompt token."""
    pace, answers = PromptPace(0.5), 0
    budgets = []
    for _ in range(40):
        budget = pace.budget(1, answers)
        tokens = 50 if budget is None else budget
        pace.took(0.010 + 0.002 * answers + 0.001 * tokens, tokens, answers)
        if tokens:
            budgets.append((answers, tokens))
            answers = min(answers + 1, 15)
    assert all(tokens == pytest.approx(10 + 2 * answers, abs=2) for answers, tokens in budgets[3:])


def test_it_follows_a_machine_that_changes() -> None:
    pace = PromptPace(0.5)
    run(pace, 30)
    budgets = run(pace, 200, answers=0.040)
    assert budgets.count(0) == pytest.approx(200 / 33, abs=1), "the answers are measured again now and then"
    assert budgets[-2] == pytest.approx(20, abs=4)
    assert min(budget for budget in run(pace, 200, token=1.0) if budget) == 1, "a prompt never stands still"
