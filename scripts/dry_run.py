# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What a step of exit tuning computes, sends and holds on the ranks of a layout, without its hardware.

python scripts/dry_run.py model=70B layout=[8,8,16]

The first rank of every pipeline stage is built by the real code, on torch's `fake` process groups and fake tensors,
and makes a step. The table has parameters, TFLOPs of a microbatch, gigabytes handed to transfers in a step with one
microbatch, and bytes at the peak by kind, with the estimate of scripts/estimate_tuning.py beside them. Speeds are
simulated from the stated ones, with stages decoupled and drained.

Options: conf/dry_run.yaml.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import hydra
from omegaconf import DictConfig

from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.commands.command import command
from nemo_ee.commands.console import show
from nemo_ee.evaluation.report import format_table
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


def dry(settings: DryRunSettings) -> dict[str, Any]:
    """Counts of every stage, simulated times and the estimate, as plain containers.

    Raises:
        ValueError: the model is none, or the layout does not go with it; the message names the nearest that does.
    """
    from nemo_ee.planning.pipeline_simulation import Speeds
    from nemo_ee.planning.tuning_estimate import Layout

    speeds = Speeds(settings.tflops, settings.tensor_link_gb_s, settings.data_link_gb_s)
    model, layout = _model(settings.model), Layout(*settings.layout)
    return {"settings": settings.model_dump(mode="json"), **run_layout(model, layout, settings, speeds)}


def run_layout(model: Any, layout: Any, settings: DryRunSettings, speeds: Any) -> dict[str, Any]:
    """`dry` of a model on a layout."""
    from nemo_ee.commands.dry_run import Run, as_mapping, dry_run
    from nemo_ee.exits.config import EarlyExitConfig
    from nemo_ee.exits.placement import place_exits
    from nemo_ee.planning.pipeline_simulation import stage_times, step_seconds
    from nemo_ee.planning.tuning_estimate import estimate, layout_problem, mlp_exits, nearest_layout

    exits, assumptions = mlp_exits(model, settings.exits), _assumptions(settings)
    if problem := layout_problem(model, exits, layout, assumptions):
        nearest = nearest_layout(model, exits, layout, assumptions)
        raise ValueError(f"layout={list(settings.layout)}: {problem}; the nearest that works is {_text(nearest)}")
    estimated = estimate(model, exits, layout, assumptions)
    entries = [{"name": exit.name, "layer": exit.layer} for exit in exits]
    distillation = {"distillation": {"top_k": settings.top_k}}
    block = {"exits": entries, "objective": settings.objective, **distillation}
    early_exit = EarlyExitConfig.from_mapping(block, num_layers=model.num_layers)
    # The estimate's split; layers past the deepest exit go to the last stage where a teacher needs them.
    counts = [stage.layers for stage in estimated.stages]
    if early_exit.needs_final_exit:
        counts[-1] += model.num_layers - sum(counts)
    placements = place_exits(
        early_exit.exits, num_layers=model.num_layers, num_stages=layout.pipeline,
        full_depth=early_exit.needs_final_exit, layers_per_stage=counts,
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
        "stages": [
            {**as_mapping(stage), "seconds": dataclasses.asdict(time), "estimated_bytes": dict(own.memory)}
            for stage, time, own in zip(stages, times, estimated.stages, strict=True)
        ],
        "peak_gb": max(sum(stage.peak_bytes.values()) for stage in stages) / GB + settings.fixed_gb,
        "estimated_gb": estimated.peak_gb,
    }
    for name, decoupled in (("decoupled", True), ("drained", False)):
        found[f"{name}_tokens_per_s_per_gpu"] = tokens / step_seconds(times, microbatches, decoupled=decoupled)
    return found


def _model(name: str) -> Any:
    from nemo_ee.checkpoint.huggingface import read_backbone
    from nemo_ee.planning.tuning_estimate import LLAMA_2

    if name in LLAMA_2:
        return LLAMA_2[name]
    if not Path(name).is_dir():
        known = ", ".join(LLAMA_2)
        raise ValueError(f"model={name} is neither {known} nor a directory; give one of them, or a directory")
    return read_backbone(name)


def _assumptions(settings: DryRunSettings) -> Any:
    from nemo_ee.planning.tuning_estimate import Assumptions

    half = {} if settings.precision == "bf16" else {"bytes_backbone": 4.0, "bytes_weight": 4.0, "bytes_optimizer": 8.0}
    return Assumptions(
        sequences=settings.sequences, sequence_length=settings.sequence_length, micro_batch=settings.micro_batch,
        chunk_mb=settings.chunk_mb, memory_gb=settings.memory_gb, fixed_gb=settings.fixed_gb,
        distributed_optimizer=settings.optimizer == "mcore_distributed_optim", **half,
    )  # fmt: skip


def _text(layout: Any) -> str:
    return f"layout=[{layout.tensor},{layout.pipeline},{layout.data}]" if layout else "none; change the batch"


def table(found: dict[str, Any]) -> str:
    """The stages as text."""
    lines = [("stage", "layers", "exits", "parameters", "TFLOP", "sent GB", *_KINDS, "peak GB", "estimated GB")]
    for stage in found["stages"]:
        sent = sum(one["bytes"] * one["count"] for one in stage["transfers"])
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
    from nemo_ee.planning.tuning_estimate import Layout, mlp_exits, smallest_change_that_fits

    peak, limit = found["peak_gb"], settings.memory_gb
    text = f"peak with {settings.fixed_gb:g} GB for CUDA: {peak:.1f} of {limit:g} GB"
    if peak <= limit:
        return text
    model = _model(settings.model)
    given = mlp_exits(model, settings.exits), Layout(*settings.layout), _assumptions(settings)
    return f"{text}: DOES NOT FIT; it would with {_text(smallest_change_that_fits(model, *given))}"


@hydra.main(version_base="1.3", config_path="../conf", config_name="dry_run")
def main(cfg: DictConfig) -> None:
    """Run with the options of conf/dry_run.yaml."""
    with command(cfg):
        settings = DryRunSettings.from_config(cfg)
        found = dry(settings)
        speeds = [
            f"{name} {found[f'{name}_tokens_per_s_per_gpu']:,.0f} tokens/s per GPU"
            for name in ("decoupled", "drained")
        ]
        show(table(found))
        show(transfers_of(found["stages"]))
        show(f"{verdict(found, settings)}\nsimulated: {', '.join(speeds)}")
        if settings.output:
            write_json(settings.output, found)


if __name__ == "__main__":
    main()
