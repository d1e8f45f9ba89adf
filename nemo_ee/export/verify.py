# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks an export: hashes, config fields, names, shapes, shards and parity; with its `.nemo`, every number.

A directory or GGUF file without problems conforms to its format. nemo_ee's runtime runs its model if the manifest has
a parity digest. Nothing is loaded into the library of its format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_ee.export.content_digest import ContentDigest
from nemo_ee.export.gguf.gguf_exporter import FORMAT as GGUF
from nemo_ee.export.gguf.verify_gguf import gguf_problems
from nemo_ee.export.huggingface import verify_huggingface
from nemo_ee.export.huggingface.stock_config import FORMAT
from nemo_ee.export.manifest import file_problems, read_manifest
from nemo_ee.export.parity import DEFAULT_GIGABYTES, parity_problems
from nemo_ee.export.readings import Reading, shapes_by_file
from nemo_ee.export.safetensors_writer import DTYPE_NAMES, header_problems
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.export.tensorrt_llm import verify_tensorrt_llm
from nemo_ee.export.written import WrittenArtifact

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)


def verify_export(
    directory: str | Path,
    checkpoint: str | Path | None = None,
    backbone: str | Path | None = None,
    *,
    parity_gigabytes: float = DEFAULT_GIGABYTES,
) -> list[str]:
    """All problems of an export; an empty list for a good one.

    Args:
        directory: output of an export.
        checkpoint: the `.nemo` it was made from, to compare the weights with.
        backbone: see `EarlyExitSource`.
        parity_gigabytes: see `nemo_ee.export.parity`; a larger model is not run, with a warning.

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
        # The sequence length may be a setting of the export, which the `.nemo` does not have.
        shared = {"max_position_embeddings": manifest.get("max_position_embeddings")}
        for entry in manifest.get("artifacts", []):
            name = str(entry.get("directory") or entry.get("file"))
            try:
                if entry.get("format") == GGUF:
                    found = gguf_problems(directory / name, entry, manifest["dtype"], source)
                else:
                    found = _artifact_problems(directory / name, shared | entry, source, parity_gigabytes)
                problems += [f"{name}: {problem}" for problem in found]
            except _UNREADABLE as problem:
                problems.append(f"{name}: cannot be read ({problem!r})")
    return problems


def _artifact_problems(
    folder: Path, entry: Mapping[str, Any], source: EarlyExitSource | None, parity_gigabytes: float
) -> list[str]:
    """All problems of a directory; `entry`: its entry in the manifest."""
    # Manifests of earlier versions name only one of the two formats.
    format_of = verify_huggingface if entry.get("format") == FORMAT else verify_tensorrt_llm
    written = format_of.written_artifact(folder, entry, source)
    problems = list(written.problems)
    if written.plan is None:
        return problems
    expected = shapes_by_file(written.plan)
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for name, shown in written.files.items():
            if not (folder / name).is_file():
                problems.append(f"{name} is missing")
                continue
            files[name] = stack.enter_context(safe_open(folder / name, framework="pt", device="cpu"))
            wrong = header_problems(files[name], expected.get(name, {}), written.dtype)
            problems += [f"{shown}{problem}" for problem in wrong]
        if not problems:
            problems += _weight_problems(written, files, source, entry.get("digest"))
    if not problems:
        problems += parity_problems(entry.get("parity"), folder, written.load, parity_gigabytes=parity_gigabytes)
    return problems


def _weight_problems(
    written: WrittenArtifact, files: Mapping[str, Any], source: EarlyExitSource | None, stated: str | None
) -> Iterator[str]:
    """Numbers that differ from the `.nemo`'s, and a digest that differs from the manifest's.

    Args:
        source: the opened `.nemo`; None = only the digest of the files is checked.
        stated: the manifest's digest, if it has one.
    """
    if source is None and stated is None:
        return
    digest, holder = ContentDigest(), "the files" if source is None else "the .nemo"
    for reading in written.plan:
        if reading.written:
            yield from _reading_problems(reading, written, files, source, digest if stated else None)
    if stated is not None and digest.hexdigest() != stated:
        yield f"the manifest's digest is {stated}, that of {holder} is {digest.hexdigest()}"


def _reading_problems(
    reading: Reading,
    written: WrittenArtifact,
    files: Mapping[str, Any],
    source: EarlyExitSource | None,
    digest: ContentDigest | None,
) -> Iterator[str]:
    origin = reading.origin
    where = origin.key if origin.layer is None else f"{origin.key}, layer {origin.layer + 1},"
    tensor = None
    if source is not None:
        if source.shape(origin) is None:
            yield f"{where} is not in the .nemo"
            return
        tensor = source.read(origin, reading.shape, written.dtype)
    for own in reading.written:
        stored = files[own.file].get_tensor(own.name)
        made = stored if tensor is None else torch.cat(list(own.chunks(tensor)))
        if digest is not None:
            for _ in digest.passing(own.name, DTYPE_NAMES[written.dtype], own.shape, [made]):
                pass
        if tensor is not None and not torch.equal(stored, made):
            yield f"{written.files[own.file]}{own.name} differs from {where} of the .nemo"
