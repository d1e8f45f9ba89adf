# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A tuning run on Megatron-Bridge, from the settings of its script to the written file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_ee import cpu_host
from nemo_ee.bridge.bridge_settings import BridgeTuneSettings
from nemo_ee.bridge.provider import EarlyExitModelProvider
from nemo_ee.bridge.upstream import AutoBridge
from nemo_ee.checkpoint.exits_file import check_output, save, stored_exits
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.data.token_files import MASK_SUFFIX
from nemo_ee.data.token_windows import TokenWindows, microbatches
from nemo_ee.megatron.loss.exit_metrics import named_metrics
from nemo_ee.megatron.model.backbone_training import what_trains
from nemo_ee.megatron.model.microbatch import MicroBatch
from nemo_ee.megatron.pipeline.exit_tuner import ExitTuner
from nemo_ee.text.text_files import data_prefix

_DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}


def run(settings: BridgeTuneSettings) -> Iterator[str]:
    """Tune and save; yields what the user reads. Every rank must call it.

    Raises:
        ValueError: a problem of source, exits, data or output, before anything is built.
    """
    model = settings.model
    check_output(settings.output)
    source = HuggingFaceSource(settings.source, model.encoder_seq_length)
    length, vocab_size = (
        source.backbone.sequence_length or source.backbone.max_position_embeddings,
        source.backbone.vocab_size,
    )
    train, validation = (
        None if prefix is None else TokenWindows(prefix, seq_length=length, vocab_size=vocab_size)
        for prefix in (model.data.train, model.data.validation)
    )
    for key, prefix in model.data:
        if prefix is not None and Path(f"{data_prefix(prefix)}{MASK_SUFFIX}.idx").exists():
            raise ValueError(
                f"model.data.{key}={prefix} is chat data, and this host does not read its mask; tune with the NeMo "
                f"host, or remove {data_prefix(prefix)}{MASK_SUFFIX}.bin and .idx to count every token"
            )
    if len(train) < model.global_batch_size:
        raise ValueError(
            f"model.data.train={model.data.train} holds {len(train)} windows of {length} tokens, and one step needs "
            f"model.global_batch_size={model.global_batch_size}; take more data, or a smaller batch or length"
        )
    with ExitStack() as stack:
        block, exits = dict(model.early_exit or {}), None
        if settings.exits is not None:
            stored, exits = stack.enter_context(stored_exits(settings.exits, source))
            if not block.get("exits") and not block.get("every"):
                block["exits"] = stored["exits"]
        bridge = AutoBridge.from_hf_pretrained(str(settings.source))
        provider = EarlyExitModelProvider.of(
            bridge.to_megatron_provider(),
            block,
            source=source,
            exits=exits,
            full_depth=settings.complete,
            **_fields(settings, length),
        )
        provider.finalize()
        start_ranks(provider, model.distributed_timeout_minutes)
        (stage,) = provider.provide_distributed_model(
            wrap_with_ddp=False, mixed_precision_wrapper=None, use_cpu_initialization=cpu_host.enabled()
        )
    stage.to(provider.params_dtype)
    yield what_trains(stage)
    tuner = ExitTuner(
        stage,
        provider.exit_config,
        provider.placements,
        optim=model.optim.model_dump(),
        num_steps=settings.trainer.max_steps,
        max_norm=settings.trainer.gradient_clip_val,
        timeout_minutes=model.distributed_timeout_minutes,
    )
    yield from _steps(settings, tuner, train, validation)
    tuner.context.drain()
    multiple = provider.make_vocab_size_divisible_by
    save(stage, provider.exit_config, settings.output, source, complete=settings.complete, vocab_multiple=multiple)
    yield f"tuned exits: {settings.output}"


def _fields(settings: BridgeTuneSettings, length: int) -> dict[str, Any]:
    """Fields of the provider that are settings of the run."""
    model = settings.model
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": model.tensor_model_parallel_size,
        "pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "sequence_parallel": model.sequence_parallel,
        "seq_length": length,
        "seed": model.seed,
    }
    if not cpu_host.enabled():
        fields["transformer_engine"] = model.transformer_engine
    if model.precision is not None:
        dtype = _DTYPES[model.precision]
        fields |= {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": dtype is torch.bfloat16, "fp16": False}
    return fields


def start_ranks(provider: EarlyExitModelProvider, timeout_minutes: float) -> None:
    """Join the ranks that torchrun started, or be the only one, and make Megatron's groups."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    if not torch.distributed.is_initialized():
        if "RANK" not in os.environ:
            os.environ.update(alone)
        backend = "gloo" if cpu_host.enabled() else "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    if not parallel_state.is_initialized():
        provider.initialize_model_parallel(seed=provider.seed)


def _steps(
    settings: BridgeTuneSettings, tuner: ExitTuner, train: TokenWindows, validation: TokenWindows | None
) -> Iterator[str]:
    """Run all steps; yields a line for every log and every validation."""
    trainer, batches = settings.trainer, _shuffled_batches(settings, train)
    objectives = tuner.context.objectives
    for step in range(1, trainer.max_steps + 1):
        results = tuner.tune(next(batches), log=step % trainer.log_every_n_steps == 0)
        if results:
            yield _line(step, dict(named_metrics(results, objectives, validation=False)))
        if validation is not None and trainer.limit_val_batches and step % trainer.val_check_interval == 0:
            held_out = islice(microbatches(validation, **_sizes(settings)), trainer.limit_val_batches)
            yield _line(step, dict(named_metrics(tuner.evaluate(held_out), objectives, validation=True)))


def _line(step: int, metrics: Mapping[str, float]) -> str:
    return f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _sizes(settings: BridgeTuneSettings) -> dict[str, Any]:
    return {
        "micro_batch_size": settings.model.micro_batch_size,
        "global_batch_size": settings.model.global_batch_size,
        "data_rank": parallel_state.get_data_parallel_rank(),
        "data_size": parallel_state.get_data_parallel_world_size(),
        "device": torch.device("cpu" if cpu_host.enabled() else torch.cuda.current_device()),
    }


def _shuffled_batches(settings: BridgeTuneSettings, windows: TokenWindows) -> Iterator[list[MicroBatch]]:
    """This rank's microbatches of one global batch after the other, each epoch in another order of the windows."""
    size = settings.model.global_batch_size
    for epoch in count():
        generator = torch.Generator().manual_seed(settings.model.seed + epoch)
        order = torch.randperm(len(windows), generator=generator).tolist()
        yield from microbatches(_Reordered(windows, order[: len(order) - len(order) % size]), **_sizes(settings))


@dataclass(frozen=True)
class _Reordered:
    """Windows in another order, read when they are needed."""

    windows: TokenWindows
    order: list[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple:
        return self.windows[self.order[index]]
