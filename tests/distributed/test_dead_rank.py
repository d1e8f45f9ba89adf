# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A rank that dies or hangs takes the others down with a message that names it; no process stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.dead_rank_program import CASES
from tests.distributed.test_layouts import run_module

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
SAYS = {
    "first": "pipeline stage 1 (rank 1) waits for hidden states of stage 0 (rank 0)",
    "last": "pipeline stage 0 (rank 0) sends hidden states to stage 1 (rank 1)",
    "hangs": "pipeline stage 1 (rank 1) waits for hidden states of stage 0 (rank 0)",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a tiny converted model and its data are."""
    folder = tmp_path_factory.mktemp("dead-rank")
    run_module("tests.helpers.tiny_run", str(folder), timeout=300)
    return folder


@pytest.fixture(scope="module")
def survivors(folder: Path) -> dict[str, dict]:
    """Case -> what the rank that was left said."""
    run_module("tests.distributed.dead_rank_program", str(folder), timeout=400)
    return {case: json.loads((folder / f"{case}.json").read_text()) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_the_survivor_names_the_stage_and_rank_it_waited_for(survivors, case: str) -> None:
    said = survivors[case]
    assert said["error"].startswith(SAYS[case]) and "resumes from the last checkpoint" in said["error"]
    assert said["cause"] in ("RuntimeError", "DistBackendError"), "the transport's own error is chained"
    # The first stage may be a step ahead when it notices; neither gets beyond what was in flight.
    assert said["step"] in (1, 2)


def processes_of(mark: str) -> list[int]:
    """Processes whose command line holds `mark`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(int(entry.name))
        except OSError:  # ended meanwhile
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads command lines from /proc")
@pytest.mark.parametrize("victim", ["child", pytest.param("parent", marks=pytest.mark.slow)])
def test_ranks_that_the_script_started_itself_leave_nobody_behind(folder: Path, tmp_path: Path, victim: str) -> None:
    """`trainer.devices=2` without torchrun: Lightning starts the second rank as a child of the first."""
    data = folder / "data"
    command = [
        sys.executable, str(ROOT / "examples" / "megatron_gpt_early_exit_tune.py"), "trainer.accelerator=cpu",
        "trainer.precision=32", "trainer.devices=2", "model.pipeline_model_parallel_size=2",
        f"model.restore_from_path={folder / 'start.nemo'}", "trainer.max_steps=100000",
        f"model.data.data_prefix={{train: [{data}], validation: [{data}], test: [{data}]}}", "model.seed=7",
        "trainer.log_every_n_steps=100000", "trainer.val_check_interval=100000", "model.micro_batch_size=1",
        "model.global_batch_size=2", "model.encoder_seq_length=16", f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    output = tmp_path / "output"
    # No torchrun, no rank of an outer test in the environment.
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(output, "wb") as file:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 240
        while b" 3/100000 [" not in output.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, output.read_text(errors="replace")[-3000:]
            time.sleep(0.2)
        ranks = processes_of(str(tmp_path))
        assert len(ranks) == 2 and process.pid in ranks
        (child,) = set(ranks) - {process.pid}
        os.kill(child if victim == "child" else process.pid, signal.SIGKILL)
        assert process.wait(timeout=120) != 0
        deadline = time.monotonic() + 120
        while processes_of(str(tmp_path)):
            assert time.monotonic() < deadline, "a rank is still there"
            time.sleep(0.2)
    finally:
        for left in processes_of(str(tmp_path)):
            os.kill(left, signal.SIGKILL)
        process.wait()
    # Where a child dies, Lightning's launcher watches it too and may end the parent before its own message is out.
    said = output.read_text(errors="replace")
    ours = f"RuntimeError: {SAYS['last' if victim == 'child' else 'first']}"
    assert ours in said or (victim == "child" and f"Child process with PID {child} terminated with code -9" in said)
