# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The guarantee through the functions that calibrate, on 1,000 samples of populations whose risks are known.

Losses are 0 or 1, where the p-value is about three to five times larger than the exact one, and the first policy that
must not be certified lies just above epsilon: no population comes nearer to breaking the promise. Statistical: so many
violations that delta would give them a chance below 1e-3 are too many.
"""

from __future__ import annotations

import pytest
import torch

from nemo_ee.calibration.learn_then_test import fastest, learn_then_test, pareto_path, split_prompts
from nemo_ee.calibration.risk_control import binomial_cdf, hoeffding_bentkus_p_value

EPSILON, DELTA = 0.1, 0.1
NUM_SAMPLES, NUM_PROMPTS = 1000, 150
JUST_ABOVE = EPSILON + 1e-6


def too_many(violations: int) -> bool:
    return 1 - binomial_cdf(violations - 1, NUM_SAMPLES, DELTA) < 1e-3


def test_split_prompts():
    found_on, tested = split_prompts(10, 0.3, seed=1)
    assert len(found_on) == 3 and sorted(found_on + tested) == list(range(10)), "every prompt on one side"
    assert split_prompts(10, 0.3, seed=2)[0] != found_on and split_prompts(10, 0.3, seed=1)[0] == found_on


def violations_along_a_path() -> int:
    """One threshold for all exits. A prompt that a policy loses on, all faster ones lose on too."""
    risks = {0.9: 0.02, 0.8: 0.05, 0.7: JUST_ABOVE, 0.6: 0.2}
    generator = torch.Generator().manual_seed(1)
    count = 0
    for _ in range(NUM_SAMPLES):
        coins = torch.rand(NUM_PROMPTS, generator=generator, dtype=torch.float64)

        def measure(thresholds, coins=coins):
            return (coins < risks[thresholds[0]]).double(), 12 * thresholds[0]

        path = [(one,) for one in risks]
        chosen = fastest(learn_then_test(path, measure, epsilon=EPSILON, delta=DELTA, all_of_it=False))
        count += chosen is not None and risks[chosen.thresholds[0]] > EPSILON
    return count


def violations_of_a_split(disjoint: bool = True) -> int:
    """A threshold for each exit: never leaving has no risk, every other policy its own coins just above epsilon."""
    generator = torch.Generator().manual_seed(2)
    grid, never = [0.75, 0.5, 0.25], 1.0
    policies = [(a, b) for a in (never, *grid) for b in (never, *grid)]
    count = 0
    for sample in range(NUM_SAMPLES):
        coins = torch.rand(len(policies), 2 * NUM_PROMPTS, generator=generator, dtype=torch.float64)
        lost = (coins < JUST_ABOVE).double()
        lost[policies.index((never, never))] = 0.0

        def measure_on(rows, lost=lost):
            return lambda thresholds: (lost[policies.index(tuple(thresholds)), rows], 6 * sum(thresholds))

        found_on, tested = split_prompts(2 * NUM_PROMPTS, 0.5, seed=sample)
        path = pareto_path(grid, 2, never, measure_on(found_on if disjoint else tested))
        results = learn_then_test(path, measure_on(tested), epsilon=EPSILON, delta=DELTA, all_of_it=False)
        chosen = fastest(results)
        assert chosen is not None, "never leaving is certified"
        count += chosen.thresholds != (never, never)
    return count


@pytest.fixture
def p_values_a_fifth_as_large(monkeypatch):
    monkeypatch.setattr(
        "nemo_ee.calibration.learn_then_test.hoeffding_bentkus_p_value",
        lambda *own: hoeffding_bentkus_p_value(*own) / 5,
    )


def test_the_promise_holds_along_a_path():
    count = violations_along_a_path()
    assert 0 < count and not too_many(count)


def test_control_smaller_p_values_break_it(p_values_a_fifth_as_large):
    assert too_many(violations_along_a_path())


@pytest.mark.slow_unit
def test_the_promise_holds_for_a_split():
    count = violations_of_a_split()
    assert 0 < count and not too_many(count)


@pytest.mark.slow_unit
def test_control_an_order_found_on_the_prompts_that_test_breaks_it():
    assert too_many(violations_of_a_split(disjoint=False))


@pytest.mark.slow_unit
def test_control_smaller_p_values_break_the_split(p_values_a_fifth_as_large):
    assert too_many(violations_of_a_split())
