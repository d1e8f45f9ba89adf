# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Exports a `.nemo` as TensorRT-LLM unified checkpoints: the full model with its exits, and draft models.

    trtllm_ckpt/      config.json, rank<r>.safetensors; a stock class builds it; exit_heads.* are stored with it
    draft_<name>/     an exit as a stand-alone model, for draft-target decoding
    tensorrt_llm_model.py   a class for trtllm-build with which an engine of trtllm_ckpt/ (one stage) leaves early
    tokenizer/        the tokenizer of the `.nemo`
    manifest.json     written last

A single process writes the files of all ranks.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from nemo_ee.checkpoint.nemo_config import read_architecture
from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.export_plan import OWN_KEYS_AND_VALUES, Artifact, ExportPlan, export
from nemo_ee.export.export_settings import ExportSettings, refuse, unknown_exits
from nemo_ee.export.model_origins import Model, draft_model, full_model
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.export.tensorrt_llm.early_exit_files import (
    ENGINE_CRITERIA,
    ENGINE_VERSIONS,
    engine_files,
    engine_problems,
    threshold_block,
    threshold_problems,
)
from nemo_ee.export.tensorrt_llm.unified_config import checkpoint_config, stock_family
from nemo_ee.export.tensorrt_llm.unified_reader import load_checkpoint
from nemo_ee.export.tensorrt_llm.unified_tensors import draft_refusal, parallel_problems, readings, stage_of
from nemo_ee.families.architecture import Architecture
from nemo_ee.settings.fields import Names
from nemo_ee.settings.user_input import Positive

logger = logging.getLogger(__name__)

CHECKPOINT = "trtllm_ckpt"
FORMAT = "tensorrt_llm"  # format of a directory, in the manifest
TARGETS = [f"TensorRT-LLM unified checkpoint, engine backend, {ENGINE_VERSIONS}"]
NOT_RUN = "no real TensorRT-LLM has loaded these files"


