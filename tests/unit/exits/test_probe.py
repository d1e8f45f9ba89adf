# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Probes: the formula, the optimality of the fit, and the stored form."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nemo_ee.exits.confidence import end_confidence, leaves
from nemo_ee.exits.probe import ExitProbe, fit_probe, from_file, to_file

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(800, 12, generator=GENERATOR) * torch.rand(800, 1, generator=GENERATOR).mul(5).add(0.1) + 0.3
AGREES = (HIDDEN[:, 0] - HIDDEN[:, 3]) / HIDDEN.norm(dim=1) + 0.2 * torch.randn(800, generator=GENERATOR) > 0


def test_the_formula_written_out():
    probe = ExitProbe(torch.randn(12, generator=GENERATOR), -0.4)
    for row, value in zip(HIDDEN[:20].tolist(), probe(HIDDEN[:20]).tolist(), strict=True):
        rms = math.sqrt(sum(x * x for x in row) / 12)
        z = sum(x * w for x, w in zip(row, probe.weight.tolist(), strict=True)) / rms - 0.4
        assert value == pytest.approx(1 / (1 + math.exp(-z)), rel=1e-5)
    torch.testing.assert_close(probe(3 * HIDDEN), probe(HIDDEN))


@pytest.mark.parametrize("rows", [2, 3, 16, 64])
def test_a_row_of_a_batch_gets_bit_for_bit_what_it_gets_alone(rows):
    hidden = torch.randn(rows, 4096, generator=GENERATOR)
    probe = ExitProbe(torch.randn(4096, generator=GENERATOR) / 64, 0.3)
    assert torch.equal(probe(hidden), torch.cat([probe(row) for row in hidden.split(1)]))


def test_broken_and_extreme_states():
    probe = ExitProbe(torch.full((12,), 1e4), 0.0)
    values = probe(torch.tensor([[math.nan] * 12, [1.0] * 12, [-1.0] * 12, [0.0] * 12]))
    assert (
        values[0].isnan()
        and not leaves(values[:1], 0.0, "probe")
        and values[1:].tolist() == pytest.approx([1.0, 0.0, 0.5])
    )


@pytest.mark.parametrize("l2", [0.01, 0.3])
def test_the_gradient_is_zero_at_the_fit(l2):
    """The problem is convex, so this is the minimum. The gradient is written out in fp64."""
    probe = fit_probe(HIDDEN, AGREES, l2=l2)
    x = HIDDEN.double() / HIDDEN.double().square().mean(dim=1, keepdim=True).sqrt()
    deviation = x.std(dim=0)
    error = probe(HIDDEN).double() - AGREES.double()
    standardised = (x - x.mean(dim=0)) / deviation

    def gradient(penalty):
        return standardised.T @ error / len(x) + 2 * penalty * probe.weight.double() * deviation

    assert error.mean().abs() < 1e-4 and gradient(l2).abs().max() < 1e-4
    assert gradient(2 * l2).abs().max() > 1e-3  # the control: with another penalty it is not zero


@pytest.mark.parametrize(
    ("agrees", "word"), [(torch.ones(4), "all"), (torch.zeros(4), "none"), (torch.ones(0), "none")]
)
def test_nothing_to_predict_is_an_error(agrees, word):
    with pytest.raises(ValueError, match=f"{word} of {len(agrees)} tokens agree .* give more or other prompts"):
        fit_probe(HIDDEN[: len(agrees)], agrees.bool())


def test_stored_and_read_it_is_bitwise_the_same():
    probes = {"a": fit_probe(HIDDEN, AGREES), "b": ExitProbe(torch.zeros(12), 1e-3)}
    again = from_file(json.loads(json.dumps(to_file(probes, {"data": "x"}))), hidden_size=12)
    for name, probe in probes.items():
        assert torch.equal(again[name].weight, probe.weight) and again[name].bias == probe.bias


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"a": {"weight": [0.0] * 3, "bias": 0.0}}, "\\[3\\] weights for a hidden size of 12"),
        ({"a": {"weight": [0.0] * 12}}, "damaged"),
        ({"a": {"weight": "x", "bias": 0.0}}, "damaged"),
        ({"a": {"weight": [math.inf] * 12, "bias": 0.0}}, "not finite"),
    ],
)
def test_damaged_probes_are_refused(stored, message):
    with pytest.raises(ValueError, match=f"probe of exit 'a': .*{message}"):
        from_file({"schema_version": 1, "probes": stored}, hidden_size=12)


def test_the_final_exit_reports_its_largest_probability():
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    torch.testing.assert_close(end_confidence("probe", logits), logits.softmax(dim=1).amax(dim=1))
