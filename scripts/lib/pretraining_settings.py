# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of a pre-training run, and where a run stands on its learning-rate schedule.

rise:   lr x min(1, (step + 1) / warmup_steps)
fall:   lr x (1 - sqrt((step - decay_start) / decay_steps))        arXiv 2405.18392, section 4
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from lib.byte_tokenizer import NUM_TOKENS

ROOT = Path(__file__).resolve().parents[2]
_MODEL_KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """The settings of conf/pretrain_reference_model.yaml, one field per key."""

    data: tuple[str, ...]
    output: Path
    held_out: tuple[str, ...]
    max_document_bytes: int | None
    start_from: str | None
    model: dict[str, Any]
    sequence_length: int
    batch_size: int
    steps: int
    warmup_steps: int
    decay_steps: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    clip: float
    exit_layers: tuple[int, ...]
    exit_loss_weight: float
    precision: str
    seed: int
    save_every: int
    validate_every: int | None
    validation_windows: int
    final_validation_windows: int | None
    max_steps_this_run: int | None

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> PretrainConfig:
        """Read the settings.

        Raises:
            ValueError: every fault of the settings.
        """
        values = dict(mapping)
        for key in ("data", "held_out"):
            names = [values[key]] if isinstance(values[key], str) else values[key] or ()
            values[key] = tuple(str(name) for name in names)
        values["held_out"] = tuple(str(ROOT / name) for name in values["held_out"])
        values["output"] = Path(str(values["output"]))
        values["betas"] = tuple(values["betas"])
        layers = values["exit_layers"]
        values["exit_layers"] = tuple(layers) if isinstance(layers, list) else (layers,)
        values["start_from"] = None if values["start_from"] is None else str(Path(str(values["start_from"])).resolve())
        config = cls(**values)
        faults = [f"data: {fault}" for fault in ([] if config.data else ["empty list; name at least one file"])]
        whole = {f"model.{key}": config.model[key] for key in (*_MODEL_KEYS, "max_position_embeddings")}
        for key in ("sequence_length", "batch_size", "steps", "save_every", "validation_windows"):
            whole[key] = getattr(config, key)
        for key in ("max_document_bytes", "validate_every", "final_validation_windows", "max_steps_this_run"):
            if getattr(config, key) is not None:
                whole[key] = getattr(config, key)
        faults += [
            f"{key}: {value!r} must be a whole number from 1" for key, value in whole.items() if not _from_1(value)
        ]
        faults += [] if faults else config._relation_faults()
        if config.precision not in ("bf16", "fp32"):
            faults.append(f"precision: {config.precision!r} is not one of bf16, fp32")
        if faults:
            raise ValueError("\n  - ".join(["Nothing was trained:", *faults]))
        return config

    def _relation_faults(self) -> list[str]:
        """What is wrong between settings."""
        faults, model = [], self.model
        if model["hidden_size"] % (2 * model["num_attention_heads"]):
            faults.append(
                f"model.hidden_size: {model['hidden_size']} must be a multiple of twice num_attention_heads "
                f"({model['num_attention_heads']}); rotary embeddings need an even head"
            )
        if model["vocab_size"] < NUM_TOKENS:
            faults.append(
                f"model.vocab_size: {model['vocab_size']} must be at least {NUM_TOKENS}: bytes and the end token"
            )
        if self.sequence_length > model["max_position_embeddings"]:
            faults.append(
                f"sequence_length: {self.sequence_length} is more than model.max_position_embeddings "
                f"({model['max_position_embeddings']}); raise the one or lower the other"
            )
        if not 0 <= self.warmup_steps <= self.steps - self.decay_steps or self.decay_steps < 1:
            faults.append(
                f"warmup_steps, decay_steps: {self.warmup_steps} and {self.decay_steps} must be at least 0 and 1 and "
                f"together at most steps ({self.steps})"
            )
        wrong = [layer for layer in self.exit_layers if not _from_1(layer) or layer >= model["num_hidden_layers"]]
        if wrong:
            faults.append(
                f"exit_layers: {wrong} must be whole numbers from 1 to {model['num_hidden_layers'] - 1}, layers below "
                "the last one; [] for none"
            )
        if len(set(self.exit_layers)) < len(self.exit_layers):
            faults.append(f"exit_layers: {list(self.exit_layers)} names a layer twice; name each once")
        weight = self.exit_loss_weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            faults.append(
                f"exit_loss_weight: {weight!r} must be a number above 0; leave exit_layers empty for the final exit "
                "alone"
            )
        if self.start_from is not None and not (Path(self.start_from) / "config.json").is_file():
            faults.append(
                f"start_from: {self.start_from} has no config.json; name the directory `model` of a finished run, or "
                "leave it null to start from random weights"
            )
        return faults


def _from_1(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclasses.dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint beside weights and optimizer."""

    step: int  # steps done
    decay_start: int  # first step of the fall
    decay_steps: int  # its length

    @property
    def end(self) -> int:
        """Steps of the whole run."""
        return self.decay_start + self.decay_steps

    def learning_rate(self, config: PretrainConfig) -> float:
        """Of the step about to be made."""
        if self.step >= self.decay_start:
            return config.lr * (1 - math.sqrt((self.step - self.decay_start) / self.decay_steps))
        return config.lr * min(1.0, (self.step + 1) / max(1, config.warmup_steps))

    def resumed(self, stored: Progress) -> Progress:
        """Where a run stands that goes on from `stored` with the settings of `self`.

        A fall that has begun is finished as it was; before that the settings of now hold, so a run can be made longer
        or shorter.
        """
        if stored.step >= stored.decay_start:
            return stored
        return Progress(stored.step, max(self.decay_start, stored.step), self.decay_steps)

    def heed(self, request: Path) -> bool:
        """Start the fall if the file asks for it (its content, if any, is the number of steps); False once it runs.

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
