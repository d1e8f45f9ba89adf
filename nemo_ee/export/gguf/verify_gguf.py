# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of an exported GGUF file against its metadata and its `.nemo`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_ee.checkpoint.gguf_file import GgufFile
from nemo_ee.export.gguf.gguf_exporter import GgufSettings, plan_export
from nemo_ee.export.gguf.gguf_writer import GgufArtifact, kind_of, packed, read_for
from nemo_ee.export.source import EarlyExitSource

_OWN = ("GGUF.", "general.name")  # keys about the file itself


def gguf_problems(path: Path, entry: Mapping[str, Any], dtype: str, source: EarlyExitSource | None) -> Iterator[str]:
    """All problems of a file besides those of its hash.

    Args:
        entry: its entry in the manifest.
        dtype: the manifest's dtype.
        source: the opened `.nemo`; None = the file is only read.

    Raises:
        ValueError: the file is damaged, or the `.nemo` cannot be exported.
    """
    file = GgufFile(path)
    if source is None:
        return
    exits = () if entry["exit"] is None else (entry["exit"],)
    targets = ("full",) if entry["exit"] is None else ("exits",)
    settings = GgufSettings.model_construct(checkpoint=source.path, targets=targets, exits=exits, dtype=dtype)
    (planned,) = plan_export(settings, source).artifacts
    yield from _metadata_problems(file, planned)
    yield from _tensor_problems(file, planned, dtype, source)


def _metadata_problems(file: GgufFile, planned: GgufArtifact) -> Iterator[str]:
    found = {key: value for key, value in file.metadata.items() if not key.startswith(_OWN)}
    wanted = {key: value for key, value in planned.metadata.items() if not key.startswith(_OWN)}
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            yield f"{key} is not that of the .nemo"


def _tensor_problems(file: GgufFile, planned: GgufArtifact, dtype: str, source: EarlyExitSource) -> Iterator[str]:
    wanted = {own.name: own.shape for reading in planned.plan for own in reading.written}
    wanted |= {name: (len(values),) for name, values in planned.extra.items()}
    for name in sorted(file.shapes.keys() | wanted.keys()):
        if file.shapes.get(name) != wanted.get(name):
            yield f"{name} has shape {file.shapes.get(name)}, must be {wanted.get(name)}"
            return
    for reading in planned.plan:
        kind = kind_of(reading, dtype)
        tensor = read_for(source, reading, kind) if reading.written else None
        for own in reading.written:
            stored, made = file.stored(own.name), packed(own, tensor, kind)
            if stored.dtype != made.dtype or stored.tobytes() != made.tobytes():
                yield f"{own.name} differs from {reading.origin.key} of the .nemo"
