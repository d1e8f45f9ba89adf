# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What is asked for: one sequence to generate.

May import: the standard library and `nemo_ee.generation.{items,policy,sampling}`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .early_exit_generation_items import DecodingModel
from .early_exit_generation_policy import Course, ExitPolicy, course_of
from .early_exit_generation_sampling import GREEDY, SamplingParams


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at least 1.
        sampling: how its tokens are chosen.
        stop_tokens: ids that end it; the one that does is its last token.
        min_new_tokens: before so many new tokens no exit gives a stop token any probability.
        ends: from the new tokens so far to whether they end the sequence, e.g. with a stop string. It must depend on
            nothing else: a drafted token may be asked about more than once, or be thrown away. The list is the
            session's own and goes on growing: read it, keep a copy of what is to be kept.
        num_top: report this many most likely tokens beside each token, from 0.
        mode, policy: its own; None = the session's. A mode without a policy keeps the session's policy.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    stop_tokens: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    ends: Callable[[Sequence[int]], bool] | None = None
    num_top: int = 0
    mode: str | None = None
    policy: ExitPolicy | None = None


def resolve(model: DecodingModel, request: Request, mode: str, policy: ExitPolicy | None, faults: list[str]) -> Course:
    """The course of a request in a session of this mode and policy; what is wrong with it is appended to `faults`."""
    try:
        own_policy = policy if request.policy is None else request.policy
        return course_of(mode if request.mode is None else request.mode, own_policy, model.exits, model.num_layers)
    except ValueError as error:
        faults.append(str(error))
        return Course()
