# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What every script does around its work: switch the CPU host on in time, and end a user's error in one message."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from nemo_ee import cpu_host


@contextlib.contextmanager
def command(cfg: Any, *, may_miss: bool = False) -> Iterator[None]:
    """Surround a script's work; enter it before anything imports torch's users.

    `trainer.accelerator=cpu` switches the CPU host on. A `ValueError` or `FileNotFoundError` (what the package raises
    for faults of a config, a checkpoint or a request) ends the script with its message and exit code 2 instead of a
    traceback; `HYDRA_FULL_ERROR=1` shows the traceback.

    Args:
        cfg: the script's config.
        may_miss: the script itself reports settings that are needed and not given, together with other faults.
    """
    from omegaconf import OmegaConf

    # NeMo registers it when imported; the config may be resolved before that.
    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing and not may_miss:
            raise ValueError(f"needed and not given: {' '.join(f'{key}=...' for key in missing)}")
        if OmegaConf.select(cfg, "trainer.accelerator") == "cpu":
            cpu_host.enable()
        yield
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        rank = os.environ.get("LOCAL_RANK", "0")  # a fault may show on one rank only
        who = "" if rank == "0" else f"rank {rank}: "
        sys.stderr.write(f"{who}error: {error}\n(HYDRA_FULL_ERROR=1 shows where)\n")
        sys.exit(2)


def names(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """A setting that is a list of names, or one name alone (`targets=full`); None stays None."""
    return value if value is None else (value,) if isinstance(value, str) else tuple(value)
