# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The p-values against scipy's binomial distribution; the guarantee on populations whose risks are known."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_ee.calibration.risk_control import (
    binomial_cdf,
    bounded_losses,
    fewest_prompts,
    fixed_sequence,
    hoeffding_bentkus_p_value,
    mean_loss,
    pareto_order,
)

EPSILON, DELTA = 0.1, 0.1


@pytest.mark.parametrize("trials", [1, 7, 100, 5000])
@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.97])
def test_the_binomial_sum_is_scipy_s(trials, probability):
    stats = pytest.importorskip("scipy.stats")
    for successes in sorted({0, trials // 20, trials // 3, trials - 1, trials}):
        expected = stats.binom.cdf(successes, trials, probability)
        assert binomial_cdf(successes, trials, probability) == pytest.approx(expected, rel=1e-8, abs=1e-300)


@pytest.mark.parametrize(
    ("risk", "epsilon", "n"), [(0.0, 0.1, 50), (0.03, 0.1, 200), (0.09, 0.1, 10), (0.2, 0.3, 999)]
)
def test_p_values_are_the_smaller_of_two_bounds_written_out(risk, epsilon, n):
    """Hoeffding's through scipy's relative entropy, Bentkus' through its binomial distribution."""
    stats, special = pytest.importorskip("scipy.stats"), pytest.importorskip("scipy.special")
    entropy = special.rel_entr(risk, epsilon) + special.rel_entr(1 - risk, 1 - epsilon)
    bentkus = math.e * stats.binom.cdf(math.ceil(n * risk), n, epsilon)
    expected = min(1.0, math.exp(-n * entropy), bentkus)
    assert hoeffding_bentkus_p_value(risk, epsilon, n) == pytest.approx(expected, rel=1e-9)


def test_p_values_fall_with_more_prompts_and_less_risk():
    assert hoeffding_bentkus_p_value(0.1, 0.1, 1000) == hoeffding_bentkus_p_value(0.9, 0.1, 1000) == 1.0
    by_number = [hoeffding_bentkus_p_value(0.02, 0.1, n) for n in (50, 100, 200, 400)]
    by_risk = [hoeffding_bentkus_p_value(risk, 0.1, 200) for risk in (0.08, 0.06, 0.04, 0.0)]
    assert by_number == sorted(by_number, reverse=True) and by_risk == sorted(by_risk, reverse=True)
    assert 0 < by_risk[-1] < by_risk[0] < 1


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 0.1), (0.05, 0.01), (0.5, 0.2)])
def test_the_fewest_prompts_are_the_fewest(epsilon, delta):
    fewest = fewest_prompts(epsilon, delta)
    assert hoeffding_bentkus_p_value(0.0, epsilon, fewest) <= delta * (1 + 1e-9)
    assert fewest == 1 or hoeffding_bentkus_p_value(0.0, epsilon, fewest - 1) > delta


def test_the_sequence_ends_at_the_first_that_is_not_rejected():
    assert fixed_sequence([0.01, 0.1, 0.11, 0.0], 0.1) == 2
    assert fixed_sequence([0.2, 0.0], 0.1) == 0 and fixed_sequence([], 0.1) == 0

    def lazily():
        yield from (0.0, 0.5)
        raise AssertionError("a policy after the first failure was measured")

    assert fixed_sequence(lazily(), 0.1) == 1


def test_pareto_order():
    risks, costs = [0.0, 0.1, 0.1, 0.2, 0.2, 0.3], [12, 9, 10, 9, 5, 6]
    assert pareto_order(risks, costs) == [0, 1, 4]


def test_losses_outside_of_0_to_1_are_refused():
    for wrong in ([0.5, 1.5], [-0.1], [math.nan]):
        with pytest.raises(ValueError, match=r"losses in \[0, 1\].*clip and scale"):
            bounded_losses(torch.tensor(wrong))
    with pytest.raises(ValueError, match="no losses"):
        bounded_losses(torch.tensor([]))
    assert mean_loss(torch.tensor([0.0, 1.0, 1.0])) == pytest.approx(2 / 3)


# -- the guarantee --------------------------------------------------------------------------------------------------

PROMPTS = 150
RISKS = [0.02 + 0.004 * j for j in range(45)]


def resample(generator: torch.Generator) -> torch.Tensor:
    """`[policies, prompts]` losses of a population where policy j has risk `RISKS[j]`.

    A loss is the mean of two coins that all policies share, each calling another share of them lost: neither binary
    nor independent across policies, as with exits.
    """
    coins = torch.rand(PROMPTS, 2, generator=generator, dtype=torch.float64)
    return (coins[None] < torch.tensor(RISKS, dtype=torch.float64)[:, None, None]).double().mean(dim=2)


def violations(choose) -> int:
    """How many of 1,000 resamples make `choose` (losses -> a policy's number, -1 = none) pick one too risky."""
    generator = torch.Generator().manual_seed(1)
    chosen = [choose(resample(generator)) for _ in range(1000)]
    return sum(number >= 0 and RISKS[number] > EPSILON + 1e-12 for number in chosen)


def too_many(count: int) -> bool:
    """Whether so many violations in 1,000 would have a chance below 1e-3 if each had the chance delta."""
    return 1 - binomial_cdf(count - 1, 1000, DELTA) < 1e-3


def learn_then_test(losses: torch.Tensor) -> int:
    risks = (mean_loss(own) for own in losses)
    return fixed_sequence((hoeffding_bentkus_p_value(risk, EPSILON, PROMPTS) for risk in risks), DELTA) - 1


def smallest_sample_risk(losses: torch.Tensor) -> int:
    """Control: the fastest policy whose mean loss is at most epsilon."""
    return max((index for index, own in enumerate(losses) if own.mean() <= EPSILON), default=-1)


@pytest.mark.slow_unit
def test_the_risk_holds_as_often_as_promised():
    assert not too_many(violations(learn_then_test))


def test_control_choosing_by_the_mean_loss_breaks_the_promise():
    assert too_many(violations(smallest_sample_risk))


def test_something_is_certified():
    """Control: never certifying anything would keep every promise."""
    generator = torch.Generator().manual_seed(2)
    chosen = [learn_then_test(resample(generator)) for _ in range(100)]
    assert sum(number >= 1 for number in chosen) > 90
