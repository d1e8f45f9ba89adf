# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`manifest.json` of an export: its contents, the sha256 of every file, its origin, and what was verified.

The manifest is written last, so a directory with a manifest is complete.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from nemo_ee.checkpoint.atomic import write_json
from nemo_ee.text.json_values import read_json_object

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_EARLIER_KEY = "artefacts"  # the key of `artifacts` in manifests of earlier versions
_BLOCK = 4 << 20


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(directory: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Hash every file below `directory` and write the manifest.

    Args:
        facts: further top-level entries, plain JSON values.

    Returns:
        The content of the manifest.
    """
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    manifest = {"schema_version": SCHEMA_VERSION, **facts, "files": files}
    write_json(directory / MANIFEST, manifest, indent=1)
    return manifest


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of an export.

    Raises:
        ValueError: the manifest is absent, damaged, or of another schema version.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory}: no {MANIFEST}, so this is not a complete export; give the output of an export")
    try:
        manifest = read_json_object(path)
        version = manifest["schema_version"]
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path}: damaged ({problem!r}); export again") from problem
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema version {version!r}, this code reads {SCHEMA_VERSION}; export again")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in entries):
        raise ValueError(f"{path}: refused, a file name lies outside of the export")
    if _EARLIER_KEY in manifest:
        manifest["artifacts"] = manifest.pop(_EARLIER_KEY)
    return manifest


def file_problems(directory: str | Path, manifest: dict[str, Any]) -> list[str]:
    """Files that are missing, changed, or not in the manifest."""
    directory, problems = Path(directory), []
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, but {entry['bytes']} in the manifest")
        elif sha256_of(path) != entry["sha256"]:
            problems.append(f"{name} has another sha256 than in the manifest")
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    return problems + [f"{name} is not in the manifest" for name in sorted(found - {*manifest["files"], MANIFEST})]
