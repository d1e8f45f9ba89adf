# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A directory of an export as described by its config.json, for the verification of any format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nemo_ee.export.readings import Reading
from nemo_ee.runtime.model import RuntimeModel


@dataclass(frozen=True, kw_only=True)
class WrittenArtifact:
    """A written directory.

    Attributes:
        problems: problems of config.json and index.
        plan: tensors of its files and their origins; None = unknown, since config.json is damaged.
        files: files of weights -> prefix of their tensors' names in messages.
        dtype: dtype of every tensor.
        load: reads the directory as a model, to run it.
    """

    problems: Sequence[str]
    plan: Sequence[Reading] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    load: Callable[[Path], RuntimeModel] | None = None


def config_problems(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Fields of a config.json that differ from what the export writes."""
    for field_name in sorted(found.keys() | wanted.keys()):
        if field_name not in wanted:
            yield f"config.json: {field_name} does not belong there"
        elif field_name not in found:
            yield f"config.json: {field_name} is missing, must be {wanted[field_name]!r}"
        elif found[field_name] != wanted[field_name]:
            yield f"config.json: {field_name} is {found[field_name]!r}, must be {wanted[field_name]!r}"
