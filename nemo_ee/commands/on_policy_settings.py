# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""conf/megatron_gpt_early_exit_on_policy.yaml, a field for each key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ValidationInfo, field_validator

from nemo_ee.settings.fields import AboveZero, Accelerator, FilePath, NonNegative, Optimizer, Seed, as_text
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Positive, Share, Text, UserInput, rule


def _exists(path: Path) -> Path:
    if not path.exists():
        raise ValueError("does not exist; check the name")
    return path


ExistingPath = Annotated[FilePath, AfterValidator(_exists)]


def _is_or_can_be_made(folder: Path) -> Path:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"must be a directory, and {there} is a file; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot be written, {there} is read-only; name another")
    return folder


Folder = Annotated[FilePath, AfterValidator(_is_or_can_be_made), rule("the name of a directory")]


class OnPolicyTrainer(UserInput):
    """The `trainer` block."""

    accelerator: Accelerator
    precision: Annotated[Literal["32", "bf16"], BeforeValidator(as_text)]
    gradient_clip_val: NonNegative


class Answers(UserInput):
    """The `answers` block: how the model answers the prompts of a round."""

    prompts_per_round: Positive
    max_prompt_tokens: Positive
    max_new_tokens: Annotated[int, rule("a whole number of at least 2, since the first token is never drafted")]
    num_draft_tokens: Positive
    threshold: Share
    greedy: bool
    temperature: AboveZero

    @field_validator("max_new_tokens")
    @classmethod
    def _holds_a_draft(cls, value: int) -> int:
        if value < 2:
            raise ValueError("must be a whole number of at least 2, since the first token is never drafted")
        return value

    @field_validator("threshold")
    @classmethod
    def _drafts(cls, value: float) -> float:
        if value >= 1.0:
            raise ValueError("must be below 1, because no token would be drafted")
        return value


class OnPolicyOptimizer(Optimizer):
    """The `model.optim` block."""

    name: Literal["adamw", "adam"]


class OnPolicyModel(UserInput):
    """The `model` block."""

    optim: OnPolicyOptimizer


class OnPolicySettings(ScriptInput):
    """The whole yaml."""

    headline: ClassVar = "nothing was started"

    source: ExistingPath
    gguf_dtype: Literal["float32", "float16", "bfloat16"]
    exits: ExistingPath
    exit: Text | None
    prompts: ExistingPath
    folder: Folder
    output: Annotated[FilePath, rule("the name of a .nemo file, or of a directory that does not exist")]
    rounds: Positive
    steps_per_round: Positive
    tokens_per_step: Positive
    buffer_tokens: Positive
    imitation_share: Share
    teacher_tokens: Positive
    seed: Seed
    answers: Answers
    trainer: OnPolicyTrainer
    model: OnPolicyModel

    @field_validator("buffer_tokens")
    @classmethod
    def _holds_a_step(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("tokens_per_step", 0):
            raise ValueError(f"must be at least tokens_per_step={info.data['tokens_per_step']}; enlarge it")
        return value

    @field_validator("answers")
    @classmethod
    def _fit_the_buffer(cls, value: Answers, info: ValidationInfo) -> Answers:
        longest, room = value.max_prompt_tokens + value.max_new_tokens, info.data.get("buffer_tokens", 0)
        if "buffer_tokens" in info.data and longest > room:
            raise ValueError(
                f"must fit into the buffer: prompt and answer may have {longest} tokens, buffer_tokens={room}; raise "
                "it, or lower answers.max_prompt_tokens or answers.max_new_tokens"
            )
        return value

    @field_validator("answers")
    @classmethod
    def _are_drawn_as_rewarded(cls, value: Answers, info: ValidationInfo) -> Answers:
        tempered = not value.greedy and value.temperature != 1.0
        if tempered and info.data.get("imitation_share", 1.0) < 1.0:
            raise ValueError(
                f"must be sampled at temperature 1 where they are rewarded, because the reward is that of drafts at "
                f"temperature 1; set answers.temperature=1.0 instead of {value.temperature:g}, or imitation_share=1.0"
            )
        return value

    @property
    def imitation_rounds(self) -> int:
        """The first rounds, which imitate."""
        return round(self.imitation_share * self.rounds)
