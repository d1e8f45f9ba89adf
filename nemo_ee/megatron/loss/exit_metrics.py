# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Per-exit sums over microbatches, data-parallel ranks and stages, and the names they are logged under.

A row per exit of the *whole* model, zeros for exits of other stages, so that one sum over the pipeline group puts
every exit's numbers on every rank. Only log, validation and save steps call `reduce`.

    exit/<name>/loss            training loss of the exit's objective per token since the last log step, nats
    exit/<name>/cross_entropy   the label's cross-entropy, where that is not the loss
    exit/<name>/lr              learning rate of the step (exits that train something)
    exit/<name>/grad_norm       norm of the step's gradients before clipping (exits that train something)
    exit/<name>/loss_weight     weight of the loss in the step
    val/exit/<name>/loss        validation loss per token: the label's cross-entropy, whatever the objective
    .../perplexity              exp of the cross-entropy
    .../kl                      divergence from the final exit at the run's temperature, for exits that learn from it
    .../confidence              mean largest probability
    val/exit/<name>/entropy     mean entropy, nats
    val/exit/<name>/agreement   share of positions where the exit's most likely token is the full model's
    val/full_model/loss         the final exit's validation loss (with val_agreement)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_ee.exits.objective import CROSS_ENTROPY, Objective
from nemo_ee.megatron.loss.linear_cross_entropy import TokenSums

FULL_MODEL = "full_model"
STEP_VALUES = ("lr", "grad_norm", "loss_weight")
# (sum, its divisor); gradients are divided by the first column.
_MEANS = {
    "loss": ("loss", "weight"),
    "cross_entropy": ("cross_entropy", "tokens"),
    "kl": ("kl", "kl_tokens"),
    "confidence": ("confidence", "confidence_tokens"),
    "entropy": ("entropy", "entropy_tokens"),
    "agreement": ("agreed", "compared"),
}
_COLUMNS = tuple(dict.fromkeys(column for pair in _MEANS.values() for column in reversed(pair)))
assert _COLUMNS[0] == "weight"


def row_of(sums: TokenSums, *, taught: bool = False, entropy: bool = False) -> Tensor:
    """One microbatch's sums as a row, fp32; its first entry is the weight that the summed loss is divided by.

    Args:
        sums: sums from `linear_cross_entropy`.
        taught: there was a teacher, so `kl` is defined.
        entropy: the entropy was computed.
    """
    values = {**vars(sums), "confidence_tokens": sums.tokens}
    values |= {"kl_tokens": sums.tokens} if taught else {}
    values |= {"entropy_tokens": sums.tokens} if entropy else {}
    return _row(values)


def label_row(loss: Tensor, tokens: Tensor) -> Tensor:
    """A row of the label's cross-entropy alone, both fp32 scalars summed over the tokens that count."""
    return _row({"loss": loss, "weight": tokens, "cross_entropy": loss, "tokens": tokens})


def _row(values: Mapping[str, Tensor]) -> Tensor:
    zero = torch.zeros_like(values["tokens"])
    return torch.stack([values.get(column, zero) for column in _COLUMNS])


def empty_row(device: torch.device) -> Tensor:
    """A row of zeros to add rows to."""
    return torch.zeros(len(_COLUMNS), device=device)


class ExitSums:
    """Accumulates rows per exit.

    Args:
        names: exits of the whole model in config order; the final exit's row comes last, as `full_model`.
        device: where the sums live.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.rows = {name: index for index, name in enumerate((*names, FULL_MODEL))}
        self.sums = torch.zeros(len(self.rows), len(_COLUMNS), dtype=torch.float64, device=device)

    def add_row(self, name: str, row: Tensor) -> None:
        """Add a row of `row_of`, or a sum of such rows."""
        self.sums[self.rows[name]] += row

    @staticmethod
    def mean_loss(row: Tensor) -> Tensor:
        """Loss per unit of weight of a row, fp32 scalar; 0 of an empty one."""
        weight, loss = row[_COLUMNS.index("weight")], row[_COLUMNS.index("loss")]
        return torch.where(weight > 0, loss / weight, torch.zeros_like(loss))

    def add_agreement(self, name: str, *, agreed: Tensor | float, compared: Tensor | float) -> None:
        """Add positions that agreed with the full model, and how many were compared."""
        for column, value in (("agreed", agreed), ("compared", compared)):
            self.sums[self.rows[name], _COLUMNS.index(column)] += value

    def reduce(
        self, *, over_data: bool = True, step_values: Mapping[str, Mapping[str, float]] | None = None
    ) -> dict[str, dict[str, float]]:
        """Sums over the data-parallel group (unless already done) and the pipeline; then their means.

        Every rank must call it. The sums start anew afterwards.

        Args:
            over_data: sum over the data-parallel group too.
            step_values: this stage's exits -> some of `STEP_VALUES`, the same on its tensor- and data-parallel ranks.
                They travel with the sums. All ranks give it or none does.

        Returns:
            name -> {"loss", "cross_entropy", "perplexity", ...} and the step's values; only exits with tokens or
            values, and only what was measured.
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
            values, steps = dict(zip(_COLUMNS, row[: len(_COLUMNS)], strict=True)), row[len(_COLUMNS) :]
            means = {key: values[top] / values[count] for key, (top, count) in _MEANS.items() if values[count]}
            if "cross_entropy" in means:
                means["perplexity"] = math.exp(min(means["cross_entropy"], 80.0))
            for key, value, given in zip(STEP_VALUES, steps[::2], steps[1::2], strict=False):
                if given:
                    means[key] = value
            if means:
                result[name] = means
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


def named_metrics(
    results: Mapping[str, Mapping[str, float]], objectives: Mapping[str, Objective], *, validation: bool
) -> Iterator[tuple[str, float]]:
    """(name to log under, value) of what `ExitSums.reduce` returned.

    Args:
        results: exit name -> metric -> value.
        objectives: exit name -> objective; a training loss that is the label's cross-entropy is not named twice.
        validation: the results are validation results, whose loss is always the label's cross-entropy.
    """
    for name, result in results.items():
        plain = validation or objectives.get(name, CROSS_ENTROPY) == CROSS_ENTROPY
        for metric, value in result.items():
            if not (plain and metric == "cross_entropy"):
                yield metric_name(name, metric, validation=validation), value


def mean_loss(results: Mapping[str, Mapping[str, float]], *, full_model: bool) -> float:
    """Mean of the exits' losses, the full model's included if requested; 0 where there is none."""
    losses = [
        result["loss"] for name, result in results.items() if "loss" in result and (full_model or name != FULL_MODEL)
    ]
    return sum(losses) / max(1, len(losses))
