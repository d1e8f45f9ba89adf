# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tuning on one process: a step against its parts, against the plain way, and a sweep against separate runs.

Every function runs in a process of its own (see `processes`) and returns numbers under the names of the table.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback

from benchmarks import workload
from benchmarks.matrix_products import MatrixProducts
from benchmarks.measure import interleaved, median_of_ratios, peak_bytes, reset_peak, resident_bytes
from benchmarks.plain_tuning import PlainTuning
from benchmarks.workload import BareStep, Sizes
from nemo_ee.megatron.loss.linear_cross_entropy import buffers_of_a_chunk
from nemo_ee.megatron.loss.vocab_parallel import chunk_bytes_on, tokens_of_a_chunk
from nemo_ee.megatron.pipeline.exit_loss import tune_exit

REFERENCE_EXITS = [{"layer": layer} for layer in (3, 6, 9)]
WARMUP_STEPS = 2
MEMORY_STEPS = 4  # the allocator's holes between blocks grow for a few steps


class StepAgainstFloor(Callback):
    """Between the steps of a fit, times the necessary parts of a step: partial forward and each exit's work alone.

    A step's time is all that passes between two calls of this callback: data, the step, optimizer, logging, the loop.
    The matrix products are recorded once, the first time the parts run, and timed alone after every later step.
    """

    def __init__(self, batches: list) -> None:
        self.batches = batches
        self.products = MatrixProducts()
        self.steps: list[float] = []
        self.floors: list[float] = []
        self.matmuls: list[float] = []
        self._resumed = 0.0

    def on_train_batch_start(self, trainer, model, batch, batch_idx) -> None:
        if not self._resumed:
            self._resumed = time.perf_counter()

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        self.steps.append(time.perf_counter() - self._resumed)
        if not self.products.counts:
            with self.products:
                self._floor(model.tuning_context)
        self.floors.append(self._floor(model.tuning_context))
        self.matmuls.append(self.products.replay())
        self._resumed = time.perf_counter()

    def _floor(self, context) -> float:
        """Seconds of the parts, in the order of a step, so that the processor caches hold the same data as in a
        step."""
        total = 0.0
        for batch in self.batches:
            stage = None  # nothing of the last microbatch is alive in a step either
            start = time.perf_counter()
            stage = context.model.forward_to_taps(batch)
            total += time.perf_counter() - start
            for head in context.model.exits:
                start = time.perf_counter()
                tune_exit(context, head, batch, stage, grad_scale=1e-4)
                total += time.perf_counter() - start
        return total


def step_against_floor(sizes: Sizes, folder: Path) -> dict[str, float]:
    """`step_over_floor` and `step_over_matmul` on the reference model inside Lightning's loop."""
    batches = workload.random_batches(sizes, sizes.microbatches, vocabulary=workload.REFERENCE_VOCABULARY)
    watch = StepAgainstFloor(batches)
    steps = WARMUP_STEPS + sizes.rounds
    trainer = workload.trainer(folder, steps=steps, log_every=1, callbacks=[watch])
    settings = workload.model_settings(sizes, REFERENCE_EXITS, data=workload.data_settings(folder, sizes))
    model = workload.reference_model(settings, trainer)
    trainer.fit(model)
    kept, floors, matmuls = (times[WARMUP_STEPS:] for times in (watch.steps, watch.floors, watch.matmuls))
    return {
        "step_over_floor": median_of_ratios(kept, floors),
        "step_over_floor.step_s": statistics.median(kept),
        "step_over_floor.floor_s": statistics.median(floors),
        "step_over_matmul": median_of_ratios(kept, matmuls),
        "step_over_matmul.step_s": statistics.median(kept),
        "step_over_matmul.matmul_s": statistics.median(matmuls),
        "step_over_matmul.gflop": watch.products.flop() / 1e9,
    }


def distill_against_floor(sizes: Sizes, folder: Path) -> dict[str, float]:
    """`distill_step_over_floor`: a step of exits that learn from the final exit over its necessary parts: the forward
    pass, each exit's work alone, and the final exit's distribution once. `apart`: once for each exit."""
    model = workload.wide_model(
        sizes, workload.trainer(folder), vocabulary=sizes.vocabulary, exits=sizes.exits, full_depth=True,
        objective="distillation",
    )  # fmt: skip
    step = BareStep(model)
    (batch,) = workload.random_batches(sizes, 1, vocabulary=sizes.vocabulary)
    context = model.tuning_context
    output = context.model.forward_to_taps(batch)
    teacher = context.teachers.teacher(context.teachers.after_forward(output, batch))
    vocabulary = context.model.vocabulary()
    rows = teacher.weight.shape[0]
    objective = next(iter(context.objectives.values()))
    buffers = buffers_of_a_chunk(objective, teacher, torch.float32)
    chunk_bytes = chunk_bytes_on(context.device, rows, buffers=buffers)
    tokens = tokens_of_a_chunk(rows, chunk_bytes, buffers=buffers)

    def form() -> None:
        for start in range(0, batch.tokens.numel(), tokens):
            teacher.chunk(slice(start, start + tokens), vocabulary)

    sides = {"step": lambda: step([batch]), "forward": lambda: context.model.forward_to_taps(batch), "teacher": form}
    names = [head.exit.name for head in context.model.exits]
    for name in names:
        head = context.model.exits[name]
        sides[name] = partial(tune_exit, context, head, batch, output, grad_scale=1e-4, teacher=teacher)
    times = interleaved(sides, rounds=sizes.rounds)
    apart = [sum(parts) for parts in zip(times["forward"], *(times[name] for name in names), strict=True)]
    floor = [whole - (len(names) - 1) * formed for whole, formed in zip(apart, times["teacher"], strict=True)]
    return {
        "distill_step_over_floor": median_of_ratios(times["step"], floor),
        "distill_step_over_floor.step_s": statistics.median(times["step"]),
        "distill_step_over_floor.floor_s": statistics.median(floor),
        "distill_step_over_floor.apart_s": statistics.median(apart),
        "distill_step_over_floor.teacher_s": statistics.median(times["teacher"]),
    }


