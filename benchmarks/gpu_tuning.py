# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A step of exit tuning on a GPU: a model of 1.1B parameters with random weights, against its matrix products alone
and against tuning the plain way. Part of scripts/gpu_check.py.

Plain Megatron-core, one rank, bf16, no NeMo. Our steps have fp32 gradients, main weights and moments; the plain way's
are bf16, which is faster and takes less memory.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch.autograd import DeviceType

from benchmarks.matrix_products import MatrixProducts
from benchmarks.measure import interleaved, median_of_ratios, wait_for
from benchmarks.plain_tuning import PlainTuning
from nemo_ee.checkpoint.megatron_model import stage_of
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.placement import place_exits
from nemo_ee.families.architecture import Architecture
from nemo_ee.megatron.model.layer_spec import TorchAttention
from nemo_ee.megatron.model.microbatch import MicroBatch
from nemo_ee.megatron.pipeline.exit_tuner import ExitTuner

OPTIM = {"name": "adamw", "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.01}
MIB = 2**20
SHOWN_KERNELS = 16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: TinyLlama's 1.1B, three exits, 16,384 tokens a step."""

    model: Architecture = Architecture(
        num_layers=22, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=32, num_query_groups=4,
        kv_channels=64, vocab_size=32000, max_position_embeddings=2048, family="llama",
    )  # fmt: skip
    exits: tuple[int, ...] = (5, 11, 16)
    length: int = 2048
    batch: int = 8
    rounds: int = 7
    chunks_mib: tuple[int, ...] = (64, 256, 1024)
    new_tokens: int = 64
    batches: tuple[int, ...] = (1, 16, 64)


TINY = Sizes(
    Architecture(
        num_layers=3, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, kv_channels=16,
        vocab_size=256, max_position_embeddings=128, family="llama",
    ),
    exits=(1, 2), length=16, batch=2, rounds=1, chunks_mib=(1,), new_tokens=8, batches=(1, 2),
)  # fmt: skip


def model_of(sizes: Sizes, device: str, *, full_depth: bool, objective: str = "cross_entropy") -> tuple[Any, ...]:
    """(stage with random weights, early exit, placements)."""
    exits, num_layers = [{"layer": layer} for layer in sizes.exits], sizes.model.num_layers
    early_exit = EarlyExitConfig.from_mapping({"exits": exits, "objective": objective}, num_layers=num_layers)
    stages = place_exits(early_exit.exits, num_layers=num_layers, num_stages=1, full_depth=full_depth)
    half = {"params_dtype": torch.bfloat16, "bf16": True}
    on_cpu = {"use_cpu_initialization": True} if device == "cpu" else {}
    model = stage_of(sizes.model, early_exit, stages, full_depth=full_depth, **half, **on_cpu).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.02)
    return model, early_exit, stages


Step = Callable[[MicroBatch], Any]


def step_of(tuner: ExitTuner, chunk_bytes: int | None = None) -> Step:
    """One step of ours on a microbatch. A model has one tuner: another would take its gradients over."""
    context = dataclasses.replace(tuner.context, chunk_bytes=chunk_bytes)

    def step(batch: MicroBatch) -> None:
        tuner.context = context
        tuner.tune([batch], log=False)

    return step


def measure(sizes: Sizes, device: str) -> dict[str, Any]:
    """Numbers of the JSON's `tuning`."""
    generator = torch.Generator().manual_seed(1)
    shape = (sizes.batch, sizes.length + 1)
    tokens = torch.randint(0, sizes.model.vocab_size, shape, generator=generator).to(device)
    positions = torch.arange(sizes.length, device=device).expand(sizes.batch, -1)
    ones = torch.ones(sizes.batch, sizes.length, device=device)
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], ones, positions)
    run = {"optim": OPTIM, "num_steps": 1000, "max_norm": 1.0}
    tuner = ExitTuner(*model_of(sizes, device, full_depth=False), **run)
    steps: dict[str, Step] = {"ours": step_of(tuner)}
    steps |= {f"chunk_{size}_mib": step_of(tuner, size * MIB) for size in sizes.chunks_mib}
    found: dict[str, Any] = {"exits": list(sizes.exits), "tokens": sizes.batch * sizes.length}
    steps["megatrons_attention"] = _with_megatrons_attention(steps["ours"])
    found |= _memory("ours", steps["ours"], batch, device)
    found |= _memory("megatrons_attention", steps["megatrons_attention"], batch, device)
    products = MatrixProducts()
    with products:
        steps["ours"](batch)
    found["kernels"], found["gpu_busy_s"] = _kernels(steps["ours"], batch, device)
    distilled = model_of(sizes, device, full_depth=True, objective="distillation")
    steps["distilled"] = step_of(ExitTuner(*distilled, **run))
    plain = model_of(sizes, device, full_depth=True)[0]
    steps["plain"] = PlainTuning(plain, OPTIM, max_norm=1.0)
    try:
        found |= _memory("plain", lambda given: steps["plain"]([given]), batch, device)
    except torch.cuda.OutOfMemoryError:
        del steps["plain"]
        found["plain"] = "out of memory"

    def timed(name: str) -> Callable[[], None]:
        given = [batch] if name == "plain" else batch
        return lambda: (steps[name](given), wait_for(device))

    times = interleaved({name: timed(name) for name in steps}, rounds=sizes.rounds)
    times["matmul"] = [products.replay() for _ in range(sizes.rounds)]
    found |= {f"{name}_s": statistics.median(values) for name, values in times.items()}
    found |= {"gflop": products.flop() / 1e9, "tokens_per_s": found["tokens"] / found["ours_s"]}
    found["matmul_tflops"] = found["gflop"] / 1e3 / found["matmul_s"]
    found["step_over_matmul"] = found["ours_s"] / found["matmul_s"]
    if "plain" in times:
        found["time_over_plain"] = median_of_ratios(times["ours"], times["plain"])
        if found["plain_temporary_mib"]:
            found["memory_over_plain"] = found["ours_temporary_mib"] / found["plain_temporary_mib"]
    return found


def _with_megatrons_attention(step: Step) -> Step:
    """The same step with the attention that Megatron's local layers have where Transformer Engine is absent."""

    def slow(batch: MicroBatch) -> None:
        fast, TorchAttention.forward = TorchAttention.forward, DotProductAttention.forward
        try:
            step(batch)
        finally:
            TorchAttention.forward = fast

    return slow


def _memory(name: str, step: Step, batch: MicroBatch, device: str) -> dict[str, float]:
    """Peak of a step over what lies there before it; 0 on the CPU, where benchmarks/tuning.py measures it."""
    for _ in range(2):
        step(batch)
    wait_for(device)
    if device == "cpu":
        return {f"{name}_temporary_mib": 0.0}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(batch)
    wait_for(device)
    return {f"{name}_temporary_mib": (torch.cuda.max_memory_allocated() - before) / MIB}


def _kernels(step: Step, batch: MicroBatch, device: str) -> tuple[list[Any], float]:
    """(the longest kernels of a step: name, milliseconds, calls; seconds of all of them)."""
    if device == "cpu":
        return [], 0.0
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(batch)
        wait_for(device)
    rows = sorted(kernels_of(profiler), key=lambda row: -row.self_device_time_total)
    shown = [(row.key[:90], round(row.self_device_time_total / 1e3, 3), row.count) for row in rows[:SHOWN_KERNELS]]
    return shown, sum(row.self_device_time_total for row in rows) / 1e6


def kernels_of(profiler: Any) -> list[Any]:
    """What ran on the GPU, without the calls of the host that started it."""
    return [row for row in profiler.key_averages() if row.device_type == DeviceType.CUDA]
