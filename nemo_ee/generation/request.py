# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One sequence to generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.sampling import GREEDY, SamplingParams


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at least 1; with `prompt_logprobs` from 0.
        sampling: sampling parameters of its tokens.
        stop_tokens: token ids that end it; the stop token is its last token.
        min_new_tokens: before this many new tokens no exit gives a stop token any probability.
        ends: called with the new tokens so far; true ends the sequence, e.g. after a stop string. It must depend on
            nothing else: it may be called twice for a drafted token, or for one that is rejected. The list belongs to
            the session and grows later: read it, and copy what must be kept.
        num_top: number of most likely tokens to report beside each token, from 0.
        prompt_logprobs: report ln p of the prompt's tokens (`PromptScores`), and this many most likely tokens beside
            each; None = do not.
        mode, policy: mode and policy of this sequence; None = the session's. A mode without a policy keeps the
            session's policy.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    stop_tokens: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    ends: Callable[[Sequence[int]], bool] | None = None
    num_top: int = 0
    prompt_logprobs: int | None = None
    mode: str | None = None
    policy: ExitPolicy | None = None
