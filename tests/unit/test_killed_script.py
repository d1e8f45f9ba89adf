# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A script that is killed with SIGKILL takes what it started with it: spawned, forked, and what those started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# As a script of ours, and as Megatron's checkpoint writer: a manager process (spawned, with its resource tracker), a
# forked writer, and a child of that one. A spawned process imports the script again.
SCRIPT = """
import multiprocessing, os, time
from contextlib import nullcontext
from omegaconf import OmegaConf
from nemo_ee.commands.command import command

def wait(count):
    print(os.getpid(), flush=True)
    if count:
        process = multiprocessing.get_context("fork").Process(target=wait, args=(count - 1,))
        process.start()
    time.sleep(120)

if __name__ == "__main__":
    with {surround}:
        manager = multiprocessing.get_context("spawn").Manager()
        print(manager._process.pid, multiprocessing.resource_tracker._resource_tracker._pid, flush=True)
        wait(2)
"""


def running(pids: list[int]) -> list[int]:
    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "Z"

    return [pid for pid in pids if state(pid) != "Z"]


@pytest.mark.slow_unit
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("inside", [True, False], ids=["a script", "control"])
def test_what_a_killed_script_started_ends(inside: bool, tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    surround = "command(OmegaConf.create())" if inside else "nullcontext()"
    file.write_text(SCRIPT.replace("{surround}", surround), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "NEMO_EE_SCRIPT_PID"}
    process = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, text=True, env=environment)
    pids: list[int] = []
    try:
        while len(pids) < 5:
            pids += [int(pid) for pid in process.stdout.readline().split()]
        started = [pid for pid in pids if pid != process.pid]
        assert running(started) == started and len(started) == 4
        process.send_signal(signal.SIGKILL)
        process.wait()
        end = time.monotonic() + (60 if inside else 3)
        while running(started) and time.monotonic() < end:
            time.sleep(0.1)
        assert bool(running(started)) is not inside
    finally:
        for pid in running(pids):
            os.kill(pid, signal.SIGKILL)
        process.wait()
