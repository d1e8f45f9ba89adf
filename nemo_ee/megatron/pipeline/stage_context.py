# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The context of every microbatch on one pipeline stage; read-only and the same for all steps of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nemo_ee.exits.objective import Objective
from nemo_ee.megatron.loss.weight_casts import WeightCasts
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.pipeline.teacher_channel import TeacherChannel
from nemo_ee.megatron.pipeline.transport import Transport


@dataclass(frozen=True)
class StageContext:
    """Model, transport and settings of one stage.

    Attributes:
        model: this stage.
        transport: carries hidden states from the stage before and to the stage behind.
        objectives: exit name -> training objective, for the exits of the whole model.
        autocast: dtype of mixed precision, None for none.
        teachers: source of the final exit's distributions. None: no exit learns from it, or none is compared with it.
        chunk_bytes: fp32 logits of one chunk of an exit's loss; None: by the device (`chunk_bytes_on`).
        casts: output weights in the dtype of mixed precision, until the end of a step.
    """

    model: EarlyExitGPTModel
    transport: Transport
    objectives: Mapping[str, Objective]
    autocast: torch.dtype | None = None
    teachers: TeacherChannel | None = None
    chunk_bytes: int | None = None
    casts: WeightCasts = field(default_factory=WeightCasts)

    @property
    def device(self) -> torch.device:
        """The device of the stage."""
        return next(self.model.parameters()).device

    def mixed_precision(self, *, backward: bool = False) -> torch.autocast:
        """Autocast for forward passes, or for backward passes; does nothing without mixed precision.

        In their backward passes Megatron's linears restore it themselves on CUDA, but not on the CPU.
        """
        enabled = self.autocast is not None and not (backward and self.device.type != "cpu")
        return torch.autocast(self.device.type, dtype=self.autocast or torch.bfloat16, enabled=enabled)

    def drain(self) -> None:
        """Wait for every outstanding send (before validation, before saving and at the end)."""
        self.transport.drain()
        if self.teachers is not None:
            self.teachers.transport.drain()
