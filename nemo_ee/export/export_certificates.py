# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Certificates of an export. It lists those of its `.nemo` in manifest.json, beside the sha256 of every file; they are
used only while those files are the exported ones."""

from __future__ import annotations

import logging
from pathlib import Path

from nemo_ee.certificates.certificate import Certificate
from nemo_ee.export.manifest import MANIFEST, read_manifest, sha256_of

_LOG = logging.getLogger(__name__)


def certificates_of(directory: Path) -> dict[str, Certificate]:
    """The certificates of the files in this directory, by name. Void ones are left out with a warning.

    Args:
        directory: `hf_early_exit/` of an export. Its files are hashed where there are certificates.

    Raises:
        ValueError: the manifest beside it, or a certificate in it, is damaged.
    """
    export = directory.resolve().parent
    if not (export / MANIFEST).is_file():
        return {}
    manifest = read_manifest(export)
    listed = manifest.get("certificates") or []
    found = [Certificate.from_mapping(values, str(export / MANIFEST)) for values in listed]
    if not found:
        return {}
    prefix = f"{directory.resolve().name}/"
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.startswith(prefix)}
    other = [name for name, digest in files.items() if not _is_file_of(export / name, digest)]
    if other or not files:
        _LOG.warning("the certificates are void: %s changed since the export", ", ".join(other) or prefix)
        return {}
    return {certificate.name: certificate for certificate in found}


def _is_file_of(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest
