# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Kill a run with SIGKILL and resume it; write the losses of every step as JSON.

    python -m tests.distributed.resume_program <folder> <tp,pp,dp>

Three runs from the same start: one undisturbed; one killed between two steps; one killed while it writes a checkpoint.
The last two are started again and run to the end. `<folder>/start.nemo` and the data are those of the layout tests.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

STEPS, KILL_AFTER = 6, 5


def run(folder: Path, name: str, layout: tuple[int, int, int], rank: int, kill: str | None) -> None:
    """One start of one run on one rank."""
    import torch
    from lightning.pytorch.callbacks import Callback
    from omegaconf import OmegaConf

    from nemo_ee.models.training_checkpoints import manage_experiment
    from tests.distributed.layout_program import model_config, restore, trainer_for

    torch.set_num_threads(1)
    tp, pp, dp = layout

    class Kill(Callback):
        """SIGKILL of rank 0 between two steps, once it has written the step; `run_ranks` then kills the others."""

        def on_train_batch_end(self, trainer, *args) -> None:
            if kill == "step" and rank == 0 and trainer.global_step == KILL_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)

    class Written(Callback):
        """Appends each step's losses to a file, so that a killed run leaves what it did."""

        def on_train_batch_end(self, trainer, *args) -> None:
            losses = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("exit/")}
            if rank == 0:
                with open(folder / f"{name}.jsonl", "a") as file:
                    file.write(json.dumps({"step": trainer.global_step, "losses": losses}) + "\n")

    config = model_config(folder, tp, pp, False)
    trainer, _ = trainer_for(tp * pp * dp, max_steps=STEPS, callbacks=[Written(), Kill()], **config)
    trainer.val_check_interval = 2
    manager = OmegaConf.create(
        {
            "explicit_log_dir": str(folder / name),
            "use_datetime_version": False,
            "create_tensorboard_logger": True,
            "resume_if_exists": True,
            "resume_ignore_no_checkpoint": True,
            "create_preemption_callback": False,
            "log_step_timing": False,
            "create_checkpoint_callback": True,
            "checkpoint_callback_params": {
                "monitor": "val_loss",
                "mode": "min",
                "save_top_k": 1,
                "save_last": True,
                "filename": "exits--{val_loss:.4f}-{step}-{consumed_samples}",
                "model_parallel_size": tp * pp,
            },
        }
    )
    manage_experiment(trainer, manager)
    if kill == "save":
        _kill_inside_save(trainer)
    trainer.fit(restore(folder / "start.nemo", trainer, config))


def _kill_inside_save(trainer) -> None:
    """SIGKILL when the weights of step 4's checkpoint are on disk, but not its metadata."""
    from megatron.core.dist_checkpointing.strategies import torch as strategy

    original = strategy.TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks

    def die(self, *args, **kwargs):
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    strategy.TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks = die


def main(folder: Path, layout: tuple[int, int, int]) -> None:
    """All starts, forked one after the other."""
    from nemo_ee import cpu_host

    cpu_host.enable()
    import nemo_ee.models.megatron_early_exit_gpt_model  # noqa: F401 -- imported once, before the forks
    from tests.helpers.ranks import run_ranks

    size = layout[0] * layout[1] * layout[2]
    for name, kill in (("whole", None), ("step", "step"), ("save", "save")):
        for attempt, killed in enumerate([kill] if kill is None else [kill, None]):
            try:
                run_ranks(
                    lambda rank, name=name, killed=killed: run(folder, name, layout, rank, killed),
                    size,
                    timeout=180,
                    log=str(folder / f"{name}-{attempt}"),
                )
                assert killed is None, "the run was to be killed and was not"
            except RuntimeError:
                if killed is None:
                    raise
            print(f"{name}: start {attempt} over", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(map(int, sys.argv[2].split(","))))
