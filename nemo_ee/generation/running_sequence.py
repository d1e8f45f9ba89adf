# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The state of one sequence in a decoding session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nemo_ee.generation.draft_value import DraftValue
from nemo_ee.generation.forward_rows import TokenInput
from nemo_ee.generation.policy import ExitPlan
from nemo_ee.generation.prompt_scores import PromptScorer
from nemo_ee.generation.request import Request
from nemo_ee.generation.verification import Draft

_LATER_PIECE = 512  # tokens of a prompt of which the first ones have run


@dataclass(eq=False)
class RunningSequence:
    """A running sequence.

    Attributes:
        answer: its new tokens. The last of them are the `drafts`, which are not verified yet.
        num_prompt_run: tokens of the prompt that have run, or run in this step.
        has_begun: the prompt has run.
        must_verify: a draft would end the sequence.
        left: exit name -> number of tokens that left there; None = the end of the stack.
        exits_pay: the cost rule's verdict; None = not decided.
        next_verdict: number of tokens after which the cost rule decides next.
        value: chooses its drafts by value; None = they are chosen by the thresholds.
        scorer: scores the prompt while it runs; None = the prompt is not scored, or has run.
    """

    index: int
    slot: int
    request: Request
    plan: ExitPlan
    answer: list[int] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    num_prompt_run: int = 0
    has_begun: bool = False
    must_verify: bool = False
    left: dict[str | None, int] = field(default_factory=dict)
    exits_pay: bool | None = None
    next_verdict: int = 0
    value: DraftValue | None = None
    scorer: PromptScorer | None = None

    def prompt_piece(self, room: int) -> TokenInput:
        """The next tokens of the prompt, at most `room`; all of them are read where it is scored."""
        start, prompt = self.num_prompt_run, self.request.prompt
        self.num_prompt_run = stop = min(start + room, len(prompt))
        scored = self.scorer is not None
        return TokenInput(start, prompt[start:stop], read_all=scored, read_none=not scored and stop < len(prompt))

    def newest_token(self, allow_exit: bool) -> TokenInput:
        """The newest token, to run."""
        if self.value is not None:
            self.value.start_token()
        tokens = (self.answer[-1],)
        return TokenInput(self.length - 1, tokens, allow_exit, read_all=self.plan.verify, rule=self.value)

    def learn(self, logits: Tensor, accepted: Sequence[bool] = ()) -> None:
        """Count for the choice of drafts what a verification showed, see `DraftValue.learn`."""
        if self.value is not None:
            self.value.learn(logits, accepted, self.length)

    @property
    def prompt_tokens_left(self) -> int:
        """Tokens of the prompt that have not run."""
        return len(self.request.prompt) - self.num_prompt_run

    @property
    def length(self) -> int:
        """Number of tokens of prompt and answer, drafts included."""
        return len(self.request.prompt) + len(self.answer)

    def previous(self) -> Sequence[int]:
        """The tokens that the penalties need; () without a penalty, to save a copy of the whole text."""
        return [*self.request.prompt, *self.answer] if self.request.sampling.looks_back else ()

    def finish_reason(self) -> str | None:
        """The reason why the sequence has ended; None = it has not."""
        request = self.request
        if self.answer[-1] in request.stop_tokens:
            return "stop"
        if request.ends is not None and request.ends(self.answer):
            return "stop"
        return "length" if len(self.answer) >= request.max_new_tokens else None


def prompt_parts(room: int | None, sequences: Sequence[RunningSequence]) -> dict[int, int]:
    """Most prompt tokens of each sequence in a step: equal parts, and what the shorter ones leave to the longer ones.

    The first piece of a prompt attends causally, a later one under a mask of its rows by the whole text: it is short.
    """
    parts, left = {}, room
    for number, own in enumerate(sorted(sequences, key=lambda own: own.prompt_tokens_left)):
        parts[own.index] = own.prompt_tokens_left
        if own.num_prompt_run:
            parts[own.index] = min(parts[own.index], _LATER_PIECE)
        if left is not None:
            parts[own.index] = min(parts[own.index], -(-left // (len(sequences) - number)))
            left -= parts[own.index]
    return parts
