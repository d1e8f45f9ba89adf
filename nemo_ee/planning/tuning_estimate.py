# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a tuning run, on paper: the cost model and the layer split of the training code, and a machine.

    stage, microbatch   FLOPs / (peak * utilisation) + tensor-parallel all-reduces, or the transfer if that is longer
    stage, step         microbatches * that + all-reduce of its exits' gradients + their optimizer step
    run                 steps * the slowest stage's step (stages are decoupled), + filling the pipeline once

    memory of a stage   weights of its layers + training state of its exits + one loss chunk + taps
                        + activations of the largest exit, or working memory of a layer if that is larger + a constant

A ring moves 2 (n-1)/n of the bytes to reduce over n ranks. The backbone's word embeddings are on the first stage.
Sizes in bytes, times in seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache

from nemo_ee.exits.config import ExitConfig
from nemo_ee.exits.partition import balanced_cut
from nemo_ee.exits.placement import StagePlacement, layers_that_run, place_exits, skips_last_mlp
from nemo_ee.families.architecture import Architecture
from nemo_ee.planning.cost_model import (
    ModelShape,
    StageCosts,
    count_flops,
    exit_operations,
    exit_parameters,
    layer_operations,
)

# Master weight and two moments read and written, gradient read, weight written: 2 * 12 + 4 + 2.
_OPTIMIZER_TRAFFIC = 30


