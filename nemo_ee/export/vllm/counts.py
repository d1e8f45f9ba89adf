# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""How many tokens were read at which exit: in the log, and in the server's `/metrics`.

The model counts in a process of its own; a small file that every process maps holds the numbers.

    nemo_ee:early_exit_tokens_total{exit="layer4-mlp"}    rows of decoding steps, read there; "final" = full depth
    nemo_ee:early_exit_steps_total{exit="layer4-mlp"}     decoding steps that ended there
"""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

LOG_EVERY = 1000  # steps
FINAL = "final"
TOKENS, STEPS = 0, 1
logger = logging.getLogger("vllm.nemo_ee")


def new_counts_file(exits: int, ranks: int) -> str:
    """A file for the counts of this many exits and data-parallel ranks, removed when this process ends."""
    handle, path = tempfile.mkstemp(prefix="nemo_ee-counts-")
    with os.fdopen(handle, "wb") as file:
        file.write(np.zeros((ranks, 2, exits + 1), np.int64).tobytes())
    atexit.register(Path(path).unlink, missing_ok=True)
    return path


class ExitCounts:
    """Counts of a data-parallel rank, or of all.

    Args:
        names: the exits, in order.
        path: a file of `new_counts_file`; without one, as on another host, the counts are only in the log.
        rank: the rank that counts.
    """

    def __init__(self, names: Sequence[str], path: str, rank: int = 0) -> None:
        self.names, self._rank, self._logged = (*names, FINAL), rank, 0
        if path and Path(path).is_file():
            self._values = np.memmap(path, np.int64, "r+").reshape(-1, 2, len(self.names))
        else:
            self._values = np.zeros((rank + 1, 2, len(self.names)), np.int64)

    def add(self, tokens: Sequence[int], end: int) -> None:
        """Count a step.

        Args:
            tokens: tokens read at each exit, and at the final one.
            end: index of the exit at which the step ended.
        """
        own = self._values[self._rank]
        own[TOKENS] += tokens
        own[STEPS, end] += 1
        if (steps := int(own[STEPS].sum())) >= self._logged + LOG_EVERY:
            self._logged = steps
            logger.info("early exit, tokens by exit: %s; %d steps", self.by_exit(TOKENS), steps)

    def by_exit(self, kind: int) -> dict[str, int]:
        """Counts of `TOKENS` or `STEPS`."""
        return dict(zip(self.names, self._values[:, kind].sum(axis=0).tolist(), strict=True))


def publish(counts: ExitCounts) -> None:
    """Put the counts into the metrics of this process."""
    from prometheus_client import REGISTRY
    from prometheus_client.core import CounterMetricFamily

    class Collector:
        def collect(self) -> Iterator[CounterMetricFamily]:
            for kind, name, what in ((TOKENS, "tokens", "Tokens read at"), (STEPS, "steps", "Steps that ended at")):
                family = CounterMetricFamily(f"nemo_ee:early_exit_{name}", f"{what} each exit.", labels=["exit"])
                for exit, value in counts.by_exit(kind).items():
                    family.add_metric([exit], value)
                yield family

    global _published
    if _published is not None:
        REGISTRY.unregister(_published)
    _published = Collector()
    REGISTRY.register(_published)


_published = None
