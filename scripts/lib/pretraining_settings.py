# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of a pre-training run, and the progress of a run on its learning-rate schedule.

rise:   lr x min(1, (step + 1) / warmup_steps)
fall:   lr x (1 - sqrt((step - decay_start) / decay_steps))        arXiv 2405.18392, section 4
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ValidationInfo, field_validator

from lib.byte_tokenizer import NUM_TOKENS
from nemo_ee.settings.fields import AboveZero, Betas, FilePath, Files, NonNegative, Texts, as_list
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Natural, Positive, Sentence, Text, UserInput, rule

ROOT = Path(__file__).resolve().parents[2]


class Sizes(UserInput):
    """The `model` block."""

    family: Literal["llama", "gpt2"]
    num_hidden_layers: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_attention_heads: Positive
    max_position_embeddings: Positive
    vocab_size: Positive
    tie_word_embeddings: bool


class PretrainConfig(ScriptInput):
    """The settings of conf/pretrain_reference_model.yaml, one field per key."""

    headline: ClassVar = "Nothing was trained"

    data: Files
    output: FilePath
    held_out: Annotated[Texts | None, BeforeValidator(as_list), rule("the name of a file, a list of names, or null")]
    max_document_bytes: Positive | None
    start_from: Text | None
    sequence_length: Positive
    model: Sizes
    batch_size: Positive
    steps: Positive
    warmup_steps: Natural
    decay_steps: Positive
    lr: AboveZero
    weight_decay: NonNegative
    betas: Betas
    clip: AboveZero
    exit_layers: Annotated[tuple[Positive, ...], BeforeValidator(as_list), rule("a layer from 1, or a list of layers")]
    exit_loss_weight: Annotated[AboveZero, rule("a number above 0; leave exit_layers empty for the final exit alone")]
    precision: Literal["bf16", "fp32"]
    seed: Natural
    save_every: Positive
    validate_every: Positive | None
    validation_windows: Positive
    final_validation_windows: Positive | None
    max_steps_this_run: Positive | None

    @field_validator("held_out")
    @classmethod
    def _in_the_repository(cls, names: Texts | None) -> Texts:
        return tuple(str(ROOT / name) for name in names or ())

    @field_validator("start_from")
    @classmethod
    def _is_a_model(cls, name: str | None) -> str | None:
        folder = None if name is None else Path(name).resolve()
        if folder is not None and not (folder / "config.json").is_file():
            raise ValueError(
                "has no config.json; name the directory `model` of a finished run, or leave it null to start from "
                "random weights"
            )
        return None if folder is None else str(folder)

    @field_validator("model")
    @classmethod
    def _fits(cls, model: Sizes, info: ValidationInfo) -> Sizes:
        problems, length = [], info.data.get("sequence_length", 0)
        if model.hidden_size % (2 * model.num_attention_heads):
            problems.append(
                f"model.hidden_size={model.hidden_size} must be a multiple of twice num_attention_heads "
                f"({model.num_attention_heads}); rotary embeddings need an even head"
            )
        if model.vocab_size < NUM_TOKENS:
            rule = f"at least {NUM_TOKENS}: bytes and the end token"
            problems.append(f"model.vocab_size={model.vocab_size} must be {rule}")
        if length > model.max_position_embeddings:
            problems.append(
                f"sequence_length={length} is more than model.max_position_embeddings "
                f"({model.max_position_embeddings}); raise the one or lower the other"
            )
        if problems:
            raise ValueError(*problems)
        return model

    @field_validator("decay_steps")
    @classmethod
    def _leave_room(cls, decay: int, info: ValidationInfo) -> int:
        steps, warmup = info.data.get("steps"), info.data.get("warmup_steps")
        if None not in (steps, warmup) and warmup + decay > steps:
            raise Sentence(f"warmup_steps={warmup} and decay_steps={decay} must together be at most steps ({steps})")
        return decay

    @field_validator("exit_layers")
    @classmethod
    def _lie_below_the_last(cls, layers: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        model, problems = info.data.get("model"), []
        wrong = [layer for layer in layers if model is not None and layer >= model.num_hidden_layers]
        if wrong:
            rule = f"whole numbers from 1 to {model.num_hidden_layers - 1}, layers below the last one; [] for none"
            problems.append(f"exit_layers: {wrong} must be {rule}")
        if len(set(layers)) < len(layers):
            problems.append(f"exit_layers={list(layers)} names a layer twice; name each once")
        if problems:
            raise Sentence(*problems)
        return layers


@dataclasses.dataclass
class Progress:
    """The progress of a run; all of it is in the checkpoint beside weights and optimizer."""

    step: int  # steps done
    decay_start: int  # first step of the fall
    decay_steps: int  # its length

    @property
    def end(self) -> int:
        """Steps of the whole run."""
        return self.decay_start + self.decay_steps

    def learning_rate(self, config: PretrainConfig) -> float:
        """Learning rate of the next step."""
        if self.step >= self.decay_start:
            return config.lr * (1 - math.sqrt((self.step - self.decay_start) / self.decay_steps))
        return config.lr * min(1.0, (self.step + 1) / max(1, config.warmup_steps))

    def resumed(self, stored: Progress) -> Progress:
        """The progress of a run that goes on from `stored` with the settings of `self`.

        A fall that has begun keeps its settings. Before that the current settings hold, so a run can be made longer or
        shorter.
        """
        if stored.step >= stored.decay_start:
            return stored
        return Progress(stored.step, max(self.decay_start, stored.step), self.decay_steps)

    def heed(self, request: Path) -> bool:
        """Start the fall if the file exists (its content, if any, is the number of steps); False once it runs.

        Raises:
            ValueError: the file holds something else than a number.
        """
        if self.step >= self.decay_start or not request.exists():
            return False
        text = request.read_text(encoding="utf-8").strip()
        if text and (not text.isdecimal() or len(text) > 9 or int(text) < 1):
            raise ValueError(f"{request} holds {text[:40]!r}; write a number of steps from 1, or leave it empty")
        self.decay_start, self.decay_steps = self.step, int(text or self.decay_steps)
        return True
