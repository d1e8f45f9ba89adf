# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What every script does around its work: switch the CPU host on in time, end a user's error in one message, and end
the processes it started when it is killed."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from nemo_ee import cpu_host

_SCRIPT_PID = "NEMO_EE_SCRIPT_PID"  # environment variable: process id of the script inside `command`
_SECONDS_BETWEEN_LOOKS = 0.5


@contextlib.contextmanager
def command(cfg: Any) -> Iterator[None]:
    """Surround a script's work; enter it before anything imports torch's users.

    `trainer.accelerator=cpu` switches the CPU host on. A `ValueError` or `FileNotFoundError` (what the package raises
    for problems of a config, a checkpoint or a request) ends the script with its message and exit code 2 instead of a
    traceback; `HYDRA_FULL_ERROR=1` shows the traceback.

    Args:
        cfg: the script's config.
    """
    from omegaconf import OmegaConf

    # NeMo registers it when imported; the config may be resolved before that.
    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
    os.environ[_SCRIPT_PID] = str(os.getpid())
    try:
        if OmegaConf.select(cfg, "trainer.accelerator") == "cpu":
            cpu_host.enable()
        yield
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        rank = os.environ.get("LOCAL_RANK", "0")  # a problem may show on one rank only
        who = "" if rank == "0" else f"rank {rank}: "
        sys.stderr.write(f"{who}error: {error}\n(HYDRA_FULL_ERROR=1 shows where)\n")
        sys.exit(2)
    finally:
        os.environ.pop(_SCRIPT_PID, None)


def _end_with_the_script() -> None:
    """End this process once its parent is gone, if that parent is a script inside `command` (or a child of one).

    Checkpoint writers and the ranks that Lightning starts would wait for ever, or for the time limit of a collective.
    The kernel's own signal for this (PR_SET_PDEATHSIG) already comes when the thread that started the process ends.
    """
    parent = os.getppid()
    if os.environ.get(_SCRIPT_PID) != str(parent):
        return
    os.environ[_SCRIPT_PID] = str(os.getpid())  # what this process starts ends with it

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, name="ends with the script", daemon=True).start()


# A forked process runs the hook; a spawned one and a rank import the script, and with it this file.
os.register_at_fork(after_in_child=_end_with_the_script)
_end_with_the_script()
