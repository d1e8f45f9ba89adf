# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Drafts chosen by value: a token is drafted where that gives the most expected tokens per second.

A cycle of self-speculation drafts tokens, verifies them, and ends with one token of the full model. Let S be the
probability that every draft so far is accepted. A draft with acceptance a adds S a expected tokens. At a price r of a
second in tokens, W(S) is what the rest of a cycle can still gain, and R(e, b, S) what a token can gain that has not
left before exit e and fell into bin b of the confidence at the exit before:

    W(S) = R(first, -, S) - r step
    R(e, b, S) = max(sum_b' P(b' | b) max(S a + W(S a) - r row_e, R(e + 1, b', S)) - r segment_e,  -r end_e)

with a = a(e, b') the acceptance. The two maxima are the decisions: leave at e or run on, and evaluate e or run to the
end. A cycle also gives its last token, so the best rate of tokens per second is the price at which 1 + W(1) = 0
(renewal reward); Newton's method finds it (Dinkelbach).

Acceptance by exit and bin, and P(b' | b), are counted over the sequence's own verified tokens. Counts begin with a
prior: an exit is right as often as it is confident, and the next exit may well be. A decision depends on the cost
table, on confidences, and on verified tokens, so never on the token that is drafted, on a draft behind a rejected one,
whose random numbers are used again, or on other sequences.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_ee.generation.cost_rule import CostTable
from nemo_ee.generation.policy import ExitPlan

_EDGES = (0.2, 0.4, 0.55, 0.7, 0.8, 0.88, 0.94, 0.98)  # between the bins of a confidence
_MIDDLES = tuple((low + high) / 2 for low, high in zip((0.0, *_EDGES), (*_EDGES, 1.0), strict=True))
_PRIOR_DRAFTS, _PRIOR_TOKENS = 1.0, 1.5  # weight of the prior, in drafts of a bin and in tokens after a bin
_CELLS = 12  # values of S above 0
_ROWS = 8  # rows of a verification that give the cost of one more
_MOST_DRAFTS = 8  # drafts that a plan looks ahead
_FIRST_PLAN, _GROWTH = 4, 1.5  # verified tokens at the first plan from counts, and from one plan to the next
_FIRST_TRIAL = 64  # verified tokens at the first trial; twice as many at each later one


class DraftCosts(NamedTuple):
    """Seconds of one sequence's token. The exits are those of a plan, in order.

    Attributes:
        step: what a token costs wherever it leaves.
        segments: from the exit before (or the embedding) to each exit, its evaluation included.
        ends: from the embedding, and from each exit, to the end of the stack, the final exit included.
        rows: one more token in a verification, from each exit.
    """

    step: float
    segments: Sequence[float]
    ends: Sequence[float]
    rows: Sequence[float]

    @classmethod
    def of(cls, table: CostTable, plan: ExitPlan, num_layers: int, length: int) -> DraftCosts:
        """The costs of a sequence of this length, alone in its session."""
        half, final = table.of_rows(1, length)(1), table.of_final(1)
        # Noise can make several rows quicker than one.
        more = max(0.0, table.of_rows(_ROWS, length)(1) - half) / (_ROWS - 1)
        more_final = max(0.0, table.of_final(_ROWS) - final) / (_ROWS - 1)
        stops, segments = [0, *(exit.point.stop for exit in plan.exits)], []
        for before, exit in zip(stops, plan.exits, strict=False):
            halves = exit.point.stop - before
            seconds = table.start + halves * half if halves else 0.0
            segments.append(seconds + table.of_exit(exit.point.name))
        left = [2 * num_layers - stop for stop in stops]
        return cls(
            table.start,  # bookkeeping around a forward pass is much like that around a segment
            segments,
            [table.start + halves * half + final for halves in left],
            [halves * more + more_final for halves in left[1:]],
        )


class Decisions(NamedTuple):
    """What to do at each exit, by bin of the confidence and cell of S (0 to `_CELLS`).

    Attributes:
        leaves: exit -> its own bin -> cell -> whether the token leaves.
        evaluates: exit -> bin at the exit before (any one at the first) -> cell -> whether the exit is evaluated.
    """

    leaves: list[list[list[bool]]]
    evaluates: list[list[list[bool]]]


def decide(
    acceptance: Tensor, following: Tensor, costs: DraftCosts, prices: Tensor, most_drafts: int
) -> tuple[Tensor, Decisions]:
    """Solve the recursion of the module for at most so many drafts.

    Args:
        acceptance: `[e, b]`, fp64, of a draft at each exit and bin.
        following: `[e, b, b]`, fp64, P(bin at this exit | bin at the one before); all rows of the first exit alike.
        costs: seconds.
        prices: `[n]`, fp64, tokens per second.
        most_drafts: number of drafts that a cycle may still have.

    Returns:
        `[n]`, 1 + W(1) at each price; and the decisions at the first price.
    """
    num_exits, num_bins = acceptance.shape
    prices = prices[:, None]
    survival = torch.arange(_CELLS + 1, dtype=torch.float64) / _CELLS
    # Linear between cells: W(S a) = W @ between.
    after = (acceptance[..., None] * survival).flatten(1)
    places = (after * _CELLS)[:, None]
    between = (1 - (places - torch.arange(_CELLS + 1)[:, None]).abs()).clamp(min=0)
    gains = [after[exit] - prices * costs.rows[exit] for exit in range(num_exits)]
    ends = [(-prices * seconds)[:, None] for seconds in costs.ends]
    segments = [(prices * seconds)[:, None] for seconds in costs.segments]
    rest, step = (ends[0][:, 0] - prices * costs.step).expand(len(prices), _CELLS + 1), prices * costs.step
    leaves, evaluates = [], []
    for drafts in range(most_drafts):
        onwards = ends[-1]
        for exit in reversed(range(num_exits)):
            leaving = (gains[exit] + rest @ between[exit]).view(len(prices), num_bins, _CELLS + 1)
            evaluated = following[exit] @ torch.maximum(leaving, onwards) - segments[exit]
            if drafts == most_drafts - 1:
                leaves.insert(0, (leaving > onwards)[0].tolist())
                evaluates.insert(0, (evaluated > ends[exit])[0].tolist())
            onwards = torch.maximum(evaluated, ends[exit])
        rest = onwards[:, 0] - step
    return 1 + rest[:, -1], Decisions(leaves, evaluates)


class _Evaluation(NamedTuple):
    """An exit at a token: its number, the bins at the exit before and there, and its most likely token, `[]`; None:
    the token left."""

    exit: int
    before: int
    bin: int
    best: Tensor | None


class DraftValue:
    """The drafts of one sequence.

    Args:
        table: the costs of a sequence alone.
        plan: its exits.
        num_layers: number of the model's layers.
        length: its tokens so far.
    """

    def __init__(self, table: CostTable, plan: ExitPlan, num_layers: int, length: int) -> None:
        self._table, self._exit_plan, self._num_layers = table, plan, num_layers
        self._index = {exit.point.name: index for index, exit in enumerate(plan.exits)}
        bins, exits = range(len(_MIDDLES)), range(len(plan.exits))
        # Accepted and all drafts of [exit][bin]; tokens of [exit][bin before][bin].
        self._accepted = [[_PRIOR_DRAFTS * middle for middle in _MIDDLES] for _ in exits]
        self._drafted = [[_PRIOR_DRAFTS for _ in bins] for _ in exits]
        even = _PRIOR_TOKENS / len(bins)
        # An exit that seems useless is never evaluated, and its counts stay: so the prior is optimistic.
        optimistic = [even / 2] * (len(bins) - 1) + [even / 2 + _PRIOR_TOKENS / 2]
        self._tokens = [[list(optimistic if exit else [even] * len(bins)) for _ in bins] for exit in exits]
        self._evaluations: list[list[_Evaluation]] = []  # of each token since the last verification
        self._survival, self._cell = 1.0, _CELLS
        self._may_evaluate = self._is_trial = self._trial_is_due = False
        self._num_verified, self._next_plan, self._next_trial = 0, _FIRST_PLAN, _FIRST_TRIAL
        self._price = 0.0
        self._plan(length)

    def start_token(self) -> None:
        """A new token runs."""
        self._evaluations.append([])
        self._may_evaluate = True
        self._is_trial, self._trial_is_due = self._trial_is_due, False

    def evaluates(self, exit: str) -> bool:
        """Whether the newest token is evaluated at this exit, where it has not left before."""
        if self._may_evaluate and not self._is_trial:
            before = self._evaluations[-1]
            bin_before = before[-1].bin if before else 0
            self._may_evaluate = self._decisions.evaluates[self._index[exit]][bin_before][self._cell]
        return self._may_evaluate

    def leaves(self, exit: str, confidence: float, logits: Tensor) -> bool:
        """Whether the newest token leaves at this exit. `logits`: `[v]`, the exit's."""
        index, own, before = self._index[exit], bisect_left(_EDGES, confidence), self._evaluations[-1]
        left = self._decisions.leaves[index][own][self._cell]
        best = None if left else logits.argmax()
        before.append(_Evaluation(index, before[-1].bin if before else 0, own, best))
        if left:
            self._survival *= self._accepted[index][own] / self._drafted[index][own]
            self._cell = round(self._survival * _CELLS)
        return left

    def learn(self, logits: Tensor, accepted: Sequence[bool], length: int) -> None:
        """Count what was evaluated since the last verification.

        Args:
            logits: `[m, v]`, the final exit's for the first m of these tokens; what the others saw is dropped.
            accepted: whether each draft among them was accepted.
            length: tokens of the sequence.
        """
        tokens = self._evaluations[: logits.shape[0]]
        best = logits.argmax(dim=-1).tolist() if any(tokens) else ()
        for token, own in enumerate(tokens):
            for exit, before, bin, theirs in own:
                # Where no token was drafted, the most likely ones say whether it would have been accepted.
                agrees = accepted[token] if theirs is None else int(theirs) == best[token]
                self._accepted[exit][bin] += agrees
                self._drafted[exit][bin] += 1
                for row in self._tokens[exit] if exit == 0 else [self._tokens[exit][before]]:
                    row[bin] += 1
        self._num_verified += len(tokens)
        self._evaluations, self._survival, self._cell = [], 1.0, _CELLS
        if self._num_verified >= self._next_plan:
            self._next_plan = max(self._next_plan + _FIRST_PLAN, int(self._next_plan * _GROWTH))
            self._plan(length)
        if self._num_verified >= self._next_trial:
            # A token is evaluated whatever the decisions, because acceptance may change along a text.
            self._trial_is_due, self._next_trial = True, 2 * self._next_trial

    def _plan(self, length: int) -> None:
        """Decide anew, by the counts."""
        costs = DraftCosts.of(self._table, self._exit_plan, self._num_layers, length)
        acceptance = torch.tensor(self._accepted, dtype=torch.float64) / torch.tensor(self._drafted)
        following = torch.tensor(self._tokens, dtype=torch.float64)
        following /= following.sum(dim=-1, keepdim=True)
        most, turns = self._exit_plan.max_pending_tokens, 1
        most = _MOST_DRAFTS if most is None else max(1, min(most, _MOST_DRAFTS))
        if not self._price:
            self._price, turns = 1 / max(costs.step + costs.ends[0], 1e-9), 4  # full depth
        for _ in range(turns):
            # The value is piecewise linear in the price, so two prices give the slope.
            prices = torch.tensor([self._price, self._price * 1.001], dtype=torch.float64)
            value, self._decisions = decide(acceptance, following, costs, prices, most)
            at, beside = value.tolist()
            if beside < at:  # a pass takes some time
                self._price *= 1 - 0.001 * at / (beside - at)
