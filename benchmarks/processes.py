# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a function in fresh processes, forked from a process that has imported everything and computed nothing.

Each point of a benchmark gets its own processes, so no point sees another's allocator, threads or process groups. With
several ranks the environment names a gloo rendezvous on a free port. A child ends with its parent, and at its
time-out.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def run_in_processes(
    function: Callable[[int], Any], world_size: int = 1, *, threads: int, timeout: float
) -> list[Any]:
    """Call `function(rank)` in `world_size` forked processes and return what each of them returned, by rank.

    Args:
        function: the function that each rank runs; its result must pickle.
        world_size: ranks of one gloo job.
        threads: torch threads of each rank.
        timeout: seconds after which every rank is killed.

    Raises:
        RuntimeError: a rank failed or the time is over; the message ends with that rank's last lines.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks, logs = [], [tempfile.NamedTemporaryFile("w+", errors="replace") for _ in range(world_size)]
    for rank, log in enumerate(logs):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (function, rank, world_size, port, threads, log.name, theirs)
        process = context.Process(target=_rank, args=arguments)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    try:
        results = _collect(ranks, logs, time.monotonic() + timeout)
    finally:
        for process, _ in ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
    return results


def _collect(ranks: list, logs: list, deadline: float) -> list[Any]:
    """Results by rank, when all are there; raises the first failure."""
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        for rank, (process, ours) in enumerate(ranks):
            if rank in results:
                continue
            with contextlib.suppress(EOFError):  # it ended without a result: handled below
                ended = process.exitcode is not None  # before the pipe: its result may still be in it
                if ours.poll(0.0 if ended else 0.05):
                    results[rank] = ours.recv()
                    continue
                if not ended and time.monotonic() <= deadline:
                    continue
            if process.exitcode is not None or time.monotonic() > deadline:
                why = f"ended with code {process.exitcode}" if process.exitcode is not None else "ran out of time"
                logs[rank].seek(0)
                tail = "".join(logs[rank].readlines()[-40:])
                raise RuntimeError(f"rank {rank} of {len(ranks)} {why}; its last lines:\n{tail}")
    return [results[rank] for rank in range(len(ranks))]


def _rank(
    function: Callable[[int], Any], rank: int, world_size: int, port: int, threads: int, log: str, result: Connection
) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    descriptor = os.open(log, os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    try:
        import torch

        torch.set_num_threads(threads)
        result.send(function(rank))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    # Gloo's threads may outlive the work; they are not needed any more.
    os._exit(0)
