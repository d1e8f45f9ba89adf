# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of tokens, and of a prompt's own tokens while it runs.

A prompt runs at full depth (in `static_depth` to the one exit), and its tokens are scored where it ends. A scored
prompt runs in pieces, one a step, so that the logits in memory stay small; the keys and values are those of one piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_ee.generation.forward_rows import ExitOutput
from nemo_ee.generation.request import Request
from nemo_ee.generation.stats import Failure, PromptScores
from nemo_ee.generation.teacher_forcing import LOGITS_PER_CALL


def rows_per_step(vocab_size: int) -> int:
    """Most prompt tokens that are scored in one step, all sequences together."""
    return max(1, LOGITS_PER_CALL // vocab_size)


class PromptScorer:
    """Scores the tokens of one prompt, a piece at a time.

    Args:
        sequence: index of the sequence in the session.
        request: its `prompt_logprobs` is not None.
    """

    def __init__(self, sequence: int, request: Request) -> None:
        self._sequence, self._request = sequence, request
        self._num_scored = 0
        self._logprobs: list[float] = []
        self._top: list[tuple[tuple[int, float], ...]] = []

    def take(self, output: ExitOutput) -> PromptScores | Failure | None:
        """Score the tokens that follow those that just ran.

        Args:
            output: a row for each token that ran.

        Returns:
            None while tokens are left to run. A `PromptScores` with a finish reason, and a `Failure`, is the
            sequence's last event.
        """
        request = self._request
        start, self._num_scored = self._num_scored, self._num_scored + output.logits.shape[0]
        following = request.prompt[start + 1 : self._num_scored + 1]  # no token of the prompt follows the last one
        if following:
            logprobs = output.logits[: len(following)].log_softmax(dim=1)
            self._logprobs += _entries(logprobs, following)
            if request.prompt_logprobs:
                values, tokens = logprobs.topk(min(request.prompt_logprobs, logprobs.shape[1]), dim=1)
                rows = zip(tokens.tolist(), values.tolist(), strict=True)
                self._top += [tuple(zip(*row, strict=True)) for row in rows]
        if self._num_scored < len(request.prompt):
            return None
        broken = [position for position, logprob in enumerate(self._logprobs, start=1) if math.isnan(logprob)]
        if broken:
            return Failure.of_logits(self._sequence, broken[0], output.exit)
        finish_reason = None if request.max_new_tokens else "length"
        return PromptScores(self._sequence, tuple(self._logprobs), tuple(self._top), finish_reason)


def token_logprobs(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """ln p of a token in each row. `logits`: `[n, v]`."""
    return _entries(logits.log_softmax(dim=1), tokens)


def _entries(logprobs: Tensor, tokens: Sequence[int]) -> list[float]:
    """The entry of a token in each row. `logprobs`: `[n, v]`."""
    if len(tokens) == 1:
        return [logprobs[0, tokens[0]].item()]
    return logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0].tolist()


def most_likely(logits: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """(token, ln p) of the most likely tokens, without those that are masked out. `logits`: `[v]`."""
    if not count:
        return ()
    values, tokens = logits.log_softmax(dim=0).topk(min(count, logits.shape[0]))
    found = zip(tokens.tolist(), values.tolist(), strict=True)
    return tuple((token, value) for token, value in found if value > -math.inf)
