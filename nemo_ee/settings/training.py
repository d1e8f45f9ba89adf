# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The settings of the scripts that run a NeMo model: tuning, conversion, evaluation, decoding, calibration.

`anything` stands where the setting's own reader has more to say than its kind.
"""

from __future__ import annotations

import re
from typing import Any

from nemo_ee.exits.block_reader import Check, boolean, close_match, integer, number, one_of
from nemo_ee.settings.checks import (
    anything,
    below,
    block,
    criterion,
    either,
    exactly,
    exit_names,
    label,
    list_of,
    or_null,
    share,
    text,
    word,
)
from nemo_ee.settings.known import KnownSettings
from nemo_ee.settings.library_keys import exp_manager_keys, model_keys, trainer_keys

_SEED = integer(0, 2**32 - 1)  # numpy takes no larger one
_ACCELERATOR = word("gpu", "cpu", "cuda", "auto")
_SPLITS = ("train", "validation", "test")
_PRECISIONS = ("32", "32-true", "bf16", "bf16-mixed", "bf16-true")


def _splits(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?(\s*,\s*\d+(\.\d+)?){0,2}\s*", value):
        return value
    raise ValueError("must be the shares of training, validation and test as a text, e.g. '99,1,0'")


def _data_prefix(value: Any) -> Any:
    """Prefixes with weights between them, for all splits or by split; which files they are is checked with the run."""
    by_split = value if isinstance(value, dict) else {"train": value}
    unknown = [split for split in by_split if split not in _SPLITS]
    if unknown:
        guess = close_match(unknown[0], _SPLITS)
        raise ValueError(f"has the split {unknown[0]!r}{guess}; the splits are {', '.join(_SPLITS)}")
    for prefixes in by_split.values():
        entries = prefixes if isinstance(prefixes, list) else []
        kinds = [isinstance(entry, str | int | float) and not isinstance(entry, bool) for entry in entries]
        if not all(kinds) or (entries and not any(isinstance(entry, str) for entry in entries)):
            raise ValueError("must hold prefixes of files, and numbers before them as weights where there are several")
    return value


def _early_exit(value: Any) -> dict | None:
    """What is in the block is checked with the model, whose layers count."""
    exits = None if value is None else block(value).get("exits")
    if exits is None or isinstance(exits, list):
        return value
    raise ValueError("must hold a list of exits under exits; write [{layer: 4}, {layer: 8, architecture: norm}]")


_BLOCKS = {"trainer": trainer_keys, "model": model_keys}
_RANKS = {
    "trainer.accelerator": _ACCELERATOR,
    "trainer.devices": integer(1),
    "trainer.num_nodes": integer(1),
}
_MODEL_FILE = {
    "model.restore_from_path": text,
    "model.backbone_path": or_null(text),
    "model.verify": one_of(("stored", "full")),
    "model.tensor_model_parallel_size": integer(1),
    "model.distributed_timeout_minutes": number(above=True),
}
_ONE_MODEL = {
    **_RANKS,
    "trainer.precision": word(*_PRECISIONS),
    **_MODEL_FILE,
    "model.pipeline_model_parallel_size": integer(1),
    "model.transformer_engine": or_null(boolean),
}
_BATCHES = {
    "model.micro_batch_size": or_null(integer(1)),
    "model.global_batch_size": or_null(integer(1)),
    "model.sequence_parallel": or_null(boolean),
    "model.encoder_seq_length": or_null(integer(1)),
}

_EXP_MANAGER: dict[str, Check] = {
    "explicit_log_dir": or_null(text),
    "exp_dir": or_null(text),
    "name": or_null(label),
    **dict.fromkeys(
        (
            "use_datetime_version create_tensorboard_logger create_wandb_logger resume_if_exists "
            "resume_ignore_no_checkpoint create_preemption_callback log_step_timing log_tflops_per_sec_per_gpu "
            "create_early_stopping_callback create_checkpoint_callback"
        ).split(),
        boolean,
    ),
    "early_stopping_callback_params.monitor": text,
    "early_stopping_callback_params.mode": one_of(("min", "max")),
    "early_stopping_callback_params.min_delta": number(),
    "early_stopping_callback_params.patience": integer(0),
    "checkpoint_callback_params.monitor": text,
    "checkpoint_callback_params.mode": one_of(("min", "max")),
    "checkpoint_callback_params.save_top_k": integer(-1),
    "checkpoint_callback_params.save_last": boolean,
    "checkpoint_callback_params.every_n_train_steps": or_null(integer(1)),
    "checkpoint_callback_params.always_save_nemo": boolean,
    "checkpoint_callback_params.save_nemo_on_train_end": boolean,
    "checkpoint_callback_params.filename": text,
    "checkpoint_callback_params.model_parallel_size": or_null(integer(1)),
}

TUNE = KnownSettings(
    {
        "name": label,
        "cluster_type": or_null(text),
        "save_to": or_null(text),
        "exits_only": boolean,
        "model.trust_checkpoint": boolean,
        "trainer.accelerator": _ACCELERATOR,
        "trainer.devices": either(
            integer(1),
            word("auto", "-1"),
            list_of(integer(0), what="a list of GPU indices"),
            rule="must be the number of ranks per node, a list of GPU indices, or auto",
        ),
        "trainer.num_nodes": integer(1),
        "trainer.precision": word(*_PRECISIONS, "16", "16-mixed", "16-true"),  # fp16 is refused with its reason
        "trainer.max_steps": integer(1),
        "trainer.max_epochs": or_null(
            either(integer(1), exactly(-1, ""), rule="must be a whole number from 1, or -1 for no limit")
        ),
        "trainer.log_every_n_steps": integer(1),
        "trainer.val_check_interval": integer(1, way_out=", the steps between validations"),
        "trainer.limit_val_batches": either(
            integer(0), share, rule="must be a number of batches from 0, or a share of the data up to 1.0"
        ),
        "trainer.limit_test_batches": either(
            integer(0), share, rule="must be a number of batches from 0, or a share of the data up to 1.0"
        ),
        "trainer.num_sanity_val_steps": integer(-1),
        "trainer.accumulate_grad_batches": exactly(
            1, "microbatches accumulate inside a step; raise model.global_batch_size instead"
        ),
        "trainer.gradient_clip_val": or_null(number()),
        "trainer.enable_progress_bar": boolean,
        "trainer.logger": exactly(False, "exp_manager makes the loggers"),
        "trainer.enable_checkpointing": exactly(False, "exp_manager writes the checkpoints"),
        "trainer.use_distributed_sampler": exactly(False, "Megatron's samplers share the data out"),
        **{f"exp_manager.{key}": check for key, check in _EXP_MANAGER.items()},
        **_MODEL_FILE,
        "model.tensor_model_parallel_size": or_null(integer(1)),
        "model.pipeline_model_parallel_size": or_null(integer(1)),
        **_BATCHES,
        "model.layer_split": or_null(block),
        "model.transformer_engine": or_null(boolean),
        "model.megatron_amp_O2": or_null(boolean),
        "model.val_agreement": or_null(boolean),
        "model.get_attention_mask_from_fusion": or_null(boolean),
        "model.activations_checkpoint_granularity": or_null(one_of(("full", "selective"))),
        "model.activations_checkpoint_method": or_null(one_of(("uniform", "block"))),
        "model.activations_checkpoint_num_layers": or_null(integer(1)),
        "model.seed": or_null(_SEED),
        "model.gradient_as_bucket_view": boolean,
        "model.early_exit": _early_exit,
        "model.data.data_impl": or_null(one_of(("mmap", "mock"))),
        "model.data.data_prefix": _data_prefix,
        "model.data.splits_string": or_null(_splits),
        "model.data.index_mapping_dir": or_null(text),
        "model.data.seq_length": or_null(integer(1)),
        "model.data.dataloader_type": or_null(one_of(("single", "cyclic"))),
        "model.data.num_workers": integer(0),
        **dict.fromkeys(
            (
                "model.data.reset_position_ids model.data.reset_attention_mask model.data.eod_mask_loss "
                "model.data.validation_drop_last"
            ).split(),
            or_null(boolean),
        ),
        "model.optim.name": anything,
        "model.optim.lr": or_null(number()),
        "model.optim.betas": or_null(
            list_of(below(1.0, number()), length=2, what="a list of two numbers of at least 0 and below 1")
        ),
        "model.optim.eps": or_null(number(above=True)),
        "model.optim.weight_decay": or_null(number()),
        "model.optim.sched.name": or_null(one_of(("LinearAnnealing", "CosineAnnealing", "Constant"))),
        "model.optim.sched.warmup_steps": or_null(integer(0)),
        "model.optim.sched.min_lr": or_null(number()),
        "model.optim.sched.max_steps": or_null(integer(1)),
    },
    {**_BLOCKS, "exp_manager": exp_manager_keys},
    optional=("name", "cluster_type", "trainer.", "exp_manager.", "model."),
)

CONVERT = KnownSettings(
    {
        "source": text,
        "output": text,
        "model.backbone_path": or_null(text),
        "overwrite": boolean,
        "verify": one_of(("stored", "full")),
        "compare_with_transformers": boolean,
        "probe_tokens": integer(1),
        **_RANKS,
        "trainer.precision": word(*_PRECISIONS),
        **_BATCHES,
        "model.tensor_model_parallel_size": integer(1),
        "model.pipeline_model_parallel_size": integer(1),
        "model.make_vocab_size_divisible_by": integer(1),
        "model.transformer_engine": or_null(boolean),
        "model.seed": _SEED,
        "model.distributed_timeout_minutes": number(above=True),
        "model.early_exit": _early_exit,
    },
    _BLOCKS,
    optional=("trainer.num_nodes", "model."),
)

EVALUATE = KnownSettings(
    {
        "data": text,
        "output": text,
        "max_tokens": or_null(integer(1)),
        **_ONE_MODEL,
        **_BATCHES,
    },
    _BLOCKS,
    optional=("model.",),
)

_POLICY = dict.fromkeys("mode criterion threshold max_pending_tokens num_draft_tokens cost_rule".split(), anything) | {
    "exits": exit_names
}
_SAMPLING = dict.fromkeys(
    "greedy temperature top_k top_p repetition_penalty seed add_BOS stop_on_eos".split(), anything
)

GENERATE = KnownSettings(
    {
        "prompts": anything,
        "prompts_file": or_null(text),
        "output": or_null(text),
        "overwrite": anything,
        "colour": anything,
        **_POLICY,
        "certificate": or_null(either(boolean, text, rule="must be True, or the name of a certificate")),
        "allow_other_setting": boolean,
        "tokens_to_generate": anything,
        "min_tokens_to_generate": anything,
        "end_strings": anything,
        "batch_size": anything,
        **_SAMPLING,
        **_ONE_MODEL,
        "model.layer_split": or_null(block),
    },
    _BLOCKS,
)

CALIBRATE = KnownSettings(
    {
        "data": text,
        **dict.fromkeys(
            (
                "prompt_tokens prompts_per_document num_prompts risk epsilon delta clip_nats answer_until criterion "
                "grid max_pending_tokens split tokens_to_generate batch_size free_running "
                "max_document_bytes"
            ).split(),
            anything,
        ),
        "exits": exit_names,
        **_SAMPLING,
        "output": text,
        "certificate": or_null(text),
        "save_to": or_null(text),
        **_ONE_MODEL,
    },
    _BLOCKS,
)

SWEEP_THRESHOLDS = KnownSettings(
    {
        "data": text,
        "output": or_null(text),
        "thresholds": list_of(number(), what="a list of numbers of at least 0"),
        "criterion": criterion,
        "exits": exit_names,
        "max_pending_tokens": or_null(integer(0)),
        "length": integer(2),
        "max_tokens": or_null(integer(1)),
        "batch_size": integer(1),
        **_RANKS,
        "trainer.precision": word(*_PRECISIONS),
        "model.restore_from_path": text,
        "model.backbone_path": or_null(text),
        "model.tensor_model_parallel_size": integer(1),
    },
    {"trainer": trainer_keys},
)
