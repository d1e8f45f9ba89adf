# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Per-exit sums: divided once, started anew, named by a fixed scheme."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from megatron.core import parallel_state

from nemo_ee.megatron.loss.exit_metrics import FULL_MODEL, ExitSums, metric_name, row_of
from nemo_ee.megatron.loss.linear_cross_entropy import TokenSums


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron's groups of a single process."""
    if not torch.distributed.is_initialized():
        store = tmp_path_factory.mktemp("store") / "store"
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    yield


def _row(**values: float):
    """A row as `row_of` makes it; what is not given is 0."""
    fields = {field.name: torch.tensor(values.get(field.name, 0.0)) for field in dataclasses.fields(TokenSums)}
    return row_of(TokenSums(**fields), taught="kl" in values, entropy="entropy" in values)


def test_sums_are_divided_once() -> None:
    """Three uneven microbatches: the loss is per token, not the mean of the microbatches' means."""
    sums = ExitSums(["a", "b"], torch.device("cpu"))
    for loss, count in ((10.0, 1.0), (0.0, 3.0), (6.0, 4.0)):
        sums.add_row("a", _row(loss=loss, weight=count, cross_entropy=loss / 2, tokens=count, confidence=count / 4))
    sums.add_row("b", _row(loss=1.0, weight=2.0))
    sums.add_agreement("b", agreed=1, compared=4)
    result = sums.reduce()
    assert result["a"] == {"loss": 2.0, "cross_entropy": 1.0, "perplexity": math.exp(1.0), "confidence": 0.25}
    assert result["b"] == {"loss": 0.5, "agreement": 0.25}
    assert FULL_MODEL not in result, "nothing was measured of it"
    assert sums.reduce() == {}, "the sums start anew"


def test_only_what_was_measured_is_reported() -> None:
    """A divergence of 0 is a result, a divergence without a teacher is none."""
    sums = ExitSums(["a", "b"], torch.device("cpu"))
    sums.add_row("a", _row(weight=2.0, tokens=2.0, kl=0.0, entropy=3.0))
    sums.add_row("b", _row(weight=2.0, tokens=2.0))
    result = sums.reduce()
    assert result["a"]["kl"] == 0.0 and result["a"]["entropy"] == 1.5
    assert "kl" not in result["b"] and "entropy" not in result["b"]


def test_the_loss_of_a_row() -> None:
    assert ExitSums.mean_loss(_row(loss=3.0, weight=0.5)) == 6.0
    assert ExitSums.mean_loss(_row()) == 0.0, "no token counted"


def test_small_addends_are_not_lost() -> None:
    """A long validation adds small numbers to a large sum; fp32 would stop counting at 2^24."""
    sums = ExitSums(["a"], torch.device("cpu"))
    sums.add_row("a", _row(loss=2.0**25, weight=2.0**25))
    for _ in range(64):
        sums.add_row("a", _row(loss=1.0))
    assert sums.reduce()["a"]["loss"] == 1.0 + 64 / 2**25


def test_a_huge_loss_keeps_a_finite_perplexity() -> None:
    sums = ExitSums([], torch.device("cpu"))
    sums.add_row(FULL_MODEL, _row(cross_entropy=5000.0, tokens=1.0))
    result = sums.reduce()[FULL_MODEL]
    assert result["cross_entropy"] == 5000.0 and math.isfinite(result["perplexity"])


def test_values_of_a_step_travel_beside_the_sums() -> None:
    sums = ExitSums(["a", "b"], torch.device("cpu"))
    sums.add_row("a", _row(loss=4.0, weight=2.0))
    values = {"a": {"lr": 0.0, "grad_norm": math.inf, "loss_weight": 0.5}, "b": {"loss_weight": 0.0}}
    result = sums.reduce(step_values=values)
    assert result["a"] == {"loss": 2.0, **values["a"]}
    assert result["b"] == {"loss_weight": 0.0}, "zero is a value; what is not given is not logged"
    assert sums.reduce(step_values={}) == {}, "a stage without exits"


def test_names() -> None:
    """Dashboards depend on them."""
    assert metric_name("layer2-mlp", "loss", validation=False) == "exit/layer2-mlp/loss"
    assert metric_name("layer2-mlp", "agreement", validation=True) == "val/exit/layer2-mlp/agreement"
    assert metric_name(FULL_MODEL, "loss", validation=True) == "val/full_model/loss"