def _llama_2(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> Architecture:
    return Architecture(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads, num_query_groups=groups,
        kv_channels=128, vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip


LLAMA_2 = {
    "7B": _llama_2(32, 4096, 11008, 32, 32),
    "13B": _llama_2(40, 5120, 13824, 40, 40),
    "70B": _llama_2(80, 8192, 28672, 64, 8),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tensor-, pipeline- and data-parallel size."""

    tensor: int
    pipeline: int
    data: int

    @property
    def gpus(self) -> int:
        """Their product."""
        return self.tensor * self.pipeline * self.data


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Assumptions about machine and run. The machine is an A100-80GB, the recipe that of EE-Tuning's scripts.

    Attributes:
        peak_tflops: dense bf16 of one GPU.
        utilisation: share of it that matrix products reach.
        memory_gb: memory of one GPU in 1e9 bytes.
        memory_bandwidth_gb_s: memory bandwidth of one GPU; the optimizer's step is bound by it.
        tensor_link_gb_s: per GPU and direction inside a node (all-reduces of tensor parallelism).
        data_link_gb_s: per GPU and direction between nodes (gradients, hidden states between stages).
        bytes_backbone: per parameter of the backbone.
        bytes_weight, bytes_gradient, bytes_optimizer: per trained parameter; 2 + 4 + 12 is bf16 with fp32 gradients,
            master weights and two moments.
        bytes_activation: per number in a hidden state.
        distributed_optimizer: optimizer state is shared out over the data-parallel ranks.
        chunk_mb: fp32 logits of one loss chunk, 2**20 bytes; the default is an 80 GB GPU's
            (`megatron.loss.vocab_parallel.chunk_bytes_on`).
        fixed_gb: CUDA context, NCCL buffers, fragmentation.
        steps, sequences, sequence_length: the run; sequences per step over all ranks.
        micro_batch: sequences per microbatch.
        fused_attention: attention skips the masked half of the square.
        full_depth: the layers past the deepest exit run too, and the final exit, as a teacher needs them.
        transformer_engine: its modules; without it, in half precision, norms keep two fp32 copies of a hidden state.
    """

    peak_tflops: float = 312.0
    utilisation: float = 0.45
    memory_gb: float = 80.0
    memory_bandwidth_gb_s: float = 1600.0
    tensor_link_gb_s: float = 250.0
    data_link_gb_s: float = 20.0
    bytes_backbone: float = 2.0
    bytes_weight: float = 2.0
    bytes_gradient: float = 4.0
    bytes_optimizer: float = 12.0
    bytes_activation: float = 2.0
    distributed_optimizer: bool = False
    chunk_mb: float = 256.0
    fixed_gb: float = 2.0
    steps: int = 40_000
    sequences: int = 16
    sequence_length: int = 2048
    micro_batch: int = 1
    fused_attention: bool = True
    full_depth: bool = False
    transformer_engine: bool = True


@dataclasses.dataclass(frozen=True)
class StageEstimate:
    """One stage: its layers and exits, seconds per step and bytes per GPU by part."""

    layers: int
    exits: tuple[str, ...]
    seconds: dict[str, float]
    memory: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A run under one layout.

    Attributes:
        layout: its sizes.
        stages: one estimate per stage.
        hours: duration of the whole run.
        gpu_hours: times the number of GPUs.
        tokens_per_second: over all GPUs.
        peak_gb: largest memory of any GPU, 1e9 bytes.
        fits: it is within the assumed memory.
        slowest_share: share of the slowest stage in the compute of all stages.
        even_slowest_share: the same under an even split of the layers.
    """

    layout: Layout
    stages: tuple[StageEstimate, ...]
    hours: float
    gpu_hours: float
    tokens_per_second: float
    peak_gb: float
    fits: bool
    slowest_share: float
    even_slowest_share: float


def mlp_exits(model: Architecture, count: int) -> tuple[ExitConfig, ...]:
    """The paper's exits: one at a quarter of the depth, or `count` at equal steps down to the full depth.

    Raises:
        ValueError: more exits than layers.
    """
    if not 1 <= count <= model.num_layers:
        raise ValueError(f"exits = {count} must be in 1..{model.num_layers}, the model's layers")
    shares = [0.25] if count == 1 else [(index + 1) / count for index in range(count)]
    layers = [max(1, round(share * model.num_layers)) for share in shares]
    return tuple(ExitConfig(f"layer{layer}-mlp", layer, "mlp", "copy", "own") for layer in layers)


def shape_of(model: Architecture, layout: Layout, assumptions: Assumptions) -> ModelShape:
    """A model and a run of it, for the cost model."""
    return ModelShape(
        model,
        sequence=assumptions.sequence_length,
        micro_batch=assumptions.micro_batch,
        fused_attention=assumptions.fused_attention,
        tensor_parallel=layout.tensor,
        chunk_bytes=int(assumptions.chunk_mb * 2**20),
        transformer_engine=assumptions.transformer_engine,
    )


def layout_problem(model: Architecture, exits: Sequence[ExitConfig], layout: Layout, assumptions: Assumptions) -> str:
    """The reason why a run cannot have this layout; empty if it can."""
    to_run = layers_that_run(exits, num_layers=model.num_layers, full_depth=assumptions.full_depth)
    per_rank = assumptions.micro_batch * layout.data
    if layout.pipeline > to_run:
        return f"{layout.pipeline} stages are more than the {to_run} layers that run"
    if assumptions.sequences % per_rank:
        return (
            f"{assumptions.sequences} sequences per step are not a multiple of micro batch {assumptions.micro_batch} "
            f"x data-parallel size {layout.data}"
        )
    sizes = {"heads": model.num_attention_heads, "query groups": model.num_query_groups}
    for name, size in {**sizes, "MLP width": model.ffn_hidden_size}.items():
        if size % layout.tensor:
            return f"{size} {name} are not a multiple of the tensor-parallel size {layout.tensor}"
    return ""


def estimate(
    model: Architecture, exits: Sequence[ExitConfig], layout: Layout, assumptions: Assumptions = Assumptions()
) -> Estimate:
    """Time and memory of a run with a frozen backbone, cut at its deepest exit.

    Raises:
        ValueError: the layout does not go with the model or the batch.
    """
    problem = layout_problem(model, exits, layout, assumptions)
    if problem:
        raise ValueError(f"TP {layout.tensor} x PP {layout.pipeline} x DP {layout.data}: {problem}")
    shape = shape_of(model, layout, assumptions)
    to_run = layers_that_run(exits, num_layers=model.num_layers, full_depth=assumptions.full_depth)
    skip = skips_last_mlp(exits, layers_to_run=to_run, full_depth=assumptions.full_depth)
    costs = StageCosts.of(shape, exits, count_flops)
    layer_costs = costs.per_layer(exits, layers_to_run=to_run, skip_last_mlp=skip, final_exit=assumptions.full_depth)
    counts = _cut(tuple(round(cost, 9) for cost in layer_costs), layout.pipeline)
    placements = place_exits(
        exits, num_layers=model.num_layers, num_stages=layout.pipeline, full_depth=assumptions.full_depth,
        layers_per_stage=counts,
    )  # fmt: skip
    even = balanced_cut([1.0] * to_run, layout.pipeline)
    stages = tuple(_stage(shape, placement, layout, assumptions) for placement in placements)
    steps = [sum(stage.seconds.values()) for stage in stages]
    microbatches = assumptions.sequences // (assumptions.micro_batch * layout.data)
    filling = sum(stage.seconds["layers"] + stage.seconds["exits"] for stage in stages[:-1]) / microbatches
    hours = (assumptions.steps * max(steps) + filling) / 3600
    peak = max(sum(stage.memory.values()) for stage in stages) / 1e9
    tokens = assumptions.steps * assumptions.sequences * assumptions.sequence_length
    return Estimate(
        layout,
        stages,
        hours=hours,
        gpu_hours=hours * layout.gpus,
        tokens_per_second=tokens / (hours * 3600),
        peak_gb=peak,
        fits=peak <= assumptions.memory_gb,
        slowest_share=_slowest_share(layer_costs, counts),
        even_slowest_share=_slowest_share(layer_costs, even),
    )


@cache
def _cut(layer_costs: tuple[float, ...], num_parts: int) -> tuple[int, ...]:
    return balanced_cut(layer_costs, num_parts)


def _slowest_share(layer_costs: Sequence[float], counts: Sequence[int]) -> float:
    start, slowest = 0, 0.0
    for count in counts:
        slowest = max(slowest, sum(layer_costs[start : start + count]))
        start += count
    return slowest / sum(layer_costs)


def _ring(num_bytes: float, ranks: int, gb_s: float) -> float:
    """Seconds of an all-reduce."""
    return 2 * (ranks - 1) / ranks * num_bytes / (gb_s * 1e9)


def all_reduces(exit: ExitConfig) -> int:
    """All-reduces of a hidden state over the tensor-parallel ranks in one exit's forward and backward.

    A block reduces its output forward and its input's gradient backward; the output projection reduces its input's
    gradient, unless nobody in front of it trains.
    """
    blocks = {"mlp": 1, "layer": 2}.get(exit.architecture, 0)
    frozen_front = exit.architecture == "embedding" or (exit.architecture == "norm" and exit.init == "lora")
    return 2 * blocks + (0 if frozen_front else 1)


def _stage(shape: ModelShape, stage: StagePlacement, layout: Layout, assumptions: Assumptions) -> StageEstimate:
    seconds = _stage_seconds(shape, stage, layout, assumptions)
    memory = _stage_memory(shape, stage, layout, assumptions)
    return StageEstimate(stage.num_layers, tuple(exit.name for exit in stage.exits), seconds, memory)


def _stage_seconds(
    shape: ModelShape, stage: StagePlacement, layout: Layout, assumptions: Assumptions
) -> dict[str, float]:
    """Seconds of one step by part."""
    rate = assumptions.peak_tflops * 1e12 * assumptions.utilisation
    hidden = shape.tokens * shape.model.hidden_size * assumptions.bytes_activation
    reduce_hidden = _ring(hidden, layout.tensor, assumptions.tensor_link_gb_s)
    skipped = int(stage.skip_last_mlp)
    layers = (stage.num_layers - skipped) * sum(map(count_flops, layer_operations(shape)))
    layers += skipped * sum(map(count_flops, layer_operations(shape, mlp=False)))
    exits = sum(count_flops(operation) for exit in stage.exits for operation in exit_operations(shape, exit))
    layer_seconds = layers / rate + (2 * stage.num_layers - skipped) * reduce_hidden
    exit_seconds = exits / rate + sum(map(all_reduces, stage.exits)) * reduce_hidden
    # Sends and receives run beside the products; they show only where they take longer.
    transfer = hidden / (assumptions.data_link_gb_s * 1e9) if layout.pipeline > 1 else 0.0
    microbatches = assumptions.sequences // (assumptions.micro_batch * layout.data)
    trained = sum(exit_parameters(shape, exit)[0] for exit in stage.exits) / layout.tensor
    sharded = layout.data if assumptions.distributed_optimizer else 1
    return {
        "layers": microbatches * layer_seconds,
        "exits": microbatches * exit_seconds,
        "transfer": microbatches * max(0.0, transfer - layer_seconds - exit_seconds),
        "gradients": _ring(trained * assumptions.bytes_gradient, layout.data, assumptions.data_link_gb_s),
        "optimizer": trained / sharded * _OPTIMIZER_TRAFFIC / (assumptions.memory_bandwidth_gb_s * 1e9),
    }


def _stage_memory(
    shape: ModelShape, stage: StagePlacement, layout: Layout, assumptions: Assumptions
) -> dict[str, float]:
    """Bytes of one GPU by part."""
    mlp, attention = shape.model.mlp_size, shape.model.attention_size
    backbone = stage.num_layers * (attention + mlp) - (mlp if stage.skip_last_mlp else 0)
    backbone += shape.model.vocab_size * shape.model.hidden_size if stage.stage == 0 else 0
    if assumptions.full_depth and not shape.model.tied:  # every stage whose exits have a teacher projects with it
        backbone += shape.model.vocab_size * shape.model.hidden_size
    counts = [exit_parameters(shape, exit) for exit in stage.exits]
    sharded = layout.data if assumptions.distributed_optimizer else 1
    state = assumptions.bytes_weight + assumptions.bytes_gradient + assumptions.bytes_optimizer / sharded
    hidden = shape.tokens * shape.model.hidden_size * assumptions.bytes_activation
    copies = not assumptions.transformer_engine and assumptions.bytes_activation < 4
    logits = min(shape.chunk_bytes, 4 * shape.tokens * shape.model.vocab_size // layout.tensor)
    return {
        "backbone": backbone * assumptions.bytes_backbone / layout.tensor,
        "exits": sum(trained * state + frozen * assumptions.bytes_backbone for trained, frozen in counts)
        / layout.tensor,
        "loss chunk": 1.5 * logits if stage.exits else 0.0,  # fp32 logits, and their gradient in bf16
        "taps": len({exit.stop for exit in stage.exits}) * hidden,
        "activations": _activations(shape, stage, layout) * assumptions.bytes_activation
        + (2 * 4 * shape.tokens * shape.model.hidden_size if copies else 0),
        # Two hidden states on the way in and two on the way out.
        "transfers": 4 * hidden if layout.pipeline > 1 else 0.0,
        "fixed": assumptions.fixed_gb * 1e9,
    }


def _activations(shape: ModelShape, stage: StagePlacement, layout: Layout) -> float:
    """Numbers alive in a layer's forward, or in the forward and backward of the largest exit."""
    model = shape.model
    inner = (model.fc1_rows + model.ffn_hidden_size) / layout.tensor
    around_attention = (model.qkv_rows + model.proj_columns) / layout.tensor
    kinds = {"embedding": 2 * model.hidden_size, "norm": 4 * model.hidden_size}
    kinds["mlp"] = kinds["norm"] + 2 * model.hidden_size + 2 * inner  # values kept, and their gradients
    kinds["layer"] = kinds["mlp"] + 4 * model.hidden_size + 2 * around_attention
    forward = 3 * model.hidden_size + max(inner, around_attention)
    return shape.tokens * max([forward, *(kinds[exit.architecture] for exit in stage.exits)])


def fastest_layout(
    model: Architecture,
    exits: Sequence[ExitConfig],
    gpus: int,
    assumptions: Assumptions = Assumptions(),
    tensor_sizes: Sequence[int] = (1, 2, 4, 8),
) -> Estimate | None:
    """The fastest layout of `gpus` GPUs that fits their memory; None if none does.

    Tensor parallelism stays inside a node of eight.
    """
    found: Estimate | None = None
    for tensor in tensor_sizes:
        for pipeline in range(1, gpus // tensor + 1):
            if gpus % (tensor * pipeline):
                continue
            layout = Layout(tensor, pipeline, gpus // (tensor * pipeline))
            if layout_problem(model, exits, layout, assumptions):
                continue
            result = estimate(model, exits, layout, assumptions)
            if result.fits and (found is None or result.hours < found.hours):
                found = result
    return found


def nearest_layout(
    model: Architecture, exits: Sequence[ExitConfig], layout: Layout, assumptions: Assumptions
) -> Layout | None:
    """The layout nearest to another one that goes with the model and the batch: the fewest doublings away."""
    return _nearest(layout, lambda other: not layout_problem(model, exits, other, assumptions))


def smallest_change_that_fits(
    model: Architecture, exits: Sequence[ExitConfig], layout: Layout, assumptions: Assumptions
) -> Layout | None:
    """Another layout, the nearest whose estimated memory is there, on at least as many GPUs."""

    def fits(other: Layout) -> bool:
        problem = other == layout or other.gpus < layout.gpus or layout_problem(model, exits, other, assumptions)
        return not problem and estimate(model, exits, other, assumptions).fits

    return _nearest(layout, fits)


def _nearest(layout: Layout, good: Callable[[Layout], bool]) -> Layout | None:
    sizes = [1 << power for power in range(11)]
    others = {
        Layout(tensor, pipeline, data)
        for tensor in {*sizes[:4], layout.tensor}
        for pipeline in {*sizes[:7], layout.pipeline}
        for data in {*sizes, layout.data}
    }

    def distance(other: Layout) -> float:
        pairs = zip(dataclasses.astuple(layout), dataclasses.astuple(other), strict=True)
        return sum(abs(math.log2(one / another)) for one, another in pairs)

    return next((other for other in sorted(others, key=lambda one: (distance(one), one.gpus)) if good(other)), None)
