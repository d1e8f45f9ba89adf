# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Learning rates of the exits over a run: linear warm-up, then linear, cosine or no annealing.

lr(t) = min_lr + (lr - min_lr) * a(t),   a(t) = 1 - d  or  (1 + cos(pi d)) / 2,   d = (t - warmup) / (steps -
warmup)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from nemo_ee.megatron.optim.exit_optimizers import ExitOptimizers


@dataclass(frozen=True)
class LearningRateSchedule:
    """Learning rate over a run, as a share of the way from `min_lr` to `lr`.

    Attributes:
        name: CosineAnnealing | LinearAnnealing | Constant.
        warmup_steps: linear warm-up from 0 to lr.
        max_steps: step at which `min_lr` is reached.
    """

    name: str
    warmup_steps: int
    max_steps: int

    def __post_init__(self) -> None:
        if self.name not in ("CosineAnnealing", "LinearAnnealing", "Constant"):
            raise ValueError(
                f"model.optim.sched.name={self.name!r} is not one of CosineAnnealing, LinearAnnealing, Constant"
            )

    @classmethod
    def of(cls, sched: Mapping[str, Any], *, num_steps: int) -> LearningRateSchedule:
        """From `model.optim.sched` (name, warmup_steps, max_steps); `num_steps` is the run's length."""
        return cls(
            sched.get("name") or "Constant",
            warmup_steps=int(sched.get("warmup_steps") or 0),
            max_steps=int(sched.get("max_steps") or num_steps),
        )

    def learning_rate(self, step: int, *, lr: float, min_lr: float) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return lr * (step + 1) / (self.warmup_steps + 1)
        if self.name == "Constant":
            return lr
        done = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        left = 0.5 * (1.0 + math.cos(math.pi * done)) if self.name == "CosineAnnealing" else 1.0 - done
        return min_lr + (lr - min_lr) * left


class ExitLearningRates(LRScheduler):
    """Sets every exit's learning rate from its own `lr` and `min_lr`. Its state is the step alone.

    Stored base learning rates would be those of rank 0's exits; here they always come from the config. `optim` is
    `model.optim`.
    """

    def __init__(
        self, optimizer: ExitOptimizers, schedule: LearningRateSchedule, optim: Mapping[str, Any] | None = None
    ) -> None:
        self.schedule, self.optim = schedule, optim or {"lr": 0.0}
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Learning rate of every parameter group at `last_epoch` steps."""
        return [
            self.schedule.learning_rate(self.last_epoch, lr=group.get("max_lr", 0.0), min_lr=group.get("min_lr", 0.0))
            for group in self.optimizer.param_groups
        ]

    @property
    def common_lr(self) -> float:
        """The learning rate of `model.optim` in this step, for exits without one of their own; the same on every
        stage."""
        min_lr = (self.optim.get("sched") or {}).get("min_lr") or 0.0
        return self.schedule.learning_rate(self.last_epoch, lr=self.optim["lr"], min_lr=min_lr)

    def state_dict(self) -> dict:
        """{"last_epoch": steps taken}."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue at the stored step."""
        self.last_epoch = state_dict["last_epoch"]
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
        self._last_lr = self.get_lr()
