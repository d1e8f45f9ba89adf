# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Forced decoding: given text runs token by token under an exit policy, each token scored at the exit it left at.

    perplexity = exp(-sum of ln p / tokens)

The work of a step is that of generation (the staged forward with pending tokens, an argmax and ln p); only the next
token is given instead of chosen. So speed and quality are measured on the same tokens. For the choice of a policy one
pass at full depth (`trace`) evaluates every exit at every token, which gives the quality and the cost of any policy
(`nemo_ee.planning.threshold_search`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_ee.evaluation.touched_weights import CountingModel, head_weights
from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.generation.exit_trace import ExitTrace, TracePass
from nemo_ee.generation.forward_rows import TokenInput
from nemo_ee.generation.policy import ExitPolicy, plan_exits
from nemo_ee.generation.staged_forward import StagedForward
from nemo_ee.planning.threshold_search import NEVER, Choice, DecodingCosts, ThresholdSearch
from nemo_ee.runtime.model import RuntimeModel

FILLED = 5  # rows of a step that runs pending tokens too


@dataclass(frozen=True)
class Forced:
    """Results of one window. For each token after the first: ln p at the exit it left at, that exit's choice and its
    layer; and the number of weights that were read."""

    logprobs: list[float]
    choices: list[int]
    layers: list[int]
    touched: int


@torch.inference_mode()
def force(model: CountingModel, tokens: Sequence[int], policy: ExitPolicy | None) -> Forced:
    """Run `tokens` one by one; the first is read from the final exit, as a prompt is. `policy`: None = full depth."""
    plan = plan_exits("full" if policy is None else "early_exit", policy, model.exits, model.num_layers)
    forward = StagedForward(model, model.new_cache(1, len(tokens), plan.exit_names))
    forward.admit(0, plan)
    before, result = model.touched, Forced([], [], [], 0)
    for position, (token, target) in enumerate(itertools.pairwise(tokens)):
        cap = plan.max_pending_tokens
        allow_exit = position > 0 and bool(plan.exits) and (cap is None or forward.num_pending(0) < cap)
        (output,) = forward.step({0: TokenInput(position, (token,), allow_exit)})
        row = output.logits[0]
        result.logprobs.append(float(row[target] - row.logsumexp(dim=0)))
        result.choices.append(int(row.argmax()))
        result.layers.append(output.layer)
    return Forced(result.logprobs, result.choices, result.layers, model.touched - before)


def perplexity(windows: Sequence[Forced]) -> float:
    """Perplexity of all tokens of some windows."""
    return math.exp(-math.fsum(itertools.chain.from_iterable(own.logprobs for own in windows)) / _count(windows))


def agreement(windows: Sequence[Forced], full: Sequence[Forced]) -> float:
    """Share of the tokens at which the exit chooses the final exit's token."""
    pairs = zip(windows, full, strict=True)
    same = sum(a == b for own, other in pairs for a, b in zip(own.choices, other.choices, strict=True))
    return same / _count(windows)


def mean_depth(windows: Sequence[Forced]) -> float:
    """Mean number of layers below the exits that tokens left at."""
    return sum(sum(own.layers) for own in windows) / _count(windows)


def _count(windows: Sequence[Forced]) -> int:
    return sum(len(own.logprobs) for own in windows)


def trace(model: Any, windows: Sequence[Sequence[int]]) -> ExitTrace:
    """Every exit at every token of some windows, by its largest probability."""
    passes = TracePass(model, None, "max_probability")
    return ExitTrace.join([passes.run([own], [1]) for own in windows])


def excess_nats(trace: ExitTrace) -> torch.Tensor:
    """`[n, t, e + 1]`, fp64: nats of the text's token above the final exit's, where it is read at each exit."""
    return (trace.logprobs[..., -1:] - trace.logprobs).double()


def threshold_search(trace: ExitTrace, losses: torch.Tensor, costs: DecodingCosts) -> ThresholdSearch:
    """The search on a trace. The first token of a window is the final exit's under every policy and does not count.

    Args:
        trace: see `trace`.
        losses: `[n, t, e + 1]`, see `ThresholdSearch`; such as `excess_nats`.
        costs: costs of the model's parts.
    """
    scored = trace.valid.clone()
    scored[:, 0] = False
    names = [point.name for point in trace.exits]
    stops = [*(point.stop for point in trace.exits), 2 * trace.num_layers]
    return ThresholdSearch(names, stops, trace.confidences[scored], losses[scored], costs)


def policy_of(choice: Choice) -> ExitPolicy:
    """The policy with these thresholds."""
    return ExitPolicy(choice.thresholds or NEVER, active=tuple(choice.thresholds))


def measured_costs(model: Any) -> DecodingCosts:
    """Seconds of the parts of a model in a short text, on one token; both halves of a layer count the same."""
    length = min(256, model.max_positions)
    names = tuple(point.name for point in model.exits)
    cache, bottom, calls = model.new_cache(1, length, names), 2 * model.num_layers, {}
    for rows in (1, FILLED):
        positions = TokenPositions.of({0: range(length - rows, length)})
        hidden = model.embed(torch.ones(rows, dtype=torch.long), positions)
        calls[rows] = lambda hidden=hidden, positions=positions: model.run(hidden, positions, 0, bottom, cache)
        if rows == 1:
            for name in (*names, None):
                calls[name] = lambda name=name, hidden=hidden, positions=positions: (
                    model.exit_logits(name, hidden, positions, cache).softmax(dim=1).max().item()
                )
    # The least of many, in turns, so that the choice does not depend on other work of the machine.
    costs = dict.fromkeys(calls, math.inf)
    for _ in range(100):
        for name, call in calls.items():
            start = now()
            call()
            costs[name] = min(costs[name], now() - start)
    one, several = costs.pop(1) / bottom, costs.pop(FILLED) / bottom
    return DecodingCosts(one, one, max(0.0, several - one) / (FILLED - 1), costs)


def touched_costs(model: RuntimeModel) -> DecodingCosts:
    """The weights that the parts read: no time of an engine can be less than theirs (`touched_weights`)."""
    a = model.architecture
    return DecodingCosts(a.attention_size, a.mlp_size, 0.0, head_weights(model.config))


def now() -> float:
    """Seconds of a clock: CPU time, which other processes disturb less, as long as one thread does the work."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