def time_against_plain(sizes: Sizes, folder: Path) -> dict[str, float]:
    """`time_over_plain`: a bare step of ours over a plain one, wide model, one microbatch."""
    vocabulary, exits = sizes.vocabulary, sizes.exits
    trainer = workload.trainer(folder)
    ours = BareStep(workload.wide_model(sizes, trainer, vocabulary=vocabulary, exits=exits, full_depth=False))
    theirs = workload.wide_model(sizes, trainer, vocabulary=vocabulary, exits=exits, full_depth=True)
    plain = PlainTuning(theirs.model, workload.OPTIMIZER, max_norm=workload.CLIP)
    with torch.no_grad():  # one set of weights: both must report the same loss
        weights = dict(theirs.model.named_parameters())
        for name, parameter in ours.model.model.named_parameters():
            parameter.copy_(weights[name])
    batches = workload.random_batches(sizes, 1, vocabulary=vocabulary)
    losses = ours(batches), plain(batches)
    if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[1]):
        raise RuntimeError(f"the two sides compute different losses: {losses[0]} and {losses[1]}")
    times = interleaved({"ours": lambda: ours(batches), "plain": lambda: plain(batches)}, rounds=sizes.rounds)
    return {
        "time_over_plain": median_of_ratios(times["ours"], times["plain"]),
        "time_over_plain.ours_s": statistics.median(times["ours"]),
        "time_over_plain.plain_s": statistics.median(times["plain"]),
    }


def temporary_memory(sizes: Sizes, folder: Path, *, plain: bool, vocabulary: int, exits: int) -> float:
    """Peak resident bytes over weights, gradients and optimizer state in four steps. In a fresh process.

    Steps on two tokens run first: they allocate the libraries' own memory (code, thread stacks), gradients and
    optimizer state. Free memory is then returned to the system, and the peak is reset.
    """
    trainer = workload.trainer(folder)
    model = workload.wide_model(sizes, trainer, vocabulary=vocabulary, exits=exits, full_depth=plain)
    step = PlainTuning(model.model, workload.OPTIMIZER, max_norm=workload.CLIP) if plain else BareStep(model)
    few = dataclasses.replace(sizes, batch=1, length=2)
    for _ in range(2):
        step(workload.random_batches(few, 1, vocabulary=vocabulary))
    batches = workload.random_batches(sizes, 1, vocabulary=vocabulary)
    before = resident_bytes()
    reset_peak()
    for _ in range(MEMORY_STEPS):
        step(batches)
    return float(peak_bytes() - before)


def sweep_against_separate(sizes: Sizes, folder: Path) -> dict[str, float]:
    """`sweep_over_separate`: nine variants at layer 9 of the reference model in one pass over nine runs, per step."""
    trainer = workload.trainer(folder)
    variants = [
        {"name": f"{architecture}-{init}", "layer": 9, "architecture": architecture, "init": init}
        for architecture in ("norm", "mlp", "layer")
        for init in ("copy", "random", "lora")
    ]
    runs = {"sweep": variants, **{variant["name"]: [variant] for variant in variants}}
    batches = workload.random_batches(sizes, sizes.pipeline_microbatches, vocabulary=workload.REFERENCE_VOCABULARY)
    steps = {
        name: BareStep(workload.reference_model(workload.model_settings(sizes, exits), trainer))
        for name, exits in runs.items()
    }
    sides = {name: lambda step=step: step(batches) for name, step in steps.items()}
    times = interleaved(sides, rounds=max(1, sizes.rounds // 2 + 1))
    separate = [sum(one) for one in zip(*(times[variant["name"]] for variant in variants), strict=True)]
    return {
        "sweep_over_separate": median_of_ratios(times["sweep"], separate),
        "sweep_over_separate.sweep_s": statistics.median(times["sweep"]),
        "sweep_over_separate.separate_s": statistics.median(separate),
    }
