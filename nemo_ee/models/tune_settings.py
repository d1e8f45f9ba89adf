# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""conf/megatron_gpt_early_exit_tune.yaml, a field for each key; further keys are Lightning's, NeMo's or Megatron's."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from nemo_ee.settings.fields import (
    AboveZero,
    Accelerator,
    ExitsBlock,
    Label,
    NonNegative,
    Optimizer,
    Seed,
    Verify,
    as_text,
)
from nemo_ee.settings.library_keys import exp_manager_keys, model_keys, trainer_keys
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Natural, Positive, Share, Text, UserInput, rule

_Precision = Literal["32", "32-true", "bf16", "bf16-mixed", "bf16-true", "16", "16-mixed", "16-true"]
_Batches = Annotated[Natural | Share, rule("a number of batches from 0, or a share of the data up to 1.0")]


class Trainer(UserInput):
    """The `trainer` block."""

    accelerator: Accelerator
    devices: Annotated[
        Positive | Literal["auto", "-1", -1] | tuple[Natural, ...],
        rule("the number of ranks per node from 1, a list of GPU indices, or auto"),
    ]
    num_nodes: Positive
    precision: Annotated[_Precision, BeforeValidator(as_text)]  # fp16 is refused with its reason later
    max_steps: Positive
    max_epochs: Annotated[Positive | Literal[-1] | None, rule("a whole number from 1, or -1 or null for no limit")]
    log_every_n_steps: Positive
    val_check_interval: Annotated[Positive, rule("a whole number of at least 1, the steps between validations")]
    limit_val_batches: _Batches
    limit_test_batches: _Batches
    num_sanity_val_steps: Annotated[int, Field(ge=-1)]
    accumulate_grad_batches: Annotated[
        int, Field(ge=1, le=1), rule("1: microbatches accumulate inside a step; raise model.global_batch_size instead")
    ]
    gradient_clip_val: NonNegative | None
    enable_progress_bar: bool
    logger: Annotated[Literal[False], rule("False: exp_manager makes the loggers")]
    enable_checkpointing: Annotated[Literal[False], rule("False: exp_manager writes the checkpoints")]
    use_distributed_sampler: Annotated[Literal[False], rule("False: Megatron's samplers share the data out")]


class EarlyStopping(UserInput):
    """`exp_manager.early_stopping_callback_params`."""

    monitor: Text
    mode: Literal["min", "max"]
    min_delta: NonNegative
    patience: Natural


class Checkpoints(UserInput):
    """`exp_manager.checkpoint_callback_params`."""

    monitor: Text
    mode: Literal["min", "max"]
    save_top_k: Annotated[int, Field(ge=-1)]
    save_last: bool
    every_n_train_steps: Positive | None
    always_save_nemo: bool
    save_nemo_on_train_end: bool
    filename: Text
    model_parallel_size: Positive | None


class ExpManager(UserInput):
    """The `exp_manager` block."""

    explicit_log_dir: Text | None
    exp_dir: Text | None
    name: Label | None
    use_datetime_version: bool
    create_tensorboard_logger: bool
    create_wandb_logger: bool
    resume_if_exists: bool
    resume_ignore_no_checkpoint: bool
    create_preemption_callback: bool
    log_step_timing: bool
    log_tflops_per_sec_per_gpu: bool
    create_early_stopping_callback: bool
    early_stopping_callback_params: EarlyStopping
    create_checkpoint_callback: bool
    checkpoint_callback_params: Checkpoints


def _has_a_text(prefixes: tuple[str | int | float, ...]) -> tuple[str | int | float, ...]:
    if prefixes and not any(isinstance(entry, str) for entry in prefixes):
        raise ValueError("must hold prefixes of files, and numbers before them as weights where there are several")
    return prefixes


# Which files they are is checked with the run.
_Prefixes = Annotated[tuple[str | int | float, ...], AfterValidator(_has_a_text)]


class Splits(UserInput):
    """Prefixes by split."""

    train: _Prefixes | None = None
    validation: _Prefixes | None = None
    test: _Prefixes | None = None


class Data(UserInput):
    """The `model.data` block."""

    data_impl: Literal["mmap", "mock"] | None
    data_prefix: Annotated[
        _Prefixes | Splits,
        rule("a list of prefixes, each with a weight before it where there are several, or such lists by split"),
    ]
    splits_string: Annotated[
        Annotated[str, Field(pattern=r"^\s*\d+(\.\d+)?(\s*,\s*\d+(\.\d+)?){0,2}\s*$")] | None,
        rule("the shares of training, validation and test as a text, e.g. '99,1,0'"),
    ]
    index_mapping_dir: Text | None
    seq_length: Positive | None
    dataloader_type: Literal["single", "cyclic"] | None
    num_workers: Natural
    reset_position_ids: bool | None
    reset_attention_mask: bool | None
    eod_mask_loss: bool | None
    validation_drop_last: bool | None


class Model(UserInput):
    """The `model` block."""

    restore_from_path: Annotated[Text, rule("the name of an early-exit .nemo")]
    backbone_path: Text | None
    verify: Verify
    trust_checkpoint: bool
    tensor_model_parallel_size: Positive | None
    pipeline_model_parallel_size: Positive | None
    distributed_timeout_minutes: AboveZero
    micro_batch_size: Positive | None
    global_batch_size: Positive | None
    sequence_parallel: bool | None
    encoder_seq_length: Positive | None
    layer_split: dict[str, Any] | None
    transformer_engine: bool | None
    megatron_amp_O2: bool | None
    val_agreement: bool | None
    get_attention_mask_from_fusion: bool | None
    activations_checkpoint_granularity: Literal["full", "selective"] | None
    activations_checkpoint_method: Literal["uniform", "block"] | None
    activations_checkpoint_num_layers: Positive | None
    seed: Seed | None
    gradient_as_bucket_view: bool
    early_exit: ExitsBlock
    data: Data
    optim: Optimizer


class TuneSettings(ScriptInput):
    """The whole yaml."""

    libraries: ClassVar = {"trainer": trainer_keys, "model": model_keys, "exp_manager": exp_manager_keys}
    may_lack: ClassVar = ("name", "cluster_type", "trainer.", "exp_manager.", "model.")

    name: Label
    cluster_type: Text | None
    save_to: Text | None
    exits_only: bool
    exits_dtype: Literal["float32", "bfloat16"] | None
    trainer: Trainer
    exp_manager: ExpManager
    model: Model
