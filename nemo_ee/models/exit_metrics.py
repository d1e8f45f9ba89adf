# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Per-exit sums over microbatches, data-parallel ranks and stages, and the names they are logged under.

A row per exit of the *whole* model, zeros for exits of other stages, so that one sum over the pipeline group puts
every exit's numbers on every rank. Only log, validation and save steps call `reduce`.

    exit/<name>/loss            training loss per token since the last log step, nats
    val/exit/<name>/loss        validation loss per token, nats
    val/exit/<name>/perplexity  exp of it
    val/exit/<name>/agreement   share of positions where the exit's most likely token is the full model's
    val/full_model/loss         the final exit's validation loss (with val_agreement)

May import: torch, megatron.core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

FULL_MODEL = "full_model"
_COLUMNS = ("loss_sum", "count", "agreed", "compared")


class ExitSums:
    """Accumulates (sum, count) pairs per exit.

    Args:
        names: exits of the whole model in config order; the final exit's row comes last, as `full_model`.
        device: where the sums live.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.rows = {name: index for index, name in enumerate((*names, FULL_MODEL))}
        self.sums = torch.zeros(len(self.rows), len(_COLUMNS), dtype=torch.float64, device=device)

    def add(self, name: str, **values: Tensor | float) -> None:
        """Add to an exit's `loss_sum`, `count`, `agreed`, `compared`."""
        for column, value in values.items():
            self.sums[self.rows[name], _COLUMNS.index(column)] += value

    def reduce(self, *, over_data: bool = True) -> dict[str, dict[str, float]]:
        """Sums over the data-parallel group (unless already done) and the pipeline; then loss, perplexity, agreement.

        Every rank must call it. The sums start anew afterwards.

        Returns:
            name -> {"loss", "perplexity", "agreement"}; only exits with tokens, and only what was measured.
        """
        total = self.sums.clone()
        self.sums.zero_()
        if over_data and parallel_state.get_data_parallel_world_size() > 1:
            torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        result: dict[str, dict[str, float]] = {}
        for name, row in zip(self.rows, total.tolist(), strict=True):
            loss_sum, count, agreed, compared = row
            if count:
                loss = loss_sum / count
                result[name] = {"loss": loss, "perplexity": math.exp(min(loss, 80.0))}
            if compared:
                result.setdefault(name, {})["agreement"] = agreed / compared
        return result


def metric_name(exit_name: str, metric: str, *, validation: bool) -> str:
    """The stable name a metric is logged under."""
    row = FULL_MODEL if exit_name == FULL_MODEL else f"exit/{exit_name}"
    return f"{'val/' if validation else ''}{row}/{metric}"
