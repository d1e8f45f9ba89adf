# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Check an export: hashes, config fields, names, shapes, shards and parity; with its `.nemo`, every number.

A directory without problems is what its format asks for. What it computes is run by nemo_ee's own runtime, where the
manifest states a parity digest; it is not loaded into the library it is for.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError

from nemo_ee.export.huggingface import verify_huggingface
from nemo_ee.export.huggingface.stock_config import FORMAT
from nemo_ee.export.manifest import file_problems, read_manifest
from nemo_ee.export.parity import DEFAULT_GIGABYTES
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.export.tensorrt_llm import verify_tensorrt_llm

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)


def verify_export(
    directory: str | Path,
    checkpoint: str | Path | None = None,
    backbone: str | Path | None = None,
    *,
    parity_gigabytes: float = DEFAULT_GIGABYTES,
) -> list[str]:
    """Every problem found, none for a good export.

    Args:
        directory: output of an export.
        checkpoint: the `.nemo` it was made from, to compare the weights with.
        backbone: see `EarlyExitSource`.
        parity_gigabytes: see `nemo_ee.export.parity`; a larger model is not run, and a warning says so.

    Raises:
        ValueError: no manifest, a wrong setting, or the `.nemo` cannot be read.
    """
    if not parity_gigabytes >= 0:
        raise ValueError(f"parity_gigabytes={parity_gigabytes} must be a number of GB, or 0 for no parity digest")
    directory = Path(directory)
    manifest = read_manifest(directory)
    problems = file_problems(directory, manifest)
    with ExitStack() as stack:
        source = None
        if checkpoint is not None:
            source = stack.enter_context(EarlyExitSource(checkpoint, backbone, option="--backbone"))
            made_of = manifest.get("source", {}).get("backbone_fingerprint")
            if None not in (made_of, source.fingerprint) and made_of != source.fingerprint:
                problems.append(f"made from the backbone {made_of}, but {checkpoint} has {source.fingerprint}")
        # An export can be told the length that a model is used with; the `.nemo` does not say it.
        shared = {"max_position_embeddings": manifest.get("max_position_embeddings")}
        for artifact in manifest.get("artifacts", []):
            name, check = str(artifact.get("directory")), verify_tensorrt_llm.artifact_problems
            if artifact.get("format") == FORMAT:
                check = verify_huggingface.artifact_problems
            try:
                found = check(directory / name, shared | artifact, source, parity_gigabytes=parity_gigabytes)
                problems += [f"{name}: {problem}" for problem in found]
            except _UNREADABLE as problem:
                problems.append(f"{name}: cannot be read ({problem!r})")
    return problems
