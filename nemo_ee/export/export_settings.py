# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of an export of any format, and their checks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import field_validator

from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.parity import DEFAULT_GIGABYTES
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.runtime.loader import DTYPES
from nemo_ee.settings.fields import Criterion, FilePath, Names, NonNegative
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Sentence, rule


class OutputSettings(ScriptInput):
    """The common keys of every export."""

    headline: ClassVar = "nothing was exported"

    checkpoint: Annotated[FilePath, rule("the name of an early-exit .nemo")]
    output: FilePath
    backbone: FilePath | None = None
    exits: Names | None = None
    progress: bool = True

    @field_validator("checkpoint")
    @classmethod
    def _exists(cls, checkpoint: Path) -> Path:
        if not checkpoint.exists():
            raise ValueError("does not exist; give an early-exit .nemo")
        return checkpoint

    @field_validator("output")
    @classmethod
    def _can_be_written(cls, output: Path) -> Path:
        if problems := _output_problems(output):
            raise Sentence(*problems)
        return output

    def wanted_exits(self, source: EarlyExitSource) -> list[ExitConfig]:
        """The exits to export."""
        return [exit for exit in source.exits.exits if self.exits is None or exit.name in self.exits]


class ExportSettings(OutputSettings):
    """The common keys of conf/export_huggingface.yaml and conf/export_tensorrt_llm.yaml."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    thresholds: float | dict[str, float] | None = None
    criterion: Criterion = "max_probability"
    parity_gigabytes: Annotated[NonNegative, rule("a number of GB, or 0 for no parity digest")] = DEFAULT_GIGABYTES

    def dtype_of(self, source: EarlyExitSource) -> torch.dtype:
        """The dtype to write."""
        return DTYPES[self.dtype] if self.dtype else source.dtype()


def _output_problems(output: Path) -> list[str]:
    problems = []
    if output.is_dir() and any(output.iterdir()):
        problems.append(f"output={output} is not empty; name a new directory")
    elif output.exists() and not output.is_dir():
        problems.append(f"output={output} is a file; name a new directory")
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        problems.append(f"output={output} cannot be written: {above} is no directory or not writable; choose another")
    return problems


def refuse(problems: Sequence[str]) -> None:
    """Raises ValueError with all problems, if there are any."""
    if problems:
        raise ValueError("nothing was exported:\n" + "\n".join(problems))


def unknown_exits(setting: str, names: Sequence[str] | None, source: EarlyExitSource) -> list[str]:
    """Problems of names in a setting that no exit has."""
    known = source.exits.names
    return [
        f"{setting}: no exit is called {name!r}; there are {', '.join(known) or 'none'}"
        for name in names or ()
        if name not in known
    ]
