# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What goes into a step of `StagedForward`, and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nemo_ee.generation.policy import LeavingRule


class TokenInput(NamedTuple):
    """New tokens of one sequence for one step.

    Attributes:
        position: position of the first token.
        tokens: token ids; empty = only pending rows run.
        allow_exit: evaluate exits at the newest token.
        read_all: at the end read every row that arrives, not only the newest.
        read_none: at the end read nothing: more of a prompt comes in the next step.
        rule: decides, beside the thresholds, where the newest token leaves.
    """

    position: int
    tokens: Sequence[int]
    allow_exit: bool = False
    read_all: bool = False
    read_none: bool = False
    rule: LeavingRule | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ExitOutput:
    """The predictions of one exit after some rows of a sequence.

    Attributes:
        slot: slot of the sequence in the cache.
        exit: name of the exit; None = the final exit.
        layer: number of layers below it.
        confidence: confidence of each row, by the plan's criterion.
        logits: `[m, v]`, fp32; m = 1 except with `TokenInput.read_all`.
    """

    slot: int
    exit: str | None
    layer: int
    confidence: Sequence[float]
    logits: Tensor

    def newest(self) -> ExitOutput:
        """The output of the last row alone."""
        return dataclasses.replace(self, confidence=self.confidence[-1:], logits=self.logits[-1:])
