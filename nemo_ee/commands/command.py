# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Set-up and error handling of every script: the CPU host is switched on in time, a user's error is one message, and
the processes of a killed script end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_ee import cpu_host
from nemo_ee.commands.console import complain, console, rank
from nemo_ee.exits.block_reader import RENAMED_KEYS

logger = logging.getLogger(__name__)

# Environment variables of a script inside `command`, for the processes that it starts.
_SCRIPT_PID = "NEMO_EE_SCRIPT_PID"  # its process id
_LOG_FILE = "NEMO_EE_LOG_FILE"  # log file of rank 0
_SECONDS_BETWEEN_LOOKS = 0.5


@contextlib.contextmanager
def command(cfg: Any) -> Iterator[None]:
    """Context of a script's work; enter it before the first import of a library that uses torch.

    `trainer.accelerator=cpu` switches the CPU host on. The output of libraries goes to the script's log file
    (`nemo_ee.commands.console`), if its yaml names a folder for one in `hydra.run.dir`.

    A `ValueError`, `FileNotFoundError` or `ImportError` (the package's errors for a config, a checkpoint or a request,
    and for a library that is missing or of an unsupported version) ends the script with its message and exit code 2
    instead of a traceback; `HYDRA_FULL_ERROR=1` shows the traceback.
    SIGTERM in the middle of a tuning run ends it with exit code 143, as it ends other programs. The path of the log
    file is the last line of every error.

    Args:
        cfg: the script's config.
    """
    from omegaconf import OmegaConf

    # NeMo registers this resolver on import; the config may be resolved before that.
    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
    os.environ[_SCRIPT_PID] = str(os.getpid())
    path = _log_path()
    try:
        with console(path), _errors_in_one_message(path):
            if path:
                logger.info("%s: log file %s", path.stem.partition("-")[0], os.path.relpath(path))
            if OmegaConf.select(cfg, "trainer.accelerator") == "cpu":
                cpu_host.enable()
            yield
    finally:
        os.environ.pop(_SCRIPT_PID, None)
        os.environ.pop(_LOG_FILE, None)


def refuse_renamed_overrides(overrides: Sequence[str] | None = None) -> None:
    """Check Hydra overrides (None: this process's arguments) before Hydra, whose message would not name the new key.

    Raises:
        SystemExit: an override sets a retired key; the message names the new key.
    """
    for override in sys.argv[1:] if overrides is None else overrides:
        name = override.partition("=")[0].lstrip("+~").rpartition(".")[2]
        if name in RENAMED_KEYS:
            complain(f"error: {override}: {name} is now {RENAMED_KEYS[name]}\n")
            sys.exit(2)


def _log_path() -> Path | None:
    """Log file of this rank: `<script>-<date>-<time>.log` in Hydra's run folder; None if that is `.` or unknown.

    Ranks other than 0 write beside it, `<...>.rank<r>.log`.
    """
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized() or HydraConfig.get().run.dir == ".":
        return None
    hydra = HydraConfig.get()
    path = Path(hydra.runtime.output_dir, f"{hydra.job.name}-{time.strftime('%Y%m%d-%H%M%S')}.log")
    if not rank():
        os.environ[_LOG_FILE] = str(path)
        return path
    return Path(os.environ.get(_LOG_FILE, path)).with_suffix(f".rank{rank()}.log")


@contextlib.contextmanager
def _errors_in_one_message(path: Path | None) -> Iterator[None]:
    """End the script on an error: print a user's error as its message, others as a traceback, then the log file."""
    try:
        yield
    except KeyboardInterrupt:
        logger.debug("where it was interrupted", exc_info=True)
        complain(f"interrupted\nlog file: {path}\n" if path else "interrupted\n")
        raise
    except SystemExit as end:
        if type(end).__name__ != "SIGTERMException":
            raise
        # Lightning's, which would end the script with exit code 0, though nothing was saved at the end.
        complain(f"ended by SIGTERM\nlog file: {path}\n" if path else "ended by SIGTERM\n")
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:
        who = f"rank {rank()}: " if rank() else ""  # one rank alone may have the problem
        where = f"log file: {path}\n" if path else ""
        if (
            isinstance(error, (ValueError, FileNotFoundError, ImportError))
            and os.environ.get("HYDRA_FULL_ERROR") != "1"
        ):
            logger.debug("where the error comes from", exc_info=True)
            complain(f"{who}error: {error}\n(HYDRA_FULL_ERROR=1 shows the traceback)\n{where}")
            sys.exit(2)
        if not path:
            raise
        complain(f"{who}{traceback.format_exc()}{where}")
        sys.exit(1)


def _end_with_the_script() -> None:
    """End this process when its parent has ended, if the parent is a script inside `command` (or a child of one).

    Checkpoint writers and the ranks that Lightning starts would wait for ever, or for the time limit of a collective.
    The kernel's signal for this (PR_SET_PDEATHSIG) is no substitute: it is sent when the thread that started this
    process ends.
    """
    parent = os.getppid()
    if os.environ.get(_SCRIPT_PID) != str(parent):
        return
    os.environ[_SCRIPT_PID] = str(os.getpid())  # child processes of this process end with it

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, name="ends with the script", daemon=True).start()


# A forked process runs the hook; a spawned process and a rank import the script, which imports this file.
os.register_at_fork(after_in_child=_end_with_the_script)
_end_with_the_script()