class TensorRTLLMSettings(ExportSettings):
    """conf/export_tensorrt_llm.yaml, a field for each key."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = "bfloat16"
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    draft_tensor_parallel: Positive | None = None
    drafts: Names | None = None
    max_position_embeddings: Positive | None = None

    @property
    def draft_ranks(self) -> int:
        """Tensor-parallel size of the draft models."""
        return self.draft_tensor_parallel or self.tensor_parallel


def export_checkpoint(settings: TensorRTLLMSettings) -> Path:
    """Export; see `nemo_ee.export.export_plan.export`."""
    output = export(settings, partial(plan_export, settings))
    logger.info(NOT_RUN)
    return output


def plan_export(settings: TensorRTLLMSettings, source: EarlyExitSource, dtype: torch.dtype) -> ExportPlan:
    """The plan of the export.

    Raises:
        ValueError: no stock class computes the backbone, or settings do not fit the model.
    """
    exits = settings.wanted_exits(source)
    architecture = _checked(settings, source, exits)
    if not source.config.get("vocab_size"):
        architecture = dataclasses.replace(architecture, vocab_size=source.vocabulary_rows())
    tp, pp, tied = settings.tensor_parallel, settings.pipeline_parallel, architecture.tied
    drafts = _drafts(settings, source, architecture, exits)
    table = _exit_table(settings, source, architecture, exits, drafts)
    early_exit = {"exits": table, **threshold_block(exits, settings.thresholds, settings.criterion)}
    heads = [(exit, source.has_own_output(exit.name)) for exit in exits]
    # A tied output projection is left out only if one rank has the embeddings too.
    model = full_model(architecture.num_layers, heads, tied=tied, write_output=not tied or tp * pp > 1)
    backbone = _artifact(architecture, model, dtype, tp, pp, early_exit=early_exit)
    artifacts = [_artifact(architecture, draft_model(one), dtype, settings.draft_ranks, 1, exit=one) for one in drafts]
    files, models = engine_files(stock_family(architecture).engine, pp)
    return ExportPlan(
        artifacts=[backbone, *artifacts],
        backbone=backbone.plan,
        tied=tied,
        vocab_size=architecture.vocab_size,
        facts={
            "targets": TARGETS,
            "verified": {"tensorrt_llm": None, "note": NOT_RUN},
            "max_position_embeddings": settings.max_position_embeddings,
            "exits": table,
        },
        early_exit_models=models,
        files=files,
        tokenizers=["tokenizer"],
        config_indent=1,
    )


def _checked(settings: TensorRTLLMSettings, source: EarlyExitSource, exits: Sequence[ExitConfig]) -> Architecture:
    """The architecture, after all checks that need the config alone."""
    drafts = settings.drafts or ()
    problems = unknown_exits("exits", settings.exits, source) + unknown_exits("drafts", drafts, source)
    for exit in exits:
        if "lm_head" in exit.name:
            problems.append(
                f"exit {exit.name!r}: TensorRT-LLM treats tensors called lm_head apart; leave it out (exits=[...])"
            )
    problems += threshold_problems(exits, settings.thresholds, settings.criterion, ENGINE_CRITERIA)
    try:
        architecture = read_architecture(source.config, stored_rows=1, max_positions=settings.max_position_embeddings)
        engine = stock_family(architecture).engine
    except ValueError as problem:
        problems.append(f"{settings.checkpoint}: {problem}")
    else:
        problems += parallel_problems(architecture, settings.tensor_parallel, settings.pipeline_parallel)
        if settings.thresholds is not None:
            problems += engine_problems(engine, settings.pipeline_parallel)
        if settings.draft_ranks != settings.tensor_parallel:
            problems += [f"draft_{one}" for one in parallel_problems(architecture, settings.draft_ranks, 1)]
        for exit in source.exits.exits:
            reason = draft_refusal(architecture, exit)
            if exit.name in drafts and reason:
                problems.append(f"drafts: exit {exit.name!r} cannot be a draft model: {reason}; leave it out")
    refuse(problems)
    return architecture


def _drafts(
    settings: TensorRTLLMSettings, source: EarlyExitSource, architecture: Architecture, exits: Sequence[ExitConfig]
) -> list[ExitConfig]:
    """The exits to write as draft models."""
    drafts = []
    for exit in source.exits.exits:
        wanted = exit in exits if settings.drafts is None else exit.name in settings.drafts
        reason = draft_refusal(architecture, exit)
        if wanted and reason:
            logger.info("no draft of exit %s: %s", exit.name, reason)
        elif wanted:
            drafts.append(exit)
    return drafts


def _exit_table(
    settings: TensorRTLLMSettings,
    source: EarlyExitSource,
    architecture: Architecture,
    exits: Sequence[ExitConfig],
    drafts: Sequence[ExitConfig],
) -> list[dict[str, Any]]:
    return [
        {
            **source.exit_row(exit),
            "pipeline_rank": stage_of(exit.layer, architecture.num_layers, settings.pipeline_parallel),
            "draft": f"draft_{exit.name}" if exit in drafts else None,
            "draft_refused": draft_refusal(architecture, exit),
        }
        for exit in exits
    ]


def _artifact(
    architecture: Architecture,
    model: Model,
    dtype: torch.dtype,
    tensor_parallel: int,
    pipeline_parallel: int,
    *,
    early_exit: Mapping[str, Any] | None = None,
    exit: ExitConfig | None = None,
) -> Artifact:
    """The artifact of the whole model, or of an exit as a draft model."""
    sizes = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    written = dataclasses.replace(architecture, num_layers=len(model.layers), tied=architecture.tied and exit is None)
    config = checkpoint_config(written, dtype=str(dtype).removeprefix("torch."), early_exit=early_exit, **sizes)
    entry = {
        "format": FORMAT,
        "use": "target model; stock classes ignore exit_heads.*" if exit is None else "draft model",
        **sizes,
        # A draft model alone is the model cut at its exit; in draft-target decoding the target verifies its tokens.
        "lossless": True if exit is None else f"with {CHECKPOINT} as the target; not when served alone",
        "kv": OWN_KEYS_AND_VALUES,
    }
    return Artifact(
        directory=CHECKPOINT if exit is None else f"draft_{exit.name}",
        config=config,
        shards=[readings(architecture, model, tensor_parallel, pipeline_parallel)],
        entry=entry,
        num_layers=len(model.layers),
        exit=exit,
        load=load_checkpoint,
    )
