# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What a user sets for an export of any format, and its checks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.parity import DEFAULT_GIGABYTES, parity_setting_problems
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.runtime.loader import DTYPES


@dataclass(frozen=True)
class ExportSettings:
    """See conf/export_huggingface.yaml and conf/export_tensorrt_llm.yaml."""

    checkpoint: Path
    output: Path
    backbone: Path | None = None
    exits: tuple[str, ...] | None = None
    dtype: str | None = None
    thresholds: float | Mapping[str, float] | None = None
    criterion: str = "max_probability"
    parity_gigabytes: float = DEFAULT_GIGABYTES
    progress: bool = True

    def problems(self) -> list[str]:
        """What is wrong with the settings, seen before the checkpoint is opened."""
        problems = []
        if not self.checkpoint.exists():
            problems.append(f"checkpoint={self.checkpoint} does not exist; give an early-exit .nemo")
        problems += _output_problems(self.output)
        if self.dtype is not None and self.dtype not in DTYPES:
            problems.append(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}, or null for the stored one")
        return problems + parity_setting_problems(self.parity_gigabytes)

    def dtype_of(self, source: EarlyExitSource) -> torch.dtype:
        """The dtype to write."""
        return DTYPES[self.dtype] if self.dtype else source.dtype()

    def wanted_exits(self, source: EarlyExitSource) -> list[ExitConfig]:
        """The exits to export."""
        return [exit for exit in source.exits.exits if self.exits is None or exit.name in self.exits]


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
    """Raises ValueError with all of them, if there are any."""
    if problems:
        raise ValueError("nothing was exported:\n" + "\n".join(problems))


def unknown_exits(setting: str, names: Sequence[str] | None, source: EarlyExitSource) -> list[str]:
    """Names in a setting that no exit has."""
    known = source.exits.names
    return [
        f"{setting}: no exit is called {name!r}; there are {', '.join(known) or 'none'}"
        for name in names or ()
        if name not in known
    ]
