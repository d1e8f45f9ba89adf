# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""conf/bridge_early_exit_tune.yaml, a field for each key."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from nemo_ee.settings.fields import AboveZero, Accelerator, ExitsBlock, FilePath, NonNegative, Optimizer, Seed
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Natural, Positive, Text, UserInput, rule


class Trainer(UserInput):
    """The `trainer` block."""

    accelerator: Accelerator
    max_steps: Positive
    log_every_n_steps: Positive
    val_check_interval: Positive
    limit_val_batches: Natural
    gradient_clip_val: NonNegative


class Data(UserInput):
    """The `model.data` block."""

    train: Text
    validation: Text | None


class Model(UserInput):
    """The `model` block."""

    precision: Annotated[Literal["32", "bf16"] | None, rule("32, bf16, or null for the dtype of the source")]
    tensor_model_parallel_size: Positive
    pipeline_model_parallel_size: Positive
    sequence_parallel: bool
    micro_batch_size: Positive
    global_batch_size: Positive
    encoder_seq_length: Positive | None
    transformer_engine: bool
    seed: Seed
    distributed_timeout_minutes: AboveZero
    early_exit: ExitsBlock
    data: Data
    optim: Optimizer


class BridgeTuneSettings(ScriptInput):
    """The whole yaml."""

    headline: ClassVar = "the run cannot start"

    source: FilePath
    exits: FilePath | None
    output: FilePath
    complete: bool
    trainer: Trainer
    model: Model
