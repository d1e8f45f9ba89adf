# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The weight of an exit's loss over a run.

With x = step / num_steps and the final weight w: `constant` w, `linear` w x, `cosine` w (1 - cos(pi x)) / 2. The last
two start at 0 and end at w.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from nemo_ee.exits.config import LOSS_WEIGHT_SCHEDULES, ExitConfig


def loss_weights_at(exits: Iterable[ExitConfig], *, step: int, num_steps: int) -> dict[str, float]:
    """Exit name -> weight of its loss at one step; see `loss_weight_at`."""
    return {
        exit.name: loss_weight_at(exit.loss_weight_schedule, exit.loss_weight, step=step, num_steps=num_steps)
        for exit in exits
    }


def loss_weight_at(schedule: str, loss_weight: float, *, step: int, num_steps: int) -> float:
    """The weight of the loss at one step.

    Args:
        schedule: `constant`, `linear` or `cosine`.
        loss_weight: the final weight.
        step: optimizer steps done so far, from 0; past `num_steps` the weight stays final.
        num_steps: optimizer steps of the run, at least 1.

    Raises:
        ValueError: unknown schedule, negative step, or a run without steps.
    """
    if schedule not in LOSS_WEIGHT_SCHEDULES:
        raise ValueError(
            f"loss_weight_schedule = {schedule!r} is unknown; use one of {', '.join(LOSS_WEIGHT_SCHEDULES)}"
        )
    if step < 0 or num_steps < 1:
        raise ValueError(f"step = {step} of num_steps = {num_steps}: a step is at least 0 and a run has at least 1")
    if schedule == "constant":
        return loss_weight
    progress = min(step / num_steps, 1.0)
    return loss_weight * (progress if schedule == "linear" else (1.0 - math.cos(math.pi * progress)) / 2.0)
