# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Per-exit sums over microbatches, data-parallel ranks and stages, and the names they are logged under.

A row per exit of the *whole* model, zeros for exits of other stages, so that one sum over the pipeline group puts
every exit's numbers on every rank. Only log, validation and save steps call `reduce`.

    exit/<name>/loss            training loss per token since the last log step, nats
    exit/<name>/lr              learning rate of the step (exits that train something)
    exit/<name>/grad_norm       norm of the step's gradients before clipping (exits that train something)
    exit/<name>/loss_weight     weight of the loss in the step
    val/exit/<name>/loss        validation loss per token, nats
    val/exit/<name>/perplexity  exp of it
    val/exit/<name>/agreement   share of positions where the exit's most likely token is the full model's
    val/full_model/loss         the final exit's validation loss (with val_agreement)

May import: torch, megatron.core.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

FULL_MODEL = "full_model"
STEP_VALUES = ("lr", "grad_norm", "loss_weight")
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

    def reduce(
        self, *, over_data: bool = True, step_values: Mapping[str, Mapping[str, float]] | None = None
    ) -> dict[str, dict[str, float]]:
        """Sums over the data-parallel group (unless already done) and the pipeline; then loss, perplexity, agreement.

        Every rank must call it. The sums start anew afterwards.

        Args:
            over_data: sum over the data-parallel group too.
            step_values: this stage's exits -> some of `STEP_VALUES`, the same on its tensor- and data-parallel ranks.
                They travel with the sums. All ranks give it or none does.

        Returns:
            name -> {"loss", "perplexity", "agreement"} and the step's values; only exits with tokens or values, and
            only what was measured.
        """
        total = self.sums.clone()
        self.sums.zero_()
        if over_data and parallel_state.get_data_parallel_world_size() > 1:
            torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
        if step_values is not None:
            total = torch.cat((total, self._step_rows(step_values)), dim=1)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        result: dict[str, dict[str, float]] = {}
        for name, row in zip(self.rows, total.tolist(), strict=True):
            (loss_sum, count, agreed, compared), steps = row[: len(_COLUMNS)], row[len(_COLUMNS) :]
            if count:
                loss = loss_sum / count
                result[name] = {"loss": loss, "perplexity": math.exp(min(loss, 80.0))}
            if compared:
                result.setdefault(name, {})["agreement"] = agreed / compared
            for key, value, given in zip(STEP_VALUES, steps[::2], steps[1::2], strict=False):
                if given:
                    result.setdefault(name, {})[key] = value
        return result

    def _step_rows(self, step_values: Mapping[str, Mapping[str, float]]) -> Tensor:
        """[rows, 2 len(STEP_VALUES)]: each value, and 1 where the exit's stage has one."""
        rows = torch.zeros(len(self.rows), len(STEP_VALUES), 2, dtype=torch.float64)
        for name, values in step_values.items():
            for key, value in values.items():
                rows[self.rows[name], STEP_VALUES.index(key)] = torch.tensor((value, 1.0), dtype=torch.float64)
        return rows.flatten(1).to(self.sums.device)


def metric_name(exit_name: str, metric: str, *, validation: bool) -> str:
    """The stable name a metric is logged under."""
    row = FULL_MODEL if exit_name == FULL_MODEL else f"exit/{exit_name}"
    return f"{'val/' if validation else ''}{row}/{metric}"
