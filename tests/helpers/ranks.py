# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a function on several gloo ranks: forked from one process that has imported everything once."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable


def free_port() -> int:
    """A port the system says is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(
    function: Callable[[int], None], world_size: int, *, timeout: float, log: str, wait_for_all: bool = False
) -> None:
    """Call `function(rank)` on `world_size` forked ranks with the environment of one node.

    Args:
        function: what each rank runs; the environment names the rendezvous.
        world_size: number of ranks.
        timeout: seconds after which every rank is killed.
        log: path prefix; rank r writes its output to `<log>.rank<r>.log`.
        wait_for_all: let the others go on when a rank has failed; otherwise they are killed at once.

    Raises:
        RuntimeError: a rank failed or timed out; the message ends with its last lines.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks = [context.Process(target=_rank, args=(function, rank, world_size, port, log)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    try:
        while any(process.is_alive() for process in ranks):
            failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
            if (failed and not wait_for_all) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in ranks:
            # The whole group: a rank's checkpoint writer leaves a manager process that outlives a killed parent.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
    bad = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
    if bad:
        first = next((rank for rank in bad if ranks[rank].exitcode and ranks[rank].exitcode > 0), bad[0])
        with open(f"{log}.rank{first}.log", errors="replace") as file:
            tail = "".join(file.readlines()[-40:])
        raise RuntimeError(f"ranks {bad} of {world_size} failed or timed out; rank {first} ended with:\n{tail}")


def _rank(function: Callable[[int], None], rank: int, world_size: int, port: int, log: str) -> None:
    os.setsid()
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1",
    )
    descriptor = os.open(f"{log}.rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    faulthandler.enable(sys.stderr)
    try:
        function(rank)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    # Threads of gloo and of the checkpoint writer may outlive the work; nothing of them is needed any more.
    os._exit(0)
