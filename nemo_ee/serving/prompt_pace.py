# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""How many tokens of new prompts a step runs beside running answers, so that a long prompt does not hold them up.

    time of a step = time of the answers' tokens + prompt tokens * time of one

Both are measured while the server runs. With a share of a half, prompts get as much time as all answers together for
each of them that waits: beside one prompt a step takes twice as long, beside three four times, and a burst of short
ones fills the batch quickly.
"""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median

_KEPT = 0.8  # of the older measurements of a prompt token, in each new one
_ANSWER_STEPS = 5  # measurements of a step without prompt tokens of which the median counts
_STEPS_WITHOUT_A_LOOK = 32  # steps with prompt tokens after which one without them measures the answers again


class PromptPace:
    """See the module.

    Args:
        share: of a step's time for a prompt that waits alone, above 0 and below 1; None = whole prompts at once.
    """

    def __init__(self, share: float | None) -> None:
        self._share = share
        # number of answers -> seconds of steps without prompt tokens
        self._answers: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_ANSWER_STEPS))
        self._seconds_per_token: float | None = None
        self._since_a_look = 0

    def budget(self, num_prompts: int, num_answers: int) -> int | None:
        """Most prompt tokens of the next step; None = all.

        Args:
            num_prompts: running sequences whose prompt has not run to its end.
            num_answers: the others.
        """
        if self._share is None or not num_answers or not num_prompts:
            return None
        if not self._answers[num_answers] or self._since_a_look >= _STEPS_WITHOUT_A_LOOK:
            return 0
        if self._seconds_per_token is None:
            return 1
        over_answers = num_prompts * self._share / (1.0 - self._share)
        return max(1, int(over_answers * median(self._answers[num_answers]) / self._seconds_per_token))

    def took(self, seconds: float, num_prompt_tokens: int, num_answers: int) -> None:
        """Learn from a step. `num_answers`: as for `budget`, before the step."""
        if not num_prompt_tokens:
            self._answers[num_answers].append(seconds)
            self._since_a_look = 0
            return
        if num_answers and not self._answers[num_answers]:
            return
        answers = median(self._answers[num_answers]) if num_answers else 0.0
        spent = max(seconds - answers, 1e-3 * seconds) / num_prompt_tokens
        old = self._seconds_per_token
        self._seconds_per_token = spent if old is None else _KEPT * old + (1.0 - _KEPT) * spent
        self._since_a_look += 1
