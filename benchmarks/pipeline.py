# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tuning on two pipeline stages, one thread each, inside Lightning's loop: decoupled stages and the layer split.

Throughput is read where the pipeline ends: the time between the last stage's steps. Every function runs on both ranks
(see `processes`) and returns, on the last stage, numbers under the names of the table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from megatron.core import parallel_state

from benchmarks import workload
from benchmarks.measure import median_of_ratios, seconds
from benchmarks.workload import BareStep, Sizes

RANKS = 2


class Blocks(Callback):
    """Runs blocks of steps, decoupled and drained in turn, and times the steps of each on this stage.

    Drained: after every step all sends are waited for and the stages meet. Between blocks they meet as well. A block's
    first step fills the pipeline and is not kept.

    Args:
        modes: modes of one round, `decoupled` or `drained`.
        steps: steps of a block. Stages and data-parallel ranks exchange logged numbers at its end.
    """

    def __init__(self, modes: Sequence[str], steps: int) -> None:
        self.modes, self.steps = list(modes), steps
        self.times: dict[str, list[float]] = {mode: [] for mode in modes}  # seconds of a step, one entry per block
        self._ends: list[float] = []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        step = trainer.global_step - 1  # end of the last step
        mode = self.modes[step // self.steps % len(self.modes)]
        last = (step + 1) % self.steps == 0
        if mode == "drained":
            meet(model)
        self._ends.append(time.perf_counter())
        if last:
            self.times[mode].append((self._ends[-1] - self._ends[0]) / (self.steps - 1))
            self._ends = []
            meet(model)


def meet(model) -> None:
    """Wait for this stage's sends, then for the other stages."""
    model.context.drain()
    torch.distributed.barrier(group=parallel_state.get_pipeline_model_parallel_group())


def fit(
    sizes: Sizes, folder: Path, exits: Sequence[Mapping[str, Any]], *, blocks: Blocks, rounds: int, split: dict,
    microbatches: int,
):  # fmt: skip
    """Tune the reference model on two stages for `rounds` rounds of `blocks`. Returns the model."""
    steps = rounds * len(blocks.modes) * blocks.steps
    trainer = workload.trainer(folder, ranks=RANKS, steps=steps, log_every=blocks.steps, callbacks=[blocks])
    settings = workload.model_settings(
        sizes, exits, pipeline_model_parallel_size=RANKS, microbatches=microbatches, layer_split=split,
        data=workload.data_settings(folder, sizes),
    )  # fmt: skip
    model = workload.reference_model(settings, trainer)
    wanted = split.get("layers")
    found = [placement.num_layers for placement in model.placements]
    if wanted and found != wanted:
        raise RuntimeError(f"the model's layers are split {found}, not {wanted} as in model.layer_split")
    trainer.fit(model)
    return model


def decoupled_against_drained(sizes: Sizes, folder: Path, *, microbatches: int) -> dict[str, float]:
    """`decoupled_over_drained_mb<n>`: one mlp exit at layer 10, eight layers before two and the exit.

    `decoupled_mb<n>_over_bound` is this over the most there is to gain, the drained step over the slower stage alone.
    """
    blocks = Blocks(["decoupled", "drained"], sizes.steps)
    model = fit(
        sizes, folder, [{"layer": 10}], blocks=blocks, rounds=sizes.rounds, split={"layers": [8, 2]},
        microbatches=microbatches,
    )  # fmt: skip
    name = f"decoupled_over_drained_mb{microbatches}"
    decoupled, drained = blocks.times["decoupled"], blocks.times["drained"]
    own = own_times(model, sizes, name=name, microbatches=microbatches)
    over_bound = f"decoupled_mb{microbatches}_over_bound"
    return {
        name: median_of_ratios(drained, decoupled),
        f"{name}.decoupled_s": statistics.median(decoupled),
        f"{name}.drained_s": statistics.median(drained),
        **own,
        over_bound: max(own.values()) / statistics.median(decoupled),
        f"{over_bound}.bound": statistics.median(drained) / max(own.values()),
    }


class Unlinked:
    """A `Transport` of a stage alone: received tensors are always ready, sent tensors are dropped."""

    num_stages = RANKS

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self._received = None

    def drain(self):
        pass

    def expect(self, stage, shape, dtype, device):
        if self._received is None:
            self._received = _Received(torch.randn(shape, dtype=dtype, device=device))
        return self._received

    def send(self, stage, tensor) -> None:
        pass


class _Received:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def wait(self) -> torch.Tensor:
        return self.tensor


def own_times(model, sizes: Sizes, *, name: str, microbatches: int) -> dict[str, float]:
    """`<name>.stage<i>_own_s`: seconds of each stage's own step, timed while it runs alone.

    Its layers, its exits' work and their optimizers, without pipeline, loop and data, the other rank idle: only the
    work that the stage cannot do without. The model's transport is replaced.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    model.tuning_context = replace(model.tuning_context, transport=Unlinked(stage))
    batches = workload.random_batches(sizes, microbatches, vocabulary=workload.REFERENCE_VOCABULARY)
    step = BareStep(model)
    own = torch.zeros(RANKS, dtype=torch.float64)
    for turn in range(RANKS):
        torch.distributed.barrier(group=parallel_state.get_pipeline_model_parallel_group())
        if turn == stage:
            step(batches)
            own[stage] = statistics.median(seconds(lambda: step(batches)) for _ in range(sizes.rounds))
    torch.distributed.all_reduce(own, group=parallel_state.get_pipeline_model_parallel_group())
    return {f"{name}.stage{index}_own_s": value for index, value in enumerate(own.tolist())}


def decoupled_against_bound(sizes: Sizes, folder: Path) -> dict[str, float]:
    """`decoupled_over_bound`: exits 3, 6, 9. The bound is the slower stage's own step (see `own_times`)."""
    exits = [{"layer": layer} for layer in (3, 6, 9)]
    blocks = Blocks(["decoupled"], sizes.steps)
    model = fit(
        sizes, folder, exits, blocks=blocks, rounds=sizes.rounds, split={"layers": None},
        microbatches=sizes.pipeline_microbatches,
    )  # fmt: skip
    own = own_times(model, sizes, name="decoupled_over_bound", microbatches=sizes.pipeline_microbatches)
    measured = statistics.median(blocks.times["decoupled"])
    return {
        "decoupled_over_bound": max(own.values()) / measured,
        "decoupled_over_bound.step_s": measured,
        **own,
    }


def cost_split_against_even(sizes: Sizes, folder: Path, *, layer: int, name: str) -> dict[str, float]:
    """`cost_split_over_even_<name>`: one mlp exit at `layer`; a run of each split in turn, throughput compared."""
    times: dict[str, list[float]] = {"parameters": [], "even": []}
    splits: dict[str, list[int]] = {}
    for _ in range(sizes.rounds):
        for cost, found in times.items():
            blocks = Blocks(["decoupled"], sizes.steps)
            model = fit(
                sizes, folder, [{"layer": layer}], blocks=blocks, rounds=1, split={"layers": None, "cost": cost},
                microbatches=sizes.pipeline_microbatches,
            )  # fmt: skip
            found += blocks.times["decoupled"]
            splits[cost] = [placement.num_layers for placement in model.placements]
    key = f"cost_split_over_even_{name}"
    return {
        key: median_of_ratios(times["even"], times["parameters"]),
        f"{key}.cost_s": statistics.median(times["parameters"]),
        f"{key}.even_s": statistics.median(times["even"]),
        **{f"{key}.{cost}_first_stage_layers": float(split[0]) for cost, split in splits.items()},
    }
