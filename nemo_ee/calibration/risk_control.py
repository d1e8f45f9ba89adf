# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Risk control: p-values from n bounded losses for "a policy's expected loss is at most epsilon", and their tests.

Learn then Test (Angelopoulos et al., arXiv 2110.01052): each policy has the null hypothesis "its risk is greater than
epsilon"; rejecting it certifies the policy. The p-value of a policy with mean loss r over n independent prompts is
Hoeffding's and Bentkus' (section 3.1.1 there):

    p = min( exp(-n h(min(r, epsilon), epsilon)),  e P[Bin(n, epsilon) <= ceil(n r)] )
    h(a, b) = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b))

Fixed-sequence testing: nulls are tested in an order that does not depend on the losses, each at level delta, up to the
first that is not rejected. The chance that any true null is rejected is then at most delta for any number of policies,
so any of the rejected ones may be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def hoeffding_bentkus_p_value(risk: float, epsilon: float, num_prompts: int) -> float:
    """The p-value of "the expected loss is greater than epsilon".

    Args:
        risk: mean of the losses, each in [0, 1].
        epsilon: the tolerated risk, in (0, 1).
        num_prompts: number of independent losses, at least 1.

    Returns:
        A number in (0, 1]; 1.0 if the mean loss is not below epsilon.
    """
    assert 0 <= risk <= 1 and 0 < epsilon < 1 and num_prompts >= 1, f"{risk}, {epsilon}, {num_prompts}"
    if risk >= epsilon:
        return 1.0
    hoeffding = math.exp(-num_prompts * _divergence(risk, epsilon))
    bentkus = math.e * binomial_cdf(math.ceil(num_prompts * risk), num_prompts, epsilon)
    return min(1.0, hoeffding, bentkus)


def _divergence(a: float, b: float) -> float:
    """Kullback-Leibler divergence of two coins, in nats."""
    first = a * math.log(a / b) if a > 0 else 0.0
    second = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return first + second


def binomial_cdf(successes: int, trials: int, probability: float) -> float:
    """P[Bin(trials, probability) <= successes], summed in logarithms."""
    if successes >= trials:
        return 1.0
    win, lose, whole = math.log(probability), math.log1p(-probability), math.lgamma(trials + 1)
    terms = (
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * win + (trials - k) * lose)
        for k in range(successes + 1)
    )
    return min(1.0, math.fsum(terms))


def fewest_prompts(epsilon: float, delta: float) -> int:
    """The least number of prompts with which a policy without any loss is certified."""
    return math.ceil(math.log(delta) / math.log1p(-epsilon))


def fixed_sequence(p_values: Iterable[float], delta: float) -> int:
    """Number of leading hypotheses rejected at family-wise level delta. Later p-values are not read."""
    rejected = 0
    for p_value in p_values:
        if p_value > delta:
            break
        rejected += 1
    return rejected


def pareto_order(risks: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Policies that no other policy beats in both risk and cost, from the least risk to the least cost.

    Pareto testing (Laufer-Goldshtein et al., arXiv 2210.07913): `fixed_sequence` may test an order on prompts that
    were not used to find it.

    Args:
        risks, costs: risk and cost of each policy on the prompts set aside to find the order.

    Returns:
        Indices of the policies; one index of equal ones.
    """
    kept: list[int] = []
    cheapest = math.inf
    for index in sorted(range(len(risks)), key=lambda one: (risks[one], costs[one], one)):
        if costs[index] < cheapest:
            kept.append(index)
            cheapest = costs[index]
    return kept


def bounded_losses(losses: Tensor) -> Tensor:
    """Check losses and convert them to the fp64 of `hoeffding_bentkus_p_value`.

    Args:
        losses: `[n]`, any floating dtype.

    Returns:
        `[n]`, fp64.

    Raises:
        ValueError: a loss is not a number in [0, 1], or there is no loss.
    """
    losses = losses.double()
    if not losses.numel():
        raise ValueError("there are no losses to test; give prompts")
    outside = losses[~((losses >= 0) & (losses <= 1))]
    if outside.numel():
        raise ValueError(
            f"the guarantee needs losses in [0, 1], but one is {outside[0].item()}; clip and scale the risk to [0, 1]"
        )
    return losses


def mean_loss(losses: Tensor) -> float:
    """The mean of `bounded_losses`, at most 1 also after rounding."""
    return min(1.0, torch.mean(bounded_losses(losses)).item())
