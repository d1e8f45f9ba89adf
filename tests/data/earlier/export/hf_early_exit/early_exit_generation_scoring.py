# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Scoring known text: the log-probability of each token at the exit it would leave at.

Early exit changes where a token is read, never a hidden state: what waits is computed later with the same values. So
known text needs no token-by-token decoding. It runs once at full depth, the exits are asked about many rows at a time,
and each sequence's decisions are then replayed in order (only the cap on waiting tokens makes them depend on earlier
ones). The result is that of feeding the text token by token.

May import: torch, `nemo_ee.exits` and `nemo_ee.generation.{items,known_text,policy,stats}`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import torch

from .early_exit_exits_confidence import confidence, leaves
from .early_exit_generation_items import DecodingModel, ExitPoint
from .early_exit_generation_known_text import KnownTextPass
from .early_exit_generation_policy import Course
from .early_exit_generation_stats import FINAL, DecodingStats, TokenEvent, exit_histogram, mean_depth


@dataclasses.dataclass(frozen=True)
class ScoreResult:
    """What `EarlyExitEngine.score` returns; the outer tuples have an entry per sequence, the inner per scored token.

    Attributes:
        logprobs: ln of each scored token's probability at the exit it is read from.
        exits: that exit's name; None = the final exit.
        is_greedy: whether the token is that exit's most likely one.
        events: the same, token by token, sequence after sequence.
        stats: sums over the events.
    """

    logprobs: tuple[tuple[float, ...], ...]
    exits: tuple[tuple[str | None, ...], ...]
    is_greedy: tuple[tuple[bool, ...], ...]
    events: tuple[TokenEvent, ...]
    stats: DecodingStats


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What one exit says about the token after one row."""

    point: ExitPoint | None  # None = the final exit
    confidence: float
    logprob: float
    is_greedy: bool


class Scorer:
    """One pass over a batch of known text.

    Args:
        model: what to run.
        course: the exits to ask, or the one to read everything from.
    """

    def __init__(self, model: DecodingModel, course: Course) -> None:
        self.model, self.course = model, course
        self.exits, self.criterion, self.max_waiting = course.exits, course.criterion, course.max_waiting
        self.asked = dict.fromkeys((*course.exit_names, FINAL), 0)

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]], num_context: Sequence[int]) -> ScoreResult:
        """Score `sequences[i][num_context[i]:]`, every sequence longer than its context and that at least 1."""
        static = self.course.end
        end = 2 * self.model.num_layers if static is None else static.stop
        text = KnownTextPass(self.model, sequences, self.course.exit_names)
        first_rows, lengths = text.first_rows, [len(own) - 1 for own in sequences]
        # A context's last row is read from the final exit, as after a prompt; the rows after it are asked.
        asking = [
            row + position
            for row, length, context in zip(first_rows, lengths, num_context, strict=True)
            for position in range(context, length)
        ]
        early: dict[int, _Answer] = {}
        for stop in text.run_to({*(exit.point.stop for exit in self.exits), end}):
            for exit in self.exits:
                if exit.point.stop == stop:
                    asked = [row for row in asking if row not in early]
                    early |= self._ask(text, exit.point, exit.threshold, asked)
        final_rows = []
        for row, length, context in zip(first_rows, lengths, num_context, strict=True):
            final_rows += self._read_from_final(row, context, length, early)
        final = self._ask(text, static, None, final_rows)
        answers = [
            [(early | final)[row + position] for position in range(context - 1, length)]
            for row, length, context in zip(first_rows, lengths, num_context, strict=True)
        ]
        return self._result(sequences, num_context, answers, len(text.items) * end / 2)

    def _read_from_final(self, first_row: int, context: int, length: int, early: dict[int, _Answer]) -> list[int]:
        """Replay one sequence's decisions; those the cap forces to full depth lose their early answer."""
        rows, waiting = [first_row + context - 1], 0
        for row in range(first_row + context, first_row + length):
            forced = self.max_waiting is not None and waiting >= self.max_waiting
            if forced:
                early.pop(row, None)
            if row not in early:
                rows.append(row)
            # At the end of the stack nothing is left to wait for, and what waited has come along.
            at_end = row not in early or early[row].point.stop == 2 * self.model.num_layers
            waiting = 0 if at_end else waiting + 1
        return rows

    def _ask(
        self, text: KnownTextPass, point: ExitPoint | None, threshold: float | None, asked: Sequence[int]
    ) -> dict[int, _Answer]:
        """Ask an exit about these rows (ascending); keep the answers that are sure, without a threshold all."""
        name = None if point is None else point.name
        answers: dict[int, _Answer] = {}
        for rows, logits, tokens, logprobs in text.ask(name, asked):
            columns = (confidence(logits, self.criterion), logprobs, logits.argmax(dim=1) == tokens)
            sure = [True] * len(rows)
            if threshold is not None:
                sure = leaves(columns[0], threshold, self.criterion).tolist()
            for row, is_sure, *said in zip(rows, sure, *(column.tolist() for column in columns), strict=True):
                if is_sure:
                    answers[row] = _Answer(point, *said)
            self.asked[FINAL if name is None else name] += len(rows)
        return answers

    def _result(
        self,
        sequences: Sequence[Sequence[int]],
        num_context: Sequence[int],
        answers: Sequence[Sequence[_Answer]],
        computed_layers: float,
    ) -> ScoreResult:
        per_sequence: dict[int, list[TokenEvent]] = defaultdict(list)
        for index, (own, context) in enumerate(zip(sequences, num_context, strict=True)):
            for offset, answer in enumerate(answers[index]):
                point, position = answer.point, context + offset
                per_sequence[index].append(
                    TokenEvent(
                        sequence=index,
                        position=position,
                        token=own[position],
                        exit=None if point is None else point.name,
                        layer=self.model.num_layers if point is None else point.layer,
                        confidence=answer.confidence,
                        logprob=answer.logprob,
                        finish_reason="length" if position + 1 == len(own) else None,
                    )
                )
        events = tuple(event for own in per_sequence.values() for event in own)
        return ScoreResult(
            logprobs=tuple(tuple(event.logprob for event in own) for own in per_sequence.values()),
            exits=tuple(tuple(event.exit for event in own) for own in per_sequence.values()),
            is_greedy=tuple(tuple(answer.is_greedy for answer in own) for own in answers),
            events=events,
            stats=DecodingStats(
                num_prompt_tokens=sum(num_context),
                num_tokens=len(events),
                tokens_per_exit=exit_histogram(events, self.model.exits),
                mean_depth=mean_depth(events),
                num_layers=self.model.num_layers,
                computed_layers=computed_layers,
                asked={point.name: 0 for point in self.model.exits} | self.asked,
            ),
        )
