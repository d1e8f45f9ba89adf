# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings that several scripts share: types besides those of `nemo_ee.settings.user_input`, and whole blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from nemo_ee.exits.criteria import CRITERIA
from nemo_ee.settings.user_input import Natural, Positive, Text, UserInput, rule


def as_text(value: Any) -> Any:
    """A whole number as a text: the command line gives 32 or 2024 as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def as_list(value: Any) -> Any:
    """A list of one value, for a list setting that is given one value."""
    return value if value is None or isinstance(value, tuple) else (value,)


def _as_path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and value.strip() else value


Label = Annotated[Text, BeforeValidator(as_text), rule("a text with something in it")]
Texts = tuple[Text, ...]
Names = Annotated[Texts, BeforeValidator(as_list), rule("a name, or a list of names")]
FilePath = Annotated[Path, BeforeValidator(_as_path), rule("the name of a file or directory")]
Files = Annotated[Texts, Field(min_length=1), BeforeValidator(as_list), rule("one or more names of files")]
ExitNames = Annotated[Texts | None, rule("a list of exits' names, or null")]
NonNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[BelowOne, BelowOne]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # numpy's largest seed
Criterion = Literal[CRITERIA]
Accelerator = Annotated[Literal["gpu", "cpu", "cuda", "auto"], BeforeValidator(as_text)]
Precision = Annotated[Literal["32", "32-true", "bf16", "bf16-mixed", "bf16-true"], BeforeValidator(as_text)]
Verify = Literal["stored", "full"]


def _exists(path: Path) -> Path:
    if path.exists():
        return path
    raise ValueError("does not exist; give an early-exit .nemo")


ModelFile = Annotated[FilePath, AfterValidator(_exists), rule("the name of an early-exit .nemo")]


class Schedule(UserInput):
    """`model.optim.sched`."""

    name: Literal["LinearAnnealing", "CosineAnnealing", "Constant"] | None
    warmup_steps: Natural | None
    min_lr: NonNegative | None
    max_steps: Positive | None = None


class Optimizer(UserInput):
    """`model.optim`."""

    name: Any
    lr: NonNegative | None
    betas: Betas | None
    eps: AboveZero | None
    weight_decay: NonNegative | None
    sched: Schedule


def _lists_exits(block: dict[str, Any] | None) -> dict[str, Any] | None:
    """The entries of the block are checked with the model, because they depend on its number of layers."""
    if block is None or isinstance(block.get("exits"), list | None):
        return block
    raise ValueError("must hold a list of exits under exits; write [{layer: 4}, {layer: 8, architecture: norm}]")


ExitsBlock = Annotated[dict[str, Any] | None, AfterValidator(_lists_exits)]


class Run(UserInput):
    """The `trainer` block of a script that runs one model."""

    accelerator: Accelerator
    devices: Positive
    num_nodes: Positive
    precision: Precision

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.devices * self.num_nodes


class StoredModel(UserInput):
    """The `model` block of a script that runs one model, read from a `.nemo`."""

    restore_from_path: ModelFile
    backbone_path: FilePath | None
    verify: Verify
    tensor_model_parallel_size: Positive
    pipeline_model_parallel_size: Positive
    transformer_engine: bool | None
    distributed_timeout_minutes: AboveZero
