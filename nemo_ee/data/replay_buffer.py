# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A model's own answers with the verdicts on their drafts, in a buffer of bounded size, and microbatches of them.

A rejected draft is not in the text, but everything before it is: the exit's and the final exit's distributions at a
drafted position follow from the text, and the token there is the verifier's. So an answer is its tokens and the places
of its draft runs; nothing of the size of the vocabulary is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_ee.megatron.model.microbatch import MicroBatch

_PADDING = 0.25  # at most, for each token of a microbatch


@dataclass(frozen=True)
class Answer:
    """A prompt and its answer.

    Attributes:
        tokens: ids, prompt and answer.
        runs: of each draft run the position of its first token in `tokens`, and the number of its drafts that were
            verified: the accepted ones, and the rejected one if there is one.
    """

    tokens: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class DraftBatch:
    """Some answers as a microbatch.

    Attributes:
        batch: tokens [b, s]; its loss mask counts the drafted positions that were verified.
        runs: [r, k] indices into [b * s] of the positions that predict the first k tokens of each draft run, as they
            are in the text; b * s behind the text's end.
        num_tokens: tokens that run, without padding.
    """

    batch: MicroBatch
    runs: Tensor
    num_tokens: int


class ReplayBuffer:
    """The newest answers, at most `max_tokens` tokens of them together.

    Args:
        max_tokens: the bound.
        answers: the first ones, oldest first.
    """

    def __init__(self, max_tokens: int, answers: Iterable[Answer] = ()) -> None:
        self.max_tokens, self.num_tokens = max_tokens, 0
        self.answers: deque[Answer] = deque()
        for answer in answers:
            self.add(answer)

    def add(self, answer: Answer) -> None:
        """Add an answer; the oldest ones make room.

        Raises:
            ValueError: it is longer than the whole buffer.
        """
        size = len(answer.tokens)
        if size > self.max_tokens:
            raise ValueError(
                f"an answer of {size} tokens does not fit into a replay buffer of {self.max_tokens}; enlarge the "
                "buffer, or shorten prompts and answers"
            )
        while self.num_tokens + size > self.max_tokens:
            self.num_tokens -= len(self.answers.popleft().tokens)
        self.answers.append(answer)
        self.num_tokens += size

    def draw(self, num_tokens: int, seed: int) -> list[Answer]:
        """Different answers at random, at least one, as many as do not exceed `num_tokens` tokens together. The same
        buffer and seed give the same ones."""
        order = torch.randperm(len(self.answers), generator=torch.Generator().manual_seed(seed)).tolist()
        drawn, left = [], num_tokens
        for index in order:
            left -= len(self.answers[index].tokens)
            if drawn and left < 0:
                break
            drawn.append(self.answers[index])
        return drawn

    def to_plain(self) -> list[Any]:
        """The answers as plain containers, for JSON."""
        return [[list(one.tokens), [list(run) for run in one.runs]] for one in self.answers]

    @classmethod
    def from_plain(cls, max_tokens: int, plain: Iterable[Any]) -> ReplayBuffer:
        """A buffer with the answers of `to_plain`."""
        return cls(max_tokens, (Answer(tuple(ids), tuple(map(tuple, runs))) for ids, runs in plain))


def draft_batches(answers: Iterable[Answer], num_draft_tokens: int, device: torch.device) -> list[DraftBatch]:
    """Answers as microbatches, each of answers of similar length: padding is at most `_PADDING` of its tokens.

    Args:
        num_draft_tokens: k, the longest draft run.
    """
    alike: list[list[Answer]] = []
    tokens = 0  # of the last microbatch, whose first answer is the longest
    for answer in sorted(answers, key=lambda one: -len(one.tokens)):
        size = len(answer.tokens) - 1
        if not alike or (len(alike[-1]) + 1) * (len(alike[-1][0].tokens) - 1) > (1 + _PADDING) * (tokens + size):
            alike.append([])
            tokens = 0
        alike[-1].append(answer)
        tokens += size
    return [_side_by_side(own, num_draft_tokens, device) for own in alike]


def _side_by_side(answers: Sequence[Answer], num_draft_tokens: int, device: torch.device) -> DraftBatch:
    """Answers padded at the end to the longest."""
    length = max(len(one.tokens) for one in answers) - 1
    tokens, labels = torch.zeros(2, len(answers), length, dtype=torch.long)
    mask = torch.zeros(len(answers), length)
    runs = []
    for row, answer in enumerate(answers):
        ids, end = torch.tensor(answer.tokens), len(answer.tokens) - 1
        tokens[row, :end], labels[row, :end] = ids[:-1], ids[1:]
        for first, verified in answer.runs:
            # Position p of the text is predicted at p - 1.
            mask[row, first - 1 : first - 1 + verified] = 1.0
            places = torch.arange(first - 1, first - 1 + num_draft_tokens)
            runs.append(torch.where(places < end, row * length + places, mask.numel()))
    positions = torch.arange(length).expand(len(answers), -1)
    batch = MicroBatch(*(values.to(device) for values in (tokens, labels, mask, positions)))
    indices = torch.stack(runs) if runs else torch.zeros(0, num_draft_tokens, dtype=torch.long)
    return DraftBatch(batch, indices.to(device), sum(len(one.tokens) - 1 for one in answers))
