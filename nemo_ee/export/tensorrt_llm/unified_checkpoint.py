# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Write a `.nemo` as TensorRT-LLM unified checkpoints: the full model with its exits beside it, and draft models.

    trtllm_ckpt/      config.json, rank<r>.safetensors; a stock class builds it, exit_heads.* are carried along
    draft_<name>/     an exit as a stand-alone model, for draft-target decoding
    tensorrt_llm_model.py   a class for trtllm-build with which an engine of trtllm_ckpt/ (one stage) leaves early
    tokenizer/        the `.nemo`'s
    manifest.json     written last

Tensor by tensor: read once, every rank's part written to its file. All of it goes to `<output>.partial`, which gets
its name when everything is on disk; after a problem or an interruption nothing is left.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from nemo_ee.checkpoint.nemo_config import read_architecture
from nemo_ee.commands.console import messages
from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.huggingface.weight_files import write_json
from nemo_ee.export.manifest import write_manifest
from nemo_ee.export.model_origins import Model, check_tensors, draft_model, full_model
from nemo_ee.export.output_directory import whole_directory
from nemo_ee.export.parity import written_parity
from nemo_ee.export.safetensors_writer import SafetensorsWriter
from nemo_ee.export.shared_settings import SharedSettings, refuse, unknown_exits
from nemo_ee.export.source import EarlyExitSource, copy_tokenizer, row_blocks
from nemo_ee.export.tensorrt_llm.early_exit_files import (
    ENGINE_CRITERIA,
    copy_engine_file,
    engine_problems,
    threshold_block,
    threshold_problems,
)
from nemo_ee.export.tensorrt_llm.unified_config import checkpoint_config, stock_family
from nemo_ee.export.tensorrt_llm.unified_reader import load_checkpoint
from nemo_ee.export.tensorrt_llm.unified_tensors import (
    Part,
    Reading,
    draft_refusal,
    parallel_problems,
    rank_shapes,
    readings,
    stage_of,
)
from nemo_ee.families.architecture import Architecture
from nemo_ee.settings.fields import Names
from nemo_ee.settings.user_input import Positive
from nemo_ee.text.special_tokens import GENERATION_CONFIG

logger = logging.getLogger(__name__)

CHECKPOINT = "trtllm_ckpt"
TARGETS = ["TensorRT-LLM unified checkpoint, engine backend, 0.20.0 to 1.2.1"]
NOT_RUN = "no real TensorRT-LLM has loaded these files"


class ExportSettings(SharedSettings):
    """See conf/export_tensorrt_llm.yaml."""

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


@dataclass(frozen=True)
class Artifact:
    """One checkpoint directory to write."""

    directory: str
    model: Model
    plan: list[Reading]
    tensor_parallel: int
    pipeline_parallel: int
    tied: bool
    exit: ExitConfig | None = None


def export_checkpoint(settings: ExportSettings) -> Path:
    """Export; a single process does all ranks.

    Returns:
        The directory written.

    Raises:
        ValueError: every problem of the model in one message before anything is written; or, later, a damaged
            file or a disk that does not take the output. Nothing is left behind.
    """
    with EarlyExitSource(settings.checkpoint, settings.backbone) as source:
        exits = settings.wanted_exits(source)
        architecture = _checked(settings, source, exits)
        if not source.config.get("vocab_size"):
            architecture = dataclasses.replace(architecture, vocab_size=source.vocabulary_rows())
        artifacts = plan_artifacts(settings, source, architecture, exits)
        check_tensors(source, [artifact.plan for artifact in artifacts], tied=artifacts[0].tied)
        _ = source.certificates  # a damaged one is a problem now, not after hours of writing
        _write(settings, source, architecture, artifacts, exits, settings.dtype_of(source))
    logger.info("wrote %s: %s; %s", settings.output, ", ".join(a.directory for a in artifacts), NOT_RUN)
    return settings.output


def _checked(settings: ExportSettings, source: EarlyExitSource, exits: Sequence[ExitConfig]) -> Architecture:
    """The architecture, with all that can be refused from the config alone."""
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
            problems += [f"draft_{problem}" for problem in parallel_problems(architecture, settings.draft_ranks, 1)]
        for exit in source.exits.exits:
            reason = draft_refusal(architecture, exit)
            if exit.name in drafts and reason:
                problems.append(f"drafts: exit {exit.name!r} cannot be one: {reason}; leave it out")
    refuse(problems)
    return architecture


def plan_artifacts(
    settings: ExportSettings, source: EarlyExitSource, architecture: Architecture, exits: Sequence[ExitConfig]
) -> list[Artifact]:
    """The directories to write. A tied output projection is left out only where one rank has the embeddings too."""
    tp, pp = settings.tensor_parallel, settings.pipeline_parallel
    tied = architecture.tied
    heads = [(exit, source.has_own_output(exit.name)) for exit in exits]
    model = full_model(architecture.num_layers, heads, tied=tied, write_output=not tied or tp * pp > 1)
    artifacts = [Artifact(CHECKPOINT, model, readings(architecture, model, pp), tp, pp, tied)]
    for exit in source.exits.exits:
        wanted = exit in exits if settings.drafts is None else exit.name in settings.drafts
        reason = draft_refusal(architecture, exit)
        if wanted and reason:
            logger.info("no draft of exit %s: %s", exit.name, reason)
        elif wanted:
            model = draft_model(exit)
            plan = readings(architecture, model, 1)
            artifacts.append(Artifact(f"draft_{exit.name}", model, plan, settings.draft_ranks, 1, False, exit))
    return artifacts


def _write(
    settings: ExportSettings,
    source: EarlyExitSource,
    architecture: Architecture,
    artifacts: Sequence[Artifact],
    exits: Sequence[ExitConfig],
    dtype: torch.dtype,
) -> None:
    total = sum(math.prod(s) for a in artifacts for rank in _shapes(a) for s in rank.values()) * dtype.itemsize
    generation = source.generation_config(architecture.vocab_size)
    with whole_directory(settings.output, total) as partial:
        table = _exit_table(settings, source, architecture, artifacts, exits)
        early_exit = {"exits": table, **threshold_block(exits, settings.thresholds, settings.criterion)}
        options = {"desc": settings.output.name, "disable": not settings.progress, "file": messages()}
        bar = tqdm(total=total, unit="B", unit_scale=True, **options)
        with bar:
            for artifact in artifacts:
                is_draft = artifact.exit is not None
                config = checkpoint_config(
                    architecture, num_layers=len(artifact.model.layers), tensor_parallel=artifact.tensor_parallel,
                    pipeline_parallel=artifact.pipeline_parallel, dtype=str(dtype).removeprefix("torch."),
                    tied=artifact.tied, early_exit=None if is_draft else early_exit,
                )  # fmt: skip
                write_artifact(partial / artifact.directory, artifact, source, config, dtype, bar.update)
                write_json(partial / artifact.directory / GENERATION_CONFIG, generation)
        copy_tokenizer(source, partial / "tokenizer")
        gigabytes = settings.parity_gigabytes
        parities = [
            written_parity(partial / artifact.directory, load_checkpoint, parity_gigabytes=gigabytes)
            for artifact in artifacts
        ]
        facts = _manifest_facts(settings, source, artifacts, parities, table, dtype)
        model = copy_engine_file(partial, stock_family(architecture).engine, settings.pipeline_parallel)
        write_manifest(partial, {**facts, "early_exit_models": [] if model is None else [model]})


def _shapes(artifact: Artifact) -> list[dict[str, tuple[int, ...]]]:
    return rank_shapes(artifact.plan, artifact.tensor_parallel, artifact.pipeline_parallel)


def write_artifact(
    directory: Path,
    artifact: Artifact,
    source: EarlyExitSource,
    config: dict[str, Any],
    dtype: torch.dtype,
    on_bytes,  # noqa: ANN001  called with the number of bytes written
) -> None:
    """Write one checkpoint directory: config.json and one file per rank, all open at once."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                SafetensorsWriter(directory / f"rank{rank}.safetensors", {n: (dtype, s) for n, s in shapes.items()})
            )
            for rank, shapes in enumerate(_shapes(artifact))
        ]
        for reading in artifact.plan:
            tensor = source.read(reading.origin, reading.shape, dtype)
            for rank, name, part in reading.parts(artifact.tensor_parallel):
                writers[rank].write(name, part_of(tensor, part))
                on_bytes(math.prod(part.shape) * dtype.itemsize)
            del tensor


def part_of(tensor: Tensor, part: Part) -> Iterator[Tensor]:
    """A rank's part of a tensor in pieces of rows, zeros for its padding."""
    for start, stop in part.rows:
        rows = tensor[start:stop]
        rows = rows if part.columns is None else rows[:, part.columns[0] : part.columns[1]]
        for first, last in row_blocks(tuple(rows.shape)):
            yield rows[first:last]
    if part.padding:
        yield torch.zeros((part.padding, *part.shape[1:]), dtype=tensor.dtype)


def _exit_table(
    settings: ExportSettings,
    source: EarlyExitSource,
    architecture: Architecture,
    artifacts: Sequence[Artifact],
    exits: Sequence[ExitConfig],
) -> list[dict[str, Any]]:
    drafts = {a.exit.name for a in artifacts if a.exit is not None}
    return [
        {
            **source.exit_row(exit),
            "pipeline_rank": stage_of(exit.layer, architecture.num_layers, settings.pipeline_parallel),
            "draft": f"draft_{exit.name}" if exit.name in drafts else None,
            "draft_refused": draft_refusal(architecture, exit),
        }
        for exit in exits
    ]


def _manifest_facts(
    settings: ExportSettings,
    source: EarlyExitSource,
    artifacts: Sequence[Artifact],
    parities: Sequence[dict[str, Any] | None],
    table: list[dict[str, Any]],
    dtype: torch.dtype,
) -> dict[str, Any]:
    described = [
        {
            "directory": artifact.directory,
            "use": "target model; stock classes ignore exit_heads.*" if artifact.exit is None else "draft model",
            "exit": None if artifact.exit is None else artifact.exit.name,
            "architecture": None if artifact.exit is None else artifact.exit.architecture,
            "num_layers": len(artifact.model.layers),
            "tensor_parallel": artifact.tensor_parallel,
            "pipeline_parallel": artifact.pipeline_parallel,
            # Alone, a draft is the model cut at its exit; the target checks its tokens in draft-target decoding.
            "lossless": True if artifact.exit is None else "with trtllm_ckpt as the target; not when served alone",
            "kv": "its own, every layer writes every position",
            "max_batch": None,
            "parity": parity,
        }
        for artifact, parity in zip(artifacts, parities, strict=True)
    ]
    return {
        "targets": TARGETS,
        **settings.manifest_facts(source, dtype),
        "max_position_embeddings": settings.max_position_embeddings,
        "exits": table,
        "artifacts": described,
        "verified": {"tensorrt_llm": None, "note": NOT_RUN},
    }
