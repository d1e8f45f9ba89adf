# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""How many tokens of new prompts a step runs beside running answers, so that a long prompt does not hold them up.

    time of a step = time of the answers' tokens + prompt tokens * time of one

Both are measured while the server runs. Prompts get a share of the time of each step in which answers wait for them.
"""

from __future__ import annotations

_KEPT = 0.8  # of the older measurements, in each new one
_STEPS_WITHOUT_A_LOOK = 32  # steps with prompt tokens after which one without them measures the answers again


class PromptPace:
    """See the module.

    Args:
        share: of a step's time for prompts, above 0 and below 1; None = whole prompts at once.
    """

    def __init__(self, share: float | None) -> None:
        self._prompts_over_answers = None if share is None else share / (1.0 - share)
        self._answers_seconds: float | None = None  # of a step without prompt tokens
        self._seconds_per_token: float | None = None
        self._since_a_look = 0

    def budget(self, num_answers: int) -> int | None:
        """Most prompt tokens of the next step; None = all. `num_answers`: sequences whose prompt has run."""
        if self._prompts_over_answers is None or not num_answers:
            return None
        if self._answers_seconds is None or self._since_a_look >= _STEPS_WITHOUT_A_LOOK:
            return 0
        if self._seconds_per_token is None:
            return 1
        return max(1, int(self._prompts_over_answers * self._answers_seconds / self._seconds_per_token))

    def took(self, seconds: float, num_prompt_tokens: int, num_answers: int) -> None:
        """Learn from a step. `num_answers`: as for `budget`, before the step."""
        if not num_prompt_tokens:
            old = None if self._since_a_look >= _STEPS_WITHOUT_A_LOOK else self._answers_seconds
            self._answers_seconds, self._since_a_look = _mixed(old, seconds), 0
            return
        if num_answers and self._answers_seconds is None:
            return
        spent = max(seconds - (self._answers_seconds if num_answers else 0.0), 1e-3 * seconds)
        self._seconds_per_token = _mixed(self._seconds_per_token, spent / num_prompt_tokens)
        self._since_a_look += 1


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else _KEPT * old + (1.0 - _KEPT) * new
