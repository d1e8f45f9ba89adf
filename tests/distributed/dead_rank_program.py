# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Lose a rank in the middle of a step and write what the other one says.

    python -m tests.distributed.dead_rank_program <folder>

Two stages, three times: the first one is killed, the last one is killed, the first one hangs for longer than the
distributed time-out. The survivor writes `<case>.json`. `<folder>/start.nemo` and the data are those of the layout
tests.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

CASES = {"first": (0, "dies"), "last": (1, "dies"), "hangs": (0, "hangs")}  # case -> rank, what happens to it
TIMEOUT_MINUTES = {"dies": 2, "hangs": 0.25}


def run(folder: Path, case: str, rank: int) -> None:
    """One rank of one case."""
    import torch

    from tests.distributed.layout_program import model_config, restore, trainer_for

    torch.set_num_threads(1)
    victim, fate = CASES[case]
    report = folder / f"{case}.json"
    config = {**model_config(folder, 1, 2, False), "distributed_timeout_minutes": TIMEOUT_MINUTES[fate]}
    trainer, _ = trainer_for(2, max_steps=50, settings={"log_every_n_steps": 50}, **config)
    model = restore(folder / "start.nemo", trainer, config)
    microbatches = 0

    def in_a_layer(*args) -> None:
        nonlocal microbatches
        microbatches += 1
        if microbatches < 7:  # the third of four of the second step
            return
        if fate == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        while not report.exists():
            time.sleep(0.1)
        os._exit(0)

    if rank == victim:
        model.model.decoder.layers[0].input_layernorm.register_forward_pre_hook(in_a_layer)
    try:
        trainer.fit(model)
    except RuntimeError as error:
        saying = {"error": str(error), "cause": type(error.__cause__).__name__, "step": trainer.global_step}
        partial = report.with_suffix(".partial")
        partial.write_text(json.dumps(saying))
        partial.rename(report)


def main(folder: Path) -> None:
    """One case after the other."""
    from nemo_ee import cpu_host

    cpu_host.enable()
    import nemo_ee.models.megatron_early_exit_gpt_model  # noqa: F401 -- imported once, before the forks
    from tests.helpers.ranks import run_ranks

    for case, (_, fate) in CASES.items():
        try:
            run_ranks(
                lambda rank, case=case: run(folder, case, rank),
                2,
                timeout=100,
                log=str(folder / case),
                wait_for_all=True,
            )
            assert fate == "hangs", "a rank was to be killed and was not"
        except RuntimeError:
            if fate == "hangs":
                raise
        print(f"{case}: over", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
