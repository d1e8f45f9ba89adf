# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Five training steps of a tiny model on Megatron-core alone, under several layouts and ways to train.

    python -m tests.stack.megatron.tuning_program <Hugging Face directory> <output folder>

Each layout forks its gloo ranks, which run every way one after the other. `<layout>.json` has the losses of each step
by way and exit. The layout `pp2` also writes its checkpoints after the last step, see `write_checkpoints`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

STEPS, LENGTH, MICROBATCHES = 5, 16, 4
# name -> tensor-, pipeline- and data-parallel size, sequence parallel
LAYOUTS = {
    "one": (1, 1, 1, False),
    "tp2": (2, 1, 1, False),
    "tp2-sp": (2, 1, 1, True),
    "pp2": (1, 2, 1, False),
    "dp2": (1, 1, 2, False),
}
# name -> (`model.optim.name`, learning rate, further keys of the `early_exit` block)
TAUGHT = {"distillation": {"temperature": 1.5, "weight": 0.4}}
WAYS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "adamw": ("adamw", 1e-2, TAUGHT),
    "distributed": ("mcore_distributed_optim", 1e-2, TAUGHT),
    "joint": ("adamw", 2e-3, {"train": "joint"}),
    "lora": ("adamw", 5e-3, {"train": "lora", "lora": {"rank": 2}}),
}
EXITS = [
    {"name": "mlp1", "layer": 1, "architecture": "mlp"},
    {"name": "norm2", "layer": 2, "architecture": "norm", "output": "shared"},
    {"name": "layer2", "layer": 2, "architecture": "layer", "init": "random"},
    {"name": "lora3", "layer": 3, "architecture": "mlp", "init": "lora", "output": "low_rank", "rank": 2},
]
# Where the backbone is frozen. Two exits learn side by side, in pieces of a few positions.
OBJECTIVES = {"mlp1": "mixed", "norm2": "distillation", "layer2": "distillation"}
CHUNK_BYTES = 4 * 4 * 144 * 6  # four buffers of the logits of six tokens
OPTIM = {"betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": 0.01, "sched": {"min_lr": 1e-4}}


class Training:
    """This rank's part of a run: model, optimizers, schedule and data.

    Args:
        folder: the Hugging Face directory of the backbone.
        way: a key of `WAYS`.
        sources: `source` and `stored_exits` of `core_model`.
    """

    def __init__(self, folder: Path, way: str, *, sequence_parallel: bool = False, **sources: Any) -> None:
        import torch

        from nemo_ee.megatron.loss.exit_metrics import ExitSums
        from nemo_ee.megatron.optim.learning_rate import ExitLearningRates, LearningRateSchedule
        from nemo_ee.megatron.optim.stage_optimizers import stage_optimizers
        from nemo_ee.megatron.pipeline.joint_training import JointTraining
        from nemo_ee.megatron.pipeline.teacher_channel import TeacherChannel
        from tests.helpers.core_models import core_model

        optimizer, rate, block = WAYS[way]
        frozen = "train" not in block
        exits = [{**exit, "objective": OBJECTIVES.get(exit["name"])} for exit in EXITS] if frozen else EXITS
        self.model = core_model(folder, exits, early_exit=block, sequence_parallel=sequence_parallel, **sources)
        optim = {**OPTIM, "name": optimizer, "lr": rate}
        self.optimizers = stage_optimizers(self.model.model, optim, max_norm=1.0, trains_backbone=not frozen)
        schedule = LearningRateSchedule("LinearAnnealing", warmup_steps=1, max_steps=STEPS)
        self.rates = ExitLearningRates(self.optimizers, schedule, optim)
        self.sums = ExitSums(self.model.early_exit.names, torch.device("cpu"))
        self.context, self.joint = self.model.context, None
        if frozen:
            teachers = TeacherChannel(
                self.model.model, self.model.early_exit, self.model.placements, autocast=None,
                timeout=timedelta(minutes=5),
            )  # fmt: skip
            self.context = replace(self.context, teachers=teachers, chunk_bytes=CHUNK_BYTES)
        else:
            self.joint = JointTraining(self.context, self.model.placements, seed=1)
        self.steps = 0

    def step(self) -> dict[str, float]:
        """One global batch. Returns the losses of all exits, and of the full model where it trains."""
        from nemo_ee.megatron.pipeline.tuning_step import tune_global_batch

        weights = {head.exit.name: 1.0 for head in self.model.model.exits}
        shared = {"optimizers": self.optimizers, "sums": self.sums, "loss_weights": weights}
        self.optimizers.zero_grad()
        batches = global_batch(self.model)
        if self.joint is None:
            tune_global_batch(self.context, batches, **shared)
        else:
            self.joint.train_global_batch(batches, step=self.steps, **shared)
        self.context.drain()
        self.optimizers.step()
        self.rates.step()
        self.steps += 1
        return {name: values["loss"] for name, values in self.sums.reduce(over_data=False).items()}

    def state(self) -> dict[str, Any]:
        """Sharded state of a training checkpoint."""
        from nemo_ee.megatron.model.backbone_training import trained_backbone_shards

        shards = self.model.sharded_state_dict()
        if self.joint is not None:
            shards |= trained_backbone_shards(self.model.model)
        return {"model": shards, "optimizer": self.optimizers.sharded_state_dict(shards)}


def global_batch(model: Any) -> list[Any]:
    """This data-parallel rank's microbatches, two sequences each, the same in every step."""
    from megatron.core import parallel_state

    from tests.helpers.core_models import microbatch, random_tokens

    tokens = random_tokens(model, batch=2 * MICROBATCHES, length=LENGTH, seed=100)
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    return [microbatch(tokens[2 * index : 2 * index + 2]) for index in range(rank, MICROBATCHES, size)]


def layout_program(rank: int, folder: Path, output: Path, name: str) -> None:
    """One rank of a layout."""
    import torch

    from tests.helpers.core_models import set_up_groups
    from tests.stack.megatron.checkpoint_files import write_checkpoints

    os.environ["RANK"] = str(rank)
    tensor, pipeline, data, sequence_parallel = LAYOUTS[name]
    set_up_groups(tensor=tensor, pipeline=pipeline, data=data)
    losses = {}
    for way in WAYS:
        run = Training(folder, way, sequence_parallel=sequence_parallel)
        losses[way] = [run.step() for _ in range(STEPS)]
        if name == "pp2":
            write_checkpoints(run, output / way)
    if rank == 0:
        (output / f"{name}.json").write_text(json.dumps(losses, indent=1))
    torch.distributed.barrier()


def main(folder: str, output: str) -> None:
    """Fork the ranks of every layout, one layout after the other."""
    import nemo_ee.checkpoint.megatron_model  # noqa: F401  (imported once, before the forks)
    import nemo_ee.megatron.optim.stage_optimizers  # noqa: F401
    import nemo_ee.megatron.pipeline.joint_training  # noqa: F401
    from tests.helpers import core_models  # noqa: F401  (switches the CPU host on)
    from tests.helpers.ranks import run_ranks
    from tests.stack.megatron import checkpoint_files  # noqa: F401

    Path(output).mkdir(parents=True, exist_ok=True)
    for name, (tensor, pipeline, data, _) in LAYOUTS.items():
        program = partial(layout_program, folder=Path(folder), output=Path(output), name=name)
        run_ranks(program, tensor * pipeline * data, timeout=300, log=str(Path(output, name)))


if __name__ == "__main__":
    main(*sys.argv[1:])
