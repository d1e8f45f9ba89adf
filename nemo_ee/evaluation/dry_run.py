# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The dry run of a layout: settings, counts and simulated speed of every stage, and the tables that show them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ValidationInfo, field_validator

from nemo_ee.checkpoint.huggingface import read_backbone
from nemo_ee.evaluation.report import format_table
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.placement import place_exits
from nemo_ee.families.architecture import Architecture
from nemo_ee.planning.pipeline_simulation import Speeds, stage_times, step_seconds
from nemo_ee.planning.tuning_estimate import (
    LLAMA_2,
    Assumptions,
    Layout,
    estimate,
    layout_problem,
    mlp_exits,
    nearest_layout,
    smallest_change_that_fits,
)
from nemo_ee.settings.fields import AboveZero, FilePath, NonNegative
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Positive, Text, rule

GB = 1e9


class DryRunSettings(ScriptInput):
    """The settings of conf/dry_run.yaml, one field per key."""

    headline: ClassVar = "Nothing was run"

    model: Text
    layout: Annotated[tuple[Positive, Positive, Positive], rule("three sizes, [TP, PP, DP]; write [4,2,8]")]
    exits: Positive
    objective: Literal["cross_entropy", "distillation", "mixed"]
    top_k: Positive | None
    optimizer: Literal["adamw", "mcore_distributed_optim"]
    precision: Literal["bf16", "32"]
    sequence_parallel: bool
    sequences: Positive
    sequence_length: Positive
    micro_batch: Positive
    chunk_mb: AboveZero
    memory_gb: AboveZero
    fixed_gb: NonNegative
    tflops: AboveZero
    tensor_link_gb_s: AboveZero
    data_link_gb_s: AboveZero
    output: FilePath | None

    @field_validator("top_k")
    @classmethod
    def _has_a_teacher(cls, top_k: int | None, info: ValidationInfo) -> int | None:
        if top_k is not None and info.data.get("objective") == "cross_entropy":
            raise ValueError("needs objective=distillation or mixed; leave it null")
        return top_k

    @field_validator("output")
    @classmethod
    def _has_a_folder(cls, output: Path | None) -> Path | None:
        if output is not None and not output.absolute().parent.is_dir():
            raise ValueError("lies in no existing folder; make it, or name another file")
        return output


def dry(settings: DryRunSettings) -> dict[str, Any]:
    """Counts of every stage, simulated times and the estimate, as plain containers.

    Raises:
        ValueError: `model` is no model, or the layout does not go with it; the message names the nearest that does.
    """
    from nemo_ee.commands.dry_ranks import Run, as_mapping, dry_run

    model, layout = _model(settings.model), Layout(*settings.layout)
    exits, assumptions = mlp_exits(model, settings.exits), _assumptions(settings)
    if problem := layout_problem(model, exits, layout, assumptions):
        nearest = nearest_layout(model, exits, layout, assumptions)
        raise ValueError(f"layout={list(settings.layout)}: {problem}; the nearest that works is {_text(nearest)}")
    if problem := _problem_of(settings, model):
        raise ValueError(problem)
    speeds = Speeds(settings.tflops, settings.tensor_link_gb_s, settings.data_link_gb_s)
    estimated = estimate(model, exits, layout, assumptions)
    entries = [{"name": exit.name, "layer": exit.layer} for exit in exits]
    distillation = {"distillation": {"top_k": settings.top_k}}
    block = {"exits": entries, "objective": settings.objective, **distillation}
    early_exit = EarlyExitConfig.from_mapping(block, num_layers=model.num_layers)
    placements = place_exits(
        early_exit.exits, num_layers=model.num_layers, num_stages=layout.pipeline,
        full_depth=early_exit.needs_final_exit, layers_per_stage=[stage.layers for stage in estimated.stages],
    )  # fmt: skip
    run = Run(
        model, early_exit, placements, layout, settings.micro_batch, settings.sequence_length,
        half=settings.precision == "bf16", optimizer=settings.optimizer,
        sequence_parallel=settings.sequence_parallel, chunk_bytes=int(settings.chunk_mb * 2**20),
    )  # fmt: skip
    stages = list(dry_run(run))
    times = [stage_times(stage.microbatch, stage.update, speeds) for stage in stages]
    microbatches = settings.sequences // (settings.micro_batch * layout.data)
    tokens = settings.sequences * settings.sequence_length / layout.gpus
    found: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "stages": [
            {**as_mapping(stage), "seconds": dataclasses.asdict(time), "estimated_bytes": dict(own.memory)}
            for stage, time, own in zip(stages, times, estimated.stages, strict=True)
        ],
        "peak_gb": max(sum(stage.peak_bytes.values()) for stage in stages) / GB + settings.fixed_gb,
        "estimated_gb": estimated.peak_gb,
    }
    for name, decoupled in (("decoupled", True), ("drained", False)) if not early_exit.has_teacher else ():
        found[f"{name}_tokens_per_s_per_gpu"] = tokens / step_seconds(times, microbatches, decoupled=decoupled)
    return found


