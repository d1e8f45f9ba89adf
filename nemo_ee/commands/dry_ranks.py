# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A step of exit tuning on any rank of any layout, without its hardware: the real code on fake ranks and tensors.

    stage by stage:  Megatron's groups on torch's `fake` backend -> the stage, fake weights -> a step, watched

Every stage is one rank's: the first one's of tensor and data parallelism. Ranks of one stage do the same work; on the
last tensor-parallel ranks the vocabulary may have fewer true rows, of the same number of padded ones.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_ee import cpu_host
from nemo_ee.checkpoint.megatron_model import stage_of
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.placement import StagePlacement
from nemo_ee.families.architecture import Architecture
from nemo_ee.megatron.model.microbatch import MicroBatch
from nemo_ee.megatron.pipeline.exit_tuner import ExitTuner
from nemo_ee.planning.operation_trace import Compute, OperationTrace, Transfer
from nemo_ee.planning.tuning_estimate import Layout

_STEPS_BEFORE = 1  # makes the optimizer's state
_OPTIM = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.01}


@dataclasses.dataclass(frozen=True)
class Run:
    """A tuning run whose ranks are looked at.

    Attributes:
        model: the backbone.
        early_exit: its exits.
        placements: layers and exits of every stage.
        layout: its sizes.
        micro_batch, sequence_length: sequences and tokens of a microbatch.
        half: bf16 weights with fp32 main weights; otherwise fp32.
        optimizer: `model.optim.name`.
        sequence_parallel: `model.sequence_parallel`.
        chunk_bytes: see `StageContext`.
    """

    model: Architecture
    early_exit: EarlyExitConfig
    placements: tuple[StagePlacement, ...]
    layout: Layout
    micro_batch: int = 1
    sequence_length: int = 2048
    half: bool = True
    optimizer: str = "adamw"
    sequence_parallel: bool = False
    chunk_bytes: int | None = None

    @property
    def full_depth(self) -> bool:
        """Whether the layers past the deepest exit are built."""
        return self.early_exit.needs_final_exit


@dataclasses.dataclass(frozen=True)
class RankCounts:
    """A step on one rank.

    Attributes:
        stage: its pipeline stage, from 0.
        layers: its layers.
        exits: names of its exits.
        parameters: elements of its weights by kind.
        peak_bytes: bytes at the peak by kind.
        microbatch: events of one microbatch.
        update: events of the rest of the step.
    """

    stage: int
    layers: int
    exits: tuple[str, ...]
    parameters: Mapping[str, int]
    peak_bytes: Mapping[str, int]
    microbatch: tuple[Compute | Transfer, ...]
    update: tuple[Compute | Transfer, ...]

    @property
    def flops(self) -> float:
        """Floating-point operations of a microbatch."""
        return sum(event.flops for event in self.microbatch if isinstance(event, Compute))

    @property
    def transfers(self) -> Counter[Transfer]:
        """Of a step with one microbatch."""
        return Counter(event for event in (*self.microbatch, *self.update) if isinstance(event, Transfer))


def dry_run(run: Run) -> Iterator[RankCounts]:
    """The counts of the first rank of every stage, one after the other. Leaves no process groups behind.

    Raises:
        RuntimeError: this process is a rank of a real run.
    """
    if torch.distributed.is_initialized():
        raise RuntimeError("a dry run makes process groups of its own; run it in a process that has none")
    cpu_host.enable()
    layout = run.layout
    for stage in range(layout.pipeline):
        rank = stage * layout.gpus // layout.pipeline
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.gpus)
        try:
            parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline, create_gloo_process_groups=False)
            # A tracker whose forks do nothing: states of random generators are no fake tensors.
            tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            with FakeTensorMode(allow_non_fake_inputs=True), OperationTrace(dry=True) as trace:
                counts = watched_step(run, trace)
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
        yield counts


def watched_step(run: Run, trace: OperationTrace) -> RankCounts:
    """Build this rank's stage inside a trace, with random weights, and watch a step on it. Every rank must call it."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    half = {"params_dtype": torch.bfloat16, "bf16": True} if run.half else {}
    model = stage_of(
        run.model, run.early_exit, run.placements, full_depth=run.full_depth, use_cpu_initialization=True,
        perform_initialization=False, sequence_parallel=run.sequence_parallel, **half,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    optim = {**_OPTIM, "name": run.optimizer}
    more = {"num_steps": 100, "max_norm": 1.0, "chunk_bytes": run.chunk_bytes}
    tuner = ExitTuner(model, run.early_exit, run.placements, optim=optim, **more)
    shape = (run.micro_batch, run.sequence_length)
    tokens = torch.zeros(shape, dtype=torch.long)
    batch = MicroBatch(tokens, tokens, torch.ones(shape), torch.arange(run.sequence_length).expand(shape))
    for _ in range(_STEPS_BEFORE):
        tuner.tune([batch], log=False)
        tuner.context.drain()
    trace.reset()
    tuner.tune([batch, batch], log=False)  # two microbatches: what is on its way to the next stage counts too
    tuner.context.drain()
    peak = trace.bytes_at_peak(_kinds(tuner))
    trace.reset()
    tuner.tune([batch], log=False)
    tuner.context.drain()
    split = _end_of_microbatch(trace.events)
    own = {"backbone": [value for _, value in model.backbone_named_parameters()], "exits": model.exits.parameters()}
    placement = run.placements[stage]
    return RankCounts(
        stage,
        placement.num_layers,
        tuple(exit.name for exit in placement.exits),
        {kind: sum(value.numel() for value in values) for kind, values in own.items()},
        peak,
        tuple(trace.events[:split]),
        tuple(trace.events[split:]),
    )


def _kinds(tuner: ExitTuner) -> dict[str, list[Tensor]]:
    """Kind -> tensors that live from step to step."""
    model = tuner.context.model
    trained = [value for value in model.exits.parameters() if value.requires_grad]
    gradients = [
        own for value in trained for own in (value.grad, getattr(value, "main_grad", None)) if own is not None
    ]
    stepped = [
        value for exit in tuner.optimizers.exits for group in exit.optimizer.param_groups for value in group["params"]
    ]
    gradients += [value.grad for value in stepped if value.grad is not None]
    state = [
        tensor
        for exit in tuner.optimizers.exits
        for values in exit.optimizer.state.values()
        for tensor in values.values()
        if isinstance(tensor, Tensor)
    ]
    return {
        "backbone": [value for _, value in model.backbone_named_parameters()],
        "exits": list(model.exits.parameters()),
        "gradients": gradients,
        "optimizer": [*stepped, *state],
    }


def _end_of_microbatch(events: Sequence[Compute | Transfer]) -> int:
    """Products and sends end with the microbatch; what follows belongs to the step."""
    last = [index for index, event in enumerate(events) if isinstance(event, Compute) or event.kind == "send"]
    return last[-1] + 1 if last else len(events)


def as_mapping(counts: RankCounts) -> dict[str, Any]:
    """Plain containers, for JSON; transfers are those of a step with one microbatch."""
    return {
        "stage": counts.stage,
        "layers": counts.layers,
        "exits": list(counts.exits),
        "parameters": dict(counts.parameters),
        "peak_bytes": dict(counts.peak_bytes),
        "flops": counts.flops,
        "transfers": [
            {**dataclasses.asdict(transfer), "count": count} for transfer, count in counts.transfers.items()
        ],
    }
