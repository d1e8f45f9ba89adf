# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The probes of a `.nemo` (`criterion: probe`), which are valid for the weights they were fitted to.

They are one member, `exit_probes.json`, with the fingerprints of backbone and exits and the sha256 of the prompts they
were fitted on. Saving a restored model keeps it, as it keeps certificates; after another tuning the fingerprints
differ, and the probes are refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nemo_ee.certificates.certificate import Identity
from nemo_ee.certificates.validity import identify
from nemo_ee.checkpoint.members import PROBES
from nemo_ee.checkpoint.nemo_archive import NemoArchive
from nemo_ee.checkpoint.portable import plain_config, put_member
from nemo_ee.exits.probe import ExitProbe, from_file, to_file
from nemo_ee.text.json_values import MAX_FILE_BYTES, JsonError, parse_json

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
    path: str | Path,
    probes: Mapping[str, ExitProbe],
    data: str,
    fitted_to: Identity,
    output: str | Path | None = None,
) -> Path:
    """Put probes into a `.nemo` in place of older ones; see `nemo_ee.checkpoint.portable.put_member`.

    Args:
        data: sha256 of the file of prompts.
        fitted_to: `identify` of the file before its weights were read.
        output: the file to write; None = `path` itself.

    Raises:
        ValueError: the file has other weights now.
    """
    found = identify(path)
    if (found.backbone, found.exits) != (fitted_to.backbone, fitted_to.exits):
        raise ValueError(f"{path} was replaced while the probes were fitted, so nothing was stored; fit them again")
    facts = {"backbone": found.backbone, "exits": found.exits, "data": data}
    return put_member(path, PROBES, json.dumps(to_file(probes, facts), allow_nan=False).encode(), output)


def stored_probes(path: str | Path) -> StoredProbes | None:
    """The probes of a `.nemo`, valid or not; None = there are none.

    Raises:
        ValueError: they are damaged.
    """
    with NemoArchive(path) as archive:
        if not archive.has(PROBES):
            return None
        hidden_size = plain_config(archive)["hidden_size"]
        with archive.open_member(PROBES) as file:
            content = file.read(MAX_FILE_BYTES)
    try:
        values = parse_json(content)
        probes = from_file(values, hidden_size)
        return StoredProbes(probes, *(values[key] for key in ("backbone", "exits", "data")), values)
    except (JsonError, KeyError, ValueError) as problem:
        raise ValueError(f"{path}: {PROBES} is damaged ({problem}); fit the probes again") from problem


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
