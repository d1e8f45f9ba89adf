# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Continue one run under other layouts, with settings of its own for every exit; write all it logs and holds as JSON.

    python -m tests.distributed.reshard_program <folder>

`moved` makes two steps on two pipeline stages, two on one, two on two again, each from the last one's checkpoint;
`whole` makes the six steps on one stage; `deep` has exits on its last stage only. `<folder>/start.nemo` and the data
are those of the layout tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

STEPS = 6
LEGS = {"moved": [(2, 2), (1, 4), (2, 6)], "whole": [(1, 6)], "deep": [(2, 3)]}  # run -> (stages, stops after step)
EXITS = [
    {"name": "layer1-mlp", "lr": 3.0e-3, "min_lr": 1.0e-3, "weight_decay": 0.2},
    {"name": "layer2-norm", "loss_weight": 0.25},
    {"name": "layer2-layer", "lr": 5.0e-4, "min_lr": 0.0, "loss_weight": 2.0, "loss_weight_schedule": "cosine"},
    {"name": "nothing", "layer": 2, "architecture": "embedding", "output": "shared", "loss_weight": 0.5},
    {"name": "layer3-mlp", "lr": 1.0e-2, "weight_decay": 0.0},
    {"name": "layer4-mlp", "loss_weight_schedule": "linear"},
    {"name": "lora-layer", "min_lr": 5.0e-4},
    {"name": "dice", "layer": 4, "architecture": "norm", "init": "random", "seed": 11, "lr": 2.0e-3},
]


def held(model) -> dict:
    """Exit -> learning rate, weight decays, steps and digests of weights and moments, from every stage."""
    import torch

    optimizers = model._optimizer
    optimizers.sharded_state_dict(model.sharded_state_dict())  # makes the optimizers allocate what they have not yet
    ours = {}
    for exit in optimizers.exits:
        groups, states = exit.optimizer.param_groups, exit.optimizer.state
        tensors = {f"{key} weight": parameter for key, parameter in exit.parameters.items()}
        for key, parameter in exit.parameters.items():
            tensors |= {f"{key} {name}": v for name, v in states[parameter].items() if name != "step"}
        ours[exit.name] = {
            "lr": [group["lr"] for group in groups],
            "weight_decay": [group["weight_decay"] for group in groups],
            "step": sorted({float(states[parameter]["step"]) for parameter in exit.parameters.values()}),
            "digests": {
                key: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
                for key, tensor in tensors.items()
            },
        }
    everything: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everything, ours)
    return {name: values for rank in everything for name, values in rank.items()}


def leg(folder: Path, name: str, index: int, rank: int) -> None:
    """One start of a run, on one rank."""
    import torch
    from lightning.pytorch.callbacks import Callback
    from nemo.utils.exp_manager import exp_manager
    from omegaconf import OmegaConf

    from tests.distributed.layout_program import model_config, restore, trainer_for

    torch.set_num_threads(1)
    stages, until = LEGS[name][index]
    record: dict = {"steps": {}}

    class Record(Callback):
        """What is held at the start and the end, and every step's numbers; ends the leg early."""

        def on_train_start(self, trainer, module) -> None:
            record["start"] = held(module)

        def on_train_batch_end(self, trainer, *args) -> None:
            metrics = trainer.callback_metrics.items()
            record["steps"][trainer.global_step] = {
                k: float(v) for k, v in metrics if k.startswith("exit/") or k == "lr"
            }
            if trainer.global_step == until:
                trainer.should_stop = True

        def on_train_end(self, trainer, module) -> None:
            record["end"] = held(module)

    exits = EXITS if name != "deep" else [exit for exit in EXITS if exit["name"] in ("layer4-mlp", "dice")]
    config = model_config(folder, 1, stages, False, early_exit={"exits": exits, "every": None})
    config["optim"]["sched"]["max_steps"] = STEPS
    settings = {"val_check_interval": 2, "limit_val_batches": 1}
    trainer, _ = trainer_for(stages, max_steps=STEPS, callbacks=[Record()], settings=settings, **config)
    manager = {
        "explicit_log_dir": str(folder / name), "use_datetime_version": False, "log_step_timing": False,
        "resume_if_exists": True, "resume_ignore_no_checkpoint": True, "create_preemption_callback": False,
        "create_checkpoint_callback": True, "create_tensorboard_logger": True,
        "checkpoint_callback_params": {
            "monitor": "val_loss", "mode": "min", "save_top_k": 1, "save_last": True, "model_parallel_size": stages,
            "filename": "exits--{val_loss:.4f}-{step}-{consumed_samples}",
        },
    }  # fmt: skip
    exp_manager(trainer, OmegaConf.create(manager))
    trainer.fit(restore(folder / "start.nemo", trainer, config))
    if rank == 0:
        (folder / f"{name}-{index}.json").write_text(json.dumps(record))


def main(folder: Path) -> None:
    """One leg after the other."""
    from nemo_ee import cpu_host

    cpu_host.enable()
    import nemo_ee.models.megatron_early_exit_gpt_model  # noqa: F401 -- imported once, before the forks
    from tests.helpers.ranks import run_ranks

    for name, legs in LEGS.items():
        for index, (stages, _) in enumerate(legs):
            run_ranks(
                lambda rank, name=name, index=index: leg(folder, name, index, rank),
                stages,
                timeout=120,
                log=str(folder / f"{name}-{index}"),
            )
            print(f"{name}: leg {index} over", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
