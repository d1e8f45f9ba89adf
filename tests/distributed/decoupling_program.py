# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tune under a pipeline inside the real Lightning loop and write down every call that reaches a process group.

    python -m tests.distributed.decoupling_program <folder> <tp,pp,dp> [<tp,pp,dp> ...]

Per layout one fork of the ranks, four runs each: `sparse` logs every 4 steps, validates and saves at step 6 and ends
at `max_steps`; `every` logs at every step (the control); `early` is stopped by Lightning's EarlyStopping; in `taught`
every exit learns from the final one, whose distributions come back from the last stage. Rank r writes
`<layout>.rank<r>.json`. `<folder>/start.nemo` and the data are those of the layout tests.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

LOG_EVERY, VALIDATE_EVERY, STEPS = 4, 6, 10
# After this step (from 0) the last stage waits until the first one has begun the second next. The sends of one step
# may be outstanding (the bound of `hidden_state_transport`), so the first stage owes nothing to the last one by then.
WAIT_AT = 0


class Calls:
    """Every collective and transfer that this process starts: [step, operation, ranks of the group].

    Torch's own class is wrapped, below every function of `torch.distributed`, however a caller imported it.
    """

    _TALK = (
        "_allgather_base _reduce_scatter_base all_gather_single all_gather_single_coalesced all_to_all_single "
        "allgather allgather_coalesced allgather_into_tensor_coalesced allreduce allreduce_coalesced alltoall "
        "alltoall_base barrier broadcast gather monitored_barrier recv recv_anysource reduce reduce_scatter "
        "reduce_scatter_single reduce_scatter_single_coalesced reduce_scatter_tensor_coalesced scatter send"
    ).split()

    def __init__(self) -> None:
        self.step = -1  # before the first one
        self.seen: list[list] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Wrap the methods for as long as the block runs."""
        from torch.distributed import ProcessGroup, get_process_group_ranks

        kept = {name: getattr(ProcessGroup, name) for name in self._TALK if hasattr(ProcessGroup, name)}

        def recording(name, original):
            def call(group, *args, **kwargs):
                self.seen.append([self.step, name, get_process_group_ranks(group)])
                return original(group, *args, **kwargs)

            return call

        for name, original in kept.items():
            setattr(ProcessGroup, name, recording(name, original))
        try:
            yield
        finally:
            for name, original in kept.items():
                setattr(ProcessGroup, name, original)


TAUGHT = {"exits": [], "every": None, "objective": "distillation", "distillation": {"top_k": 4}}


def fit(
    folder: Path,
    name: str,
    layout: tuple[int, int, int],
    *,
    manager: dict | None = None,
    model: dict | None = None,
    **trainer,
) -> dict:
    """One run of one rank; returns its calls, where it ended and what it measured."""
    from lightning.pytorch.callbacks import Callback
    from megatron.core import parallel_state
    from nemo.utils.exp_manager import exp_manager
    from omegaconf import OmegaConf

    from tests.distributed.layout_program import model_config, restore, trainer_for

    calls, flag, ahead = Calls(), folder / f"{name}.two-ahead", []
    stops = name.startswith("early")

    class Steps(Callback):
        """Tells the calls which step they belong to; the last stage waits once for the first one."""

        def on_train_batch_start(self, trainer, module, batch, index) -> None:
            calls.step = trainer.global_step
            if trainer.global_step == WAIT_AT + 2 and parallel_state.is_pipeline_first_stage():
                flag.touch()

        def on_train_batch_end(self, trainer, *args) -> None:
            if trainer.global_step == WAIT_AT + 1 and parallel_state.is_pipeline_last_stage() and not stops:
                deadline = time.monotonic() + (30 if name.startswith("sparse") else 1)
                while not flag.exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                ahead.append(flag.exists())

        def on_validation_start(self, trainer, *args) -> None:
            calls.seen.append([calls.step, "validation", []])

    tp, pp, dp = layout
    config = {**model_config(folder, tp, pp, False), "global_batch_size": 2 * dp, **(model or {})}  # two microbatches
    trainer = {"max_steps": STEPS, **trainer}
    lightning, recorder = trainer_for(tp * pp * dp, callbacks=[Steps()], settings=trainer, **config)
    if manager is not None:
        common = {"explicit_log_dir": str(folder / name), "use_datetime_version": False, "log_step_timing": False,
                  "create_preemption_callback": False}  # fmt: skip
        exp_manager(lightning, OmegaConf.create({**common, **manager}))
    model = restore(folder / "start.nemo", lightning, config)
    with calls.recorded():
        lightning.fit(model)
    saved = [path.name for path in (folder / name / "checkpoints").glob("*") if path.is_dir()]
    return {"calls": calls.seen, "ended_at": lightning.global_step, "ahead": ahead, "saved": sorted(saved),
            "validation": recorder.validation}  # fmt: skip


def run(folder: Path, layout: tuple[int, int, int], rank: int) -> None:
    """The four runs of one rank under one layout."""
    import torch

    torch.set_num_threads(1)
    name = "".join(map(str, layout))
    checkpoints = {
        "monitor": "val_loss", "mode": "min", "save_top_k": 1, "save_last": True, "model_parallel_size": layout[1],
        "filename": "exits--{val_loss:.4f}-{step}-{consumed_samples}",
    }  # fmt: skip
    saving = {"create_checkpoint_callback": True, "checkpoint_callback_params": checkpoints}
    # An improvement of 100 nats never comes: the second validation in a row without one ends the run.
    stopping = {
        "create_early_stopping_callback": True, "create_checkpoint_callback": False,
        "early_stopping_callback_params": {"monitor": "val_loss", "mode": "min", "min_delta": 100.0, "patience": 2},
    }  # fmt: skip
    result = {
        "sparse": fit(folder, f"sparse-{name}", layout, manager=saving, log_every_n_steps=LOG_EVERY,
                      val_check_interval=VALIDATE_EVERY, enable_progress_bar=True),
        "every": fit(folder, f"every-{name}", layout, log_every_n_steps=1, val_check_interval=STEPS, max_steps=8),
        "taught": fit(folder, f"taught-{name}", layout, model={"early_exit": TAUGHT}, log_every_n_steps=LOG_EVERY,
                      val_check_interval=STEPS, max_steps=8),
        "early": fit(folder, f"early-{name}", layout, manager=stopping, log_every_n_steps=50, val_check_interval=2,
                     max_steps=20),
    }  # fmt: skip
    (folder / f"{name}.rank{rank}.json").write_text(json.dumps(result))


def main(folder: Path, layouts: list[tuple[int, int, int]]) -> None:
    """Fork the ranks of one layout after the other."""
    from nemo_ee import cpu_host

    cpu_host.enable()
    import nemo_ee.models.megatron_early_exit_gpt_model  # noqa: F401 -- imported once, before the forks
    from tests.helpers.ranks import run_ranks

    for layout in layouts:
        name = "".join(map(str, layout))
        run_ranks(
            lambda rank, layout=layout: run(folder, layout, rank),
            layout[0] * layout[1] * layout[2],
            timeout=240,
            log=str(folder / name),
        )
        print(f"layout {name} done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [tuple(map(int, text.split(","))) for text in sys.argv[2:]])
