# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Scoring given text: the log-probability of each token at the exit at which it would leave.

Early exit changes where a token is read, but no hidden state: pending tokens are computed later with the same values.
So given text runs once at full depth, exits are evaluated at many rows at a time, and each sequence's decisions are
then replayed in order (they depend on earlier ones only through the cap on pending tokens). The result equals that of
decoding the text token by token.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence

import torch

from nemo_ee.exits.confidence import end_confidence, exit_confidence, leaves
from nemo_ee.exits.criteria import PROBE
from nemo_ee.generation.decoding_model import DecodingModel, ExitPoint
from nemo_ee.generation.policy import ExitPlan
from nemo_ee.generation.stats import FINAL, DecodingStats, TokenEvent, exit_histogram, mean_depth
from nemo_ee.generation.teacher_forcing import TeacherForcedPass


@dataclasses.dataclass(frozen=True)
class ScoreResult:
    """The result of `EarlyExitEngine.score`. Outer tuples: one entry per sequence; inner tuples: one per scored token.

    Attributes:
        logprobs: ln p of each scored token at the exit it is read from.
        exits: name of that exit; None = the final exit.
        is_greedy: whether the token is that exit's most likely one.
        events: the same as events, sequence by sequence.
        stats: sums over the events.
    """

    logprobs: tuple[tuple[float, ...], ...]
    exits: tuple[tuple[str | None, ...], ...]
    is_greedy: tuple[tuple[bool, ...], ...]
    events: tuple[TokenEvent, ...]
    stats: DecodingStats


@dataclasses.dataclass(frozen=True)
class _ExitPrediction:
    """The prediction of one exit after one row."""

    point: ExitPoint | None  # None = the final exit
    confidence: float
    logprob: float
    is_greedy: bool


class Scorer:
    """Scores a batch of given text in one forward pass.

    Args:
        model: the model.
        plan: the exits to evaluate, or the one exit to read every token from.
    """

    def __init__(self, model: DecodingModel, plan: ExitPlan) -> None:
        self.model, self.plan = model, plan
        self.exits, self.criterion, self.max_pending_tokens = plan.exits, plan.criterion, plan.max_pending_tokens
        self.evaluations = dict.fromkeys((*plan.exit_names, FINAL), 0)

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]], num_context: Sequence[int]) -> ScoreResult:
        """Score `sequences[i][num_context[i]:]`; a sequence is longer than its context of at least 1 token."""
        static = self.plan.end
        end = 2 * self.model.num_layers if static is None else static.stop
        text = TeacherForcedPass(self.model, sequences, self.plan.exit_names)
        first_rows, lengths = text.first_rows, [len(own) - 1 for own in sequences]
        # The last row of a context is read from the final exit, as after a prompt. Later rows evaluate the exits.
        candidates = [
            row + position
            for row, length, context in zip(first_rows, lengths, num_context, strict=True)
            for position in range(context, length)
        ]
        early: dict[int, _ExitPrediction] = {}
        for stop in text.run_to({*(exit.point.stop for exit in self.exits), end}):
            for exit in self.exits:
                if exit.point.stop == stop:
                    undecided = [row for row in candidates if row not in early]
                    early |= self._evaluate(text, exit.point, exit.threshold, undecided)
        final_rows = []
        for row, length, context in zip(first_rows, lengths, num_context, strict=True):
            final_rows += self._read_from_final(row, context, length, early)
        final = self._evaluate(text, static, None, final_rows)
        predictions = [
            [(early | final)[row + position] for position in range(context - 1, length)]
            for row, length, context in zip(first_rows, lengths, num_context, strict=True)
        ]
        return self._result(sequences, num_context, predictions, len(text.positions) * end / 2)

    def _read_from_final(
        self, first_row: int, context: int, length: int, early: dict[int, _ExitPrediction]
    ) -> list[int]:
        """Replay one sequence's decisions. Rows that the cap forces to full depth are removed from `early`."""
        rows, pending = [first_row + context - 1], 0
        for row in range(first_row + context, first_row + length):
            forced = self.max_pending_tokens is not None and pending >= self.max_pending_tokens
            if forced:
                early.pop(row, None)
            if row not in early:
                rows.append(row)
            # A token that reaches the end of the stack takes the pending ones with it.
            at_end = row not in early or early[row].point.stop == 2 * self.model.num_layers
            pending = 0 if at_end else pending + 1
        return rows

    def _evaluate(
        self, text: TeacherForcedPass, point: ExitPoint | None, threshold: float | None, candidates: Sequence[int]
    ) -> dict[int, _ExitPrediction]:
        """Evaluate an exit at these rows (ascending); keep the predictions that pass the threshold, all for None."""
        name = None if point is None else point.name
        predictions: dict[int, _ExitPrediction] = {}
        if threshold is not None and self.criterion == PROBE:
            # As in decoding: the head runs only for tokens that leave.
            passing = leaves(point.probe(text.hidden[list(candidates)]), threshold, PROBE).tolist()
            candidates = list(itertools.compress(candidates, passing))
        for rows, logits, tokens, logprobs in text.evaluate(name, candidates):
            if threshold is None:
                value = end_confidence(self.criterion, logits)
            else:
                value = exit_confidence(self.criterion, logits, text.hidden[list(rows)], point.probe)
            columns = (value, logprobs, logits.argmax(dim=1) == tokens)
            passing = [True] * len(rows)
            if threshold is not None:
                passing = leaves(columns[0], threshold, self.criterion).tolist()
            for row, passes, *values in zip(rows, passing, *(column.tolist() for column in columns), strict=True):
                if passes:
                    predictions[row] = _ExitPrediction(point, *values)
            self.evaluations[FINAL if name is None else name] += len(rows)
        return predictions

    def _result(
        self,
        sequences: Sequence[Sequence[int]],
        num_context: Sequence[int],
        predictions: Sequence[Sequence[_ExitPrediction]],
        computed_layers: float,
    ) -> ScoreResult:
        per_sequence: dict[int, list[TokenEvent]] = defaultdict(list)
        for index, (own, context) in enumerate(zip(sequences, num_context, strict=True)):
            for offset, prediction in enumerate(predictions[index]):
                point, position = prediction.point, context + offset
                per_sequence[index].append(
                    TokenEvent(
                        sequence=index,
                        position=position,
                        token=own[position],
                        exit=None if point is None else point.name,
                        layer=self.model.num_layers if point is None else point.layer,
                        confidence=prediction.confidence,
                        logprob=prediction.logprob,
                        finish_reason="length" if position + 1 == len(own) else None,
                    )
                )
        events = tuple(event for own in per_sequence.values() for event in own)
        return ScoreResult(
            logprobs=tuple(tuple(event.logprob for event in own) for own in per_sequence.values()),
            exits=tuple(tuple(event.exit for event in own) for own in per_sequence.values()),
            is_greedy=tuple(tuple(prediction.is_greedy for prediction in own) for own in predictions),
            events=events,
            stats=DecodingStats(
                num_prompt_tokens=sum(num_context),
                num_tokens=len(events),
                tokens_per_exit=exit_histogram(events, self.model.exits),
                mean_depth=mean_depth(events),
                num_layers=self.model.num_layers,
                computed_layers=computed_layers,
                evaluations={point.name: 0 for point in self.model.exits} | self.evaluations,
            ),
        )
