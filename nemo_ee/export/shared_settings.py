# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What the exports have in common: settings, their checks, and what every manifest says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_ee.exits.config import ExitConfig
from nemo_ee.export.output_directory import output_faults
from nemo_ee.export.parity import DEFAULT_GIGABYTES, parity_setting_faults
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.runtime.loader import DTYPES


@dataclass(frozen=True)
class SharedSettings:
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
        problems += output_faults(self.output)
        if self.dtype is not None and self.dtype not in DTYPES:
            problems.append(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}, or null for the stored one")
        return problems + parity_setting_faults(self.parity_gigabytes)

    def dtype_of(self, source: EarlyExitSource) -> torch.dtype:
        """The dtype to write."""
        return DTYPES[self.dtype] if self.dtype else source.dtype()

    def wanted_exits(self, source: EarlyExitSource) -> list[ExitConfig]:
        """The exits to export."""
        return [exit for exit in source.exits.exits if self.exits is None or exit.name in self.exits]

    def manifest_facts(self, source: EarlyExitSource, dtype: torch.dtype) -> dict[str, Any]:
        """Entries of every manifest."""
        return {
            "source": {"checkpoint": self.checkpoint.name, "backbone_fingerprint": source.fingerprint},
            "dtype": str(dtype).removeprefix("torch."),
            "certificates": source.certificates,
        }


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
