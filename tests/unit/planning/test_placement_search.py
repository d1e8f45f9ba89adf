# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Probes against torch's least squares, placements against every one of them tried on made-up tables."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from nemo_ee.planning.placement_search import Placement, ProbeTable, fit_probe, pareto, placements
from nemo_ee.planning.threshold_search import THRESHOLDS, DecodingCosts, ThresholdSearch

COSTS = DecodingCosts(attention=1.0, mlp=1.0, row=0.1, heads={None: 2.0})
WEIGHTS = DecodingCosts(attention=0.5, mlp=1.5, row=0.0, heads={None: 1.5})


def table(layers: int = 5, tokens: int = 400, certain: float = 3.0) -> ProbeTable:
    """Probes that are right more often, and know it better, the deeper they are."""
    noise = torch.Generator().manual_seed(1)
    quality = torch.linspace(0.3, 0.9, layers - 1)
    right = torch.rand(tokens, layers - 1, generator=noise) < quality
    confidence = torch.sigmoid(certain * (right.float() - 0.5) + 0.5 * torch.randn(right.shape, generator=noise))
    nats = torch.where(right, 0.0, 2.0).double()
    zero = torch.zeros(tokens, 1)
    return ProbeTable(
        layers=tuple(range(1, layers)),
        num_layers=layers,
        confidences={"max_probability": confidence},
        nats=torch.cat([nats, zero.double()], 1),
        differs=torch.cat([(~right).float(), zero], 1),
    )


def search(made: ProbeTable, holding: ProbeTable | None = None, **given: object) -> list[Placement]:
    """`placements` of `norm` exits, measured on the tokens that chose them unless others are given."""
    settings = {"architecture": "norm", "costs": COSTS, **given}
    costs = settings.pop("costs")
    return placements(made, made if holding is None else holding, costs, WEIGHTS, **settings)


def test_a_probe_is_torchs_least_squares() -> None:
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 12, generator=noise)
    targets = inputs @ torch.randn(12, 12, generator=noise) + 3.0 + 0.1 * torch.randn(4000, 12, generator=noise)
    weight, bias = fit_probe(inputs, targets)
    ours = inputs @ weight + bias
    ones = torch.cat([inputs, torch.ones(4000, 1)], 1)
    theirs = ones @ torch.linalg.lstsq(ones, targets).solution
    assert (ours - theirs).square().mean() < 1e-3 * targets.var()


def test_a_probe_on_the_final_hidden_state_changes_nothing() -> None:
    inputs = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    weight, bias = fit_probe(inputs, inputs)
    assert torch.allclose(weight, torch.eye(8), atol=1e-5) and bias.abs().max() < 1e-5


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="100 tokens are too few.*better 32"):
        fit_probe(torch.randn(100, 8), torch.randn(100, 8))


def test_one_exit_is_the_best_of_every_layer_and_threshold() -> None:
    made = table()
    found = search(made, limits=[0.2], most_exits=[1])
    best = max(found, key=lambda one: one.speed)
    names = [str(layer) for layer in made.layers]
    every = ThresholdSearch(
        names, [*(2 * layer for layer in made.layers), 10], made.confidences["max_probability"], made.nats,
        DecodingCosts(1.0, 1.0, 0.1, dict.fromkeys((*names, None), 2.0)),
    )  # fmt: skip
    trials = [every.at({name: threshold}) for name, threshold in itertools.product(names, THRESHOLDS)]
    fastest = min(one.seconds for one in trials if one.lost <= math.log1p(0.2))
    assert best.speed == pytest.approx(every.full_depth_seconds / fastest, rel=1e-6) and best.speed > 1.05
    assert best.perplexity <= 1.2 and len(best.thresholds) == 1 and 0 < best.agreement < 1 and best.depth < 1


def test_more_exits_and_more_loss_are_no_slower() -> None:
    speeds = {}
    for limit, count in itertools.product((0.02, 0.1), (1, 3)):
        found = search(table(), limits=[limit], most_exits=[count])
        speeds[limit, count] = max(one.speed for one in found)
    assert speeds[0.02, 1] <= speeds[0.02, 3] <= speeds[0.1, 3] and speeds[0.02, 1] <= speeds[0.1, 1]


def test_heads_that_cost_more_than_they_save_are_left_out() -> None:
    dear = dataclasses.replace(COSTS, heads={None: 20.0})
    (only,) = search(table(), costs=dear, limits=[0.05], most_exits=[1, 2])
    assert only.thresholds == {} and (only.speed, only.perplexity, only.agreement, only.depth) == (1, 1, 1, 1)


def test_agreement_by_layer_and_what_is_kept() -> None:
    made = table()
    assert list(made.agreement) == [1, 2, 3, 4] and made.agreement[1] < made.agreement[4]

    def one(speed: float, perplexity: float, exits: int) -> Placement:
        return Placement("norm", "margin", dict.fromkeys(range(exits), 0.5), perplexity, 1.0, 1.0, speed, speed)

    slow, fast, beaten, twin = one(1.0, 1.0, 0), one(1.5, 1.1, 1), one(1.4, 1.2, 1), one(1.5, 1.1, 2)
    assert pareto([twin, fast, beaten, slow]) == [slow, fast]


def test_what_is_reported_is_of_tokens_that_did_not_choose() -> None:
    made = table(tokens=800)
    choosing, holding = made.rows(slice(0, 400)), made.rows(slice(400, None))
    (*_, best) = search(choosing, holding, limits=[0.1], most_exits=[1])
    (*_, same) = search(choosing, choosing, limits=[0.1], most_exits=[1])
    worse = dataclasses.replace(holding, nats=2 * holding.nats)
    (*_, other) = search(choosing, worse, limits=[0.1], most_exits=[1])
    assert best.thresholds == same.thresholds == other.thresholds, "the second part does not choose"
    assert best.perplexity != same.perplexity
    assert math.log(other.perplexity) == pytest.approx(2 * math.log(best.perplexity))


def test_an_mlp_exit_costs_a_token_that_goes_on_one_mlp_more() -> None:
    made = table()
    (*_, norm) = search(made, limits=[0.2], most_exits=[1])
    (*_, mlp) = search(made, limits=[0.2], most_exits=[1], architecture="mlp")
    assert mlp.speed < norm.speed and mlp.architecture == "mlp"


def test_entropy_thresholds_are_in_nats() -> None:
    made = table()
    entropy = dataclasses.replace(made, confidences={"entropy": made.confidences["max_probability"]})
    (*_, as_probability) = search(made, limits=[0.2], most_exits=[1])
    (*_, in_nats) = search(entropy, limits=[0.2], most_exits=[1])
    ((layer, value),) = in_nats.thresholds.items()
    assert value == pytest.approx(-math.log(as_probability.thresholds[layer]))


def test_one_huge_hidden_state_does_not_make_the_probe_the_identity() -> None:
    """As attention sinks have them."""
    noise = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 8, generator=noise)
    inputs[0] *= 1000
    turn = torch.linalg.qr(torch.randn(8, 8, generator=noise)).Q
    weight, bias = fit_probe(inputs, inputs @ turn)
    assert torch.allclose(inputs[1:] @ weight + bias, inputs[1:] @ turn, atol=0.2)
