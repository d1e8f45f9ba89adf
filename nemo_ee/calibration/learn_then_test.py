# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Learn then Test over exit policies: measure them in a fixed order, certify them, and choose the fastest.

The unit is a prompt; its loss is in [0, 1]. For policy j the null is "expected loss > epsilon", tested by
`hoeffding_bentkus_p_value` in fixed sequence (arXiv 2110.01052; for early exit CALM, arXiv 2207.07061, section 4).
With probability at least 1 - delta over the prompts, every certified policy has a risk of at most epsilon.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_ee.calibration.risk_control import fixed_sequence, hoeffding_bentkus_p_value, mean_loss, pareto_order
from nemo_ee.generation.exit_trace import ExitTrace

# Most policies that `split` compares to find an order.
MOST_CANDIDATES = 4096


@dataclasses.dataclass(frozen=True)
class PolicyResult:
    """Result of one policy on the test prompts.

    Attributes:
        thresholds: one threshold for each exit, in the model's order.
        risk: mean loss.
        p_value: p-value of the null hypothesis "the risk is greater than epsilon".
        mean_depth: layers per token.
        certified: whether the null was rejected in the sequence.
    """

    thresholds: tuple[float, ...]
    risk: float
    p_value: float
    mean_depth: float
    certified: bool = False


Measure = Callable[[Sequence[float]], tuple[Tensor, float]]  # thresholds -> losses `[n]` in [0, 1], mean depth


def learn_then_test(
    path: Sequence[Sequence[float]], measure: Measure, *, epsilon: float, delta: float, all_of_it: bool
) -> list[PolicyResult]:
    """Test policies in the order of `path`.

    Args:
        path: thresholds of each policy. Their order must not depend on the prompts that `measure` uses.
        measure: losses of every prompt under a policy, and its mean depth.
        all_of_it: whether policies after the first failure are measured too, for a picture.

    Raises:
        ValueError: a loss outside of [0, 1].
    """
    assert path, "a test needs at least one policy"
    results: list[PolicyResult] = []

    def tested() -> Iterable[float]:
        for thresholds in path:
            losses, depth = measure(thresholds)
            risk = mean_loss(losses)
            p_value = hoeffding_bentkus_p_value(risk, epsilon, len(losses))
            results.append(PolicyResult(tuple(thresholds), risk, p_value, depth))
            yield p_value

    p_values = tested()
    num_certified = fixed_sequence(p_values, delta)
    for _ in p_values if all_of_it else ():
        pass
    return [dataclasses.replace(one, certified=i < num_certified) for i, one in enumerate(results)]


def fastest(results: Sequence[PolicyResult]) -> PolicyResult | None:
    """The certified policy with the least depth, the safer one of two equally deep ones; None = full depth."""
    return min((one for one in results if one.certified), key=lambda one: one.mean_depth, default=None)


def table_losses(table: ExitTrace, choice: torch.LongTensor, risk: str, clip_nats: float) -> Tensor:
    """Losses of every prompt `[n]`, fp64, in [0, 1], for a risk that a table can simulate.

    Args:
        risk: `disagreement`, or `nll_excess`: the mean excess in nats, clipped to 0..`clip_nats` and divided by it.
    """
    if risk == "disagreement":
        return table.disagreement(choice)
    assert risk == "nll_excess", risk
    return (table.nll_excess(choice) / clip_nats).clamp(0.0, 1.0)


def measure_on(table: ExitTrace, risk: str, clip_nats: float, max_pending_tokens: int | None) -> Measure:
    """A `Measure` that simulates on a table."""

    def measure(thresholds: Sequence[float]) -> tuple[Tensor, float]:
        choice = table.choices(thresholds, max_pending_tokens)
        tokens = table.valid.sum(dim=1)
        depth = (table.depth(choice) * tokens).sum() / tokens.sum()
        return table_losses(table, choice, risk, clip_nats), depth.item()

    return measure


def one_threshold_path(grid: Sequence[float], num_exits: int) -> list[tuple[float, ...]]:
    """One policy per value of the grid, with the same threshold for every exit."""
    return [(value,) * num_exits for value in grid]


def split_prompts(num_prompts: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Random split into prompts that order the policies and prompts that test them. Both are ascending indices."""
    shuffled = random.Random(seed).sample(range(num_prompts), num_prompts)
    set_aside = round(share * num_prompts)
    return sorted(shuffled[:set_aside]), sorted(shuffled[set_aside:])


def pareto_path(grid: Sequence[float], num_exits: int, never: float, measure: Measure) -> list[tuple[float, ...]]:
    """A path of policies with a threshold per exit, found on prompts that the test does not use.

    Args:
        grid: thresholds to combine; `never` is added to them.
        never: the threshold at which no token leaves.
        measure: losses and mean depth on the prompts set aside.

    Raises:
        ValueError: no prompts were set aside.
    """
    assert not list(candidate_problems(grid, num_exits, never)), "the caller reports these before the long work"
    candidates = list(itertools.product(_with_never(grid, never), repeat=num_exits))
    measured = [measure(candidate) for candidate in candidates]
    order = pareto_order([mean_loss(losses) for losses, _ in measured], [depth for _, depth in measured])
    return [candidates[index] for index in order]


def candidate_problems(grid: Sequence[float], num_exits: int, never: float) -> Iterator[str]:
    """Problem that keeps `pareto_path` from comparing all combinations of these thresholds."""
    values = len(_with_never(grid, never))
    if values**num_exits > MOST_CANDIDATES:
        yield (
            f"split: {values} thresholds (the grid and one that is never met) for each of {num_exits} exits are "
            f"{values**num_exits} policies, more than {MOST_CANDIDATES}; give a grid of at most "
            f"{_most_values(num_exits) - 1}, or fewer exits"
        )


def _with_never(grid: Sequence[float], never: float) -> list[float]:
    return list(dict.fromkeys([never, *grid]))


def _most_values(num_exits: int) -> int:
    """The largest number whose `num_exits`-th power is at most `MOST_CANDIDATES`."""
    return max(values for values in range(1, MOST_CANDIDATES + 1) if values**num_exits <= MOST_CANDIDATES)


def divergence(own: Sequence[Sequence[int]], full: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Divergence of freely decoded answers from the full model's.

    Args:
        own, full: new tokens of each prompt, decoded with the policy and by the full model.

    Returns:
        num_prompts; identical: share of answers that are the same; differing: share of positions (of the longer
        answer) with another token; first_difference: mean position of the first differing token over
            the answers that differ (None = none differs).
    """
    firsts, differing, positions, identical = [], 0, 0, 0
    for ours, theirs in zip(own, full, strict=True):
        pairs = list(itertools.zip_longest(ours, theirs))
        wrong = [index for index, (a, b) in enumerate(pairs) if a != b]
        identical += not wrong
        firsts += wrong[:1]
        differing, positions = differing + len(wrong), positions + len(pairs)
    return {
        "num_prompts": len(own),
        "identical": identical / len(own),
        "differing": differing / positions,
        "first_difference": sum(firsts) / len(firsts) if firsts else None,
    }
