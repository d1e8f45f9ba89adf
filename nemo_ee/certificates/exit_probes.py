# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The probes of a `.nemo` (`criterion: probe`), which are valid for the weights they were fitted to.

They are one member, `exit_probes.json`, with the fingerprints of backbone and exits and the sha256 of the prompts they
were fitted on. Saving a restored model keeps it, as it keeps certificates; after another tuning
the fingerprints differ, and the probes are refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nemo_ee.certificates.certificate import Identity
from nemo_ee.certificates.validity import identify
from nemo_ee.checkpoint.nemo_archive import NemoArchive
from nemo_ee.checkpoint.portable import put_member
from nemo_ee.exits.criteria import PROBES_FILE
from nemo_ee.exits.probe import ExitProbe, from_mapping, to_mapping
from nemo_ee.text.json_values import MAX_FILE_BYTES, JsonError, parse_json

SCHEMA_VERSION = 1
FIT = "examples/megatron_gpt_early_exit_probe.py"


@dataclasses.dataclass(frozen=True)
class StoredProbes:
    """The probes of a file.

    Attributes:
        probes: by the names of their exits.
        backbone, exits: fingerprints of the weights they were fitted to.
        data: sha256 of the file of prompts they were fitted on.
        values: the content of the member.
    """

    probes: Mapping[str, ExitProbe]
    backbone: str
    exits: str
    data: str
    values: dict[str, Any]

    def problem(self, found: Identity) -> str | None:
        """Why the probes are void for these weights; None = they are valid."""
        if (self.backbone, self.exits) == (found.backbone, found.exits):
            return None
        return f"the weights have been changed or tuned since the probes were fitted; fit them again with {FIT}"


def store_probes(
    path: str | Path, probes: Mapping[str, ExitProbe], data: str, output: str | Path | None = None
) -> Path:
    """Put probes into a `.nemo` in place of older ones; see `nemo_ee.checkpoint.portable.put_member`.

    Args:
        data: sha256 of the file of prompts.
        output: the file to write; None = `path` itself.
    """
    found = identify(path)
    values = {"schema_version": SCHEMA_VERSION, "backbone": found.backbone, "exits": found.exits, "data": data}
    text = json.dumps({**values, "probes": to_mapping(probes)}, allow_nan=False)
    return put_member(path, PROBES_FILE, text.encode(), output)


def stored_probes(path: str | Path) -> StoredProbes | None:
    """The probes of a `.nemo`, valid or not; None = there are none.

    Raises:
        ValueError: they are damaged.
    """
    with NemoArchive(path) as archive:
        if not archive.has(PROBES_FILE):
            return None
        with archive.open_member(PROBES_FILE) as file:
            content = file.read(MAX_FILE_BYTES)
    try:
        values = parse_json(content)
        if values["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {values['schema_version']!r}, this code reads {SCHEMA_VERSION}")
        keys = ("backbone", "exits", "data")
        return StoredProbes(from_mapping(values["probes"]), *(values[key] for key in keys), values)
    except (JsonError, KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{path}: {PROBES_FILE} is damaged ({problem}); fit the probes again") from problem


def valid_probes(path: str | Path, names: Collection[str] | None = None) -> StoredProbes:
    """The probes of a `.nemo` for its present weights.

    Args:
        names: exits that need one; None = those that have one.

    Raises:
        ValueError: there are none, an exit of `names` has none, or the weights have been changed since.
    """
    stored = stored_probes(path)
    if stored is None:
        raise ValueError(f"{path} has no probes, which criterion=probe needs; fit them with {FIT}")
    problem = stored.problem(identify(path))
    missing = sorted(set(names or ()) - stored.probes.keys())
    if problem is None and missing:
        problem = f"exit {', '.join(missing)} has no probe; fit one with {FIT}, or leave the exit out"
    if problem is not None:
        raise ValueError(f"{path}: {problem}")
    return stored