def _model(name: str) -> Architecture:
    if name in LLAMA_2:
        return LLAMA_2[name]
    if not Path(name).is_dir():
        known = ", ".join(LLAMA_2)
        raise ValueError(f"model={name} is neither {known} nor a directory; give one of them, or a directory")
    return read_backbone(name)


def _assumptions(settings: DryRunSettings) -> Assumptions:
    half = {} if settings.precision == "bf16" else {"bytes_backbone": 4.0, "bytes_weight": 4.0, "bytes_optimizer": 8.0}
    return Assumptions(
        sequences=settings.sequences, sequence_length=settings.sequence_length, micro_batch=settings.micro_batch,
        chunk_mb=settings.chunk_mb, memory_gb=settings.memory_gb, fixed_gb=settings.fixed_gb,
        distributed_optimizer=settings.optimizer == "mcore_distributed_optim",
        full_depth=settings.objective != "cross_entropy", transformer_engine=False, **half,
    )  # fmt: skip


def _problem_of(settings: DryRunSettings, model: Architecture) -> str:
    tensor = settings.layout[0]
    if settings.sequence_parallel and settings.sequence_length % tensor:
        return (
            f"sequence_length={settings.sequence_length} with sequence_parallel=True must be a multiple of the "
            f"tensor-parallel size {tensor}"
        )
    if settings.top_k is not None and settings.top_k > model.vocab_size:
        return f"top_k={settings.top_k} is more than the {model.vocab_size} tokens of the vocabulary"
    return ""


def _text(layout: Layout | None) -> str:
    return f"layout=[{layout.tensor},{layout.pipeline},{layout.data}]" if layout else "none; change the batch"


def table(found: dict[str, Any]) -> str:
    """The stages as text."""
    lines = [("stage", "layers", "exits", "parameters", "TFLOP", "sent GB", *_KINDS, "peak GB", "estimated GB")]
    for stage in found["stages"]:
        sent = sum(one["bytes"] * one["count"] for one in stage["transfers"] if one["kind"] != "recv_")
        peak = stage["peak_bytes"]
        lines.append(
            (
                str(stage["stage"]), str(stage["layers"]), " ".join(stage["exits"]) or "-",
                f"{sum(stage['parameters'].values()):,}", f"{stage['flops'] / 1e12:.2f}", f"{sent / GB:.2f}",
                *(f"{peak[kind] / GB:.2f}" for kind in _KINDS), f"{sum(peak.values()) / GB:.2f}",
                f"{(sum(stage['estimated_bytes'].values()) - stage['estimated_bytes']['fixed']) / GB:.2f}",
            )
        )  # fmt: skip
    return format_table(lines)


_KINDS = ("backbone", "exits", "gradients", "optimizer", "temporary")


def transfers_of(stages: Sequence[dict[str, Any]]) -> str:
    """The transfers of the stages as text."""
    lines = [("stage", "transfer", "ranks", "MB", "times")]
    for stage in stages:
        lines += [
            (str(stage["stage"]), one["kind"], str(one["ranks"]), f"{one['bytes'] / 1e6:.3f}", str(one["count"]))
            for one in sorted(stage["transfers"], key=lambda one: -one["bytes"] * one["count"])
        ]
    return format_table(lines)


def verdict(found: dict[str, Any], settings: DryRunSettings) -> str:
    """Whether it fits, and what would."""
    peak, limit = found["peak_gb"], settings.memory_gb
    text = f"peak with {settings.fixed_gb:g} GB for CUDA: {peak:.1f} of {limit:g} GB"
    if peak <= limit:
        return text
    model, assumptions = _model(settings.model), _assumptions(settings)
    # The estimate is corrected by what it misses here.
    corrected = dataclasses.replace(assumptions, memory_gb=limit * found["estimated_gb"] / peak)
    given = mlp_exits(model, settings.exits), Layout(*settings.layout), corrected
    return f"{text}: DOES NOT FIT; it would with {_text(smallest_change_that_fits(model, *given))}"
