# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Loss-weight schedules at their ends, in the middle, and past the run."""

from __future__ import annotations

import pytest

from nemo_ee.exits.config import LOSS_WEIGHT_SCHEDULES
from nemo_ee.exits.loss_weights import loss_weight_at


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.5, 0.5, 0.5, 0.5, 0.5]),
        ("linear", [0.0, 0.125, 0.25, 0.5, 0.5]),
        ("cosine", [0.0, 0.0732233, 0.25, 0.5, 0.5]),
    ],
)
def test_values(schedule, expected):
    got = [loss_weight_at(schedule, 0.5, step=step, num_steps=100) for step in (0, 25, 50, 100, 200)]
    assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", LOSS_WEIGHT_SCHEDULES)
def test_never_falls(schedule):
    values = [loss_weight_at(schedule, 2.0, step=step, num_steps=7) for step in range(9)]
    assert values == sorted(values) and values[-1] == 2.0


def test_problems():
    with pytest.raises(ValueError, match="'step' is unknown; use one of constant, linear, cosine"):
        loss_weight_at("step", 1.0, step=0, num_steps=1)
    with pytest.raises(ValueError, match="step = -1"):
        loss_weight_at("linear", 1.0, step=-1, num_steps=1)
    with pytest.raises(ValueError, match="num_steps = 0"):
        loss_weight_at("linear", 1.0, step=0, num_steps=0)
