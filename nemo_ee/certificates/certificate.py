# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Certificates: an exit policy, the bound on its risk, and the model and setting for which the bound holds.

One JSON file per certificate, `certificates/<name>.json` of a `.nemo`; saving a restored model keeps it, exports list
it in their manifest.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_ee.checkpoint.members import CERTIFICATES
from nemo_ee.checkpoint.nemo_archive import NemoArchive
from nemo_ee.checkpoint.portable import put_member
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.text.json_values import MAX_FILE_BYTES, JsonError, parse_json

SCHEMA_VERSION = 1
DEFAULT_NAME = "default"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}")


@dataclasses.dataclass(frozen=True)
class Identity:
    """The model of a certificate: sha256 of each part.

    Attributes:
        backbone, exits, tokenizer: fingerprints.
        probes: of the exits' probes; None = there are none. It counts for certificates of `criterion: probe`.
    """

    backbone: str
    exits: str
    tokenizer: str
    probes: str | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
    """The decoding setting of a certificate.

    Attributes:
        mode: `early_exit`.
        kv: method for keys and values of skipped layers: `carry` (exact).
        precision: `32` or `bf16`.
        tokens_to_generate: most new tokens per prompt; losses are means over them.
        stop_on_eos, add_BOS: as in the generation yaml.
        sampling: greedy, temperature, top_k, top_p, repetition_penalty (no seed).
        stop_tokens: ids that ended an answer, sorted; None = the tokenizer's end-of-text token alone, as in
            certificates of earlier versions, or nothing (`stop_on_eos`).
    """

    mode: str
    kv: str
    precision: str
    tokens_to_generate: int
    stop_on_eos: bool
    add_BOS: bool | None
    sampling: Mapping[str, Any]
    stop_tokens: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """The guarantee: with probability 1 - delta over the calibration prompts, the expected risk is at most epsilon.

    Attributes:
        risk: name of the risk: `disagreement`, `nll_excess` or `task`.
        definition: the risk in words.
        epsilon, delta: bound on the risk, and probability that the bound does not hold.
        empirical_risk: mean loss over the calibration prompts.
        p_value: p-value of the null hypothesis "the risk is greater than epsilon"; None for full depth.
        mean_depth: layers per token on the calibration prompts.
        num_layers: number of the model's layers.
        answer_until: the task risk compares answers up to this text; None = whole answers.
    """

    risk: str
    definition: str
    epsilon: float
    delta: float
    empirical_risk: float
    p_value: float | None
    mean_depth: float
    num_layers: int
    answer_until: str | None = None


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A certificate.

    Attributes:
        name: name under which it is stored.
        created: date, ISO 8601.
        model: the fingerprints.
        setting: the decoding setting.
        criterion, thresholds, max_pending_tokens: the policy; no thresholds = full depth.
        guarantee: the bound on the risk.
        data: sha256, num_prompts, and the origin of the prompts.
        free_running: measurements of free decoding, without a guarantee.
    """

    name: str
    created: str
    model: Identity
    setting: Setting
    criterion: str
    thresholds: Mapping[str, float]
    max_pending_tokens: int | None
    guarantee: Guarantee
    data: Mapping[str, Any]
    free_running: Mapping[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    def policy(self) -> ExitPolicy:
        """The certified policy; a policy without exits if only full depth was certified."""
        return ExitPolicy(
            dict(self.thresholds),
            criterion=self.criterion,
            active=tuple(self.thresholds),
            max_pending_tokens=self.max_pending_tokens,
        )

    def to_mapping(self) -> dict[str, Any]:
        """The certificate as plain JSON values."""
        values = dataclasses.asdict(self)
        if self.model.probes is None:
            del values["model"]["probes"]
        stops = values["setting"].pop("stop_tokens")
        if stops is not None:
            values["setting"]["stop_tokens"] = list(stops)
        return values

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> Certificate:
        """Read what `to_mapping` wrote.

        Args:
            source: name for errors.

        Raises:
            ValueError: the values are damaged, or of another schema version.
        """
        version = values.get("schema_version") if isinstance(values, Mapping) else None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{source}: schema version {version!r}, this code reads {SCHEMA_VERSION}; calibrate again"
            )
        try:
            known = dict(values)
            if "max_waiting" in known and "max_pending_tokens" not in known:  # the name in files of earlier versions
                known["max_pending_tokens"] = known.pop("max_waiting")
            for key, kind in (("model", Identity), ("setting", Setting), ("guarantee", Guarantee)):
                known[key] = kind(**known[key])
            stops = known["setting"].stop_tokens
            if stops is not None:
                if not isinstance(stops, list) or not all(type(one) is int for one in stops):
                    raise ValueError(f"stop_tokens is {stops!r}, not a list of token ids")
                known["setting"] = dataclasses.replace(known["setting"], stop_tokens=tuple(sorted(stops)))
            result = cls(**known)
            check_name(result.name)
            result.policy()
            if not isinstance(result.setting.sampling, Mapping):
                raise ValueError(f"sampling is {result.setting.sampling!r}, not settings by name")
        except KeyError as problem:
            raise ValueError(f"{source}: damaged (no {problem}); calibrate again") from problem
        except (TypeError, ValueError, AttributeError) as problem:
            raise ValueError(f"{source}: damaged ({problem}); calibrate again") from problem
        return result


def check_name(name: object) -> None:
    """Raises ValueError unless `name` is a valid name of a certificate."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"certificate name {name!r} must match {_NAME.pattern}")


def member_of(name: str) -> str:
    """The member of a `.nemo` that holds the certificate of this name."""
    return f"{CERTIFICATES}/{name}.json"


def read_certificates(archive: NemoArchive) -> dict[str, Certificate]:
    """All certificates of a `.nemo` by name.

    Raises:
        ValueError: a certificate is damaged.
    """
    found = {}
    for member in sorted(archive.members()):
        if member.startswith(f"{CERTIFICATES}/") and member.endswith(".json"):
            source = f"{archive.path}: {member}"
            with archive.open_member(member) as file:
                try:
                    values = parse_json(file.read(MAX_FILE_BYTES))
                except JsonError as problem:
                    raise ValueError(f"{source}: damaged ({problem}); calibrate again") from problem
            certificate = Certificate.from_mapping(values, source)
            if member != member_of(certificate.name):
                raise ValueError(f"{source}: damaged (it is named {certificate.name!r}); calibrate again")
            found[certificate.name] = certificate
    return found


def named_certificate(certificates: Mapping[str, Certificate], wanted: object) -> Certificate | None:
    """The certificate of a name; None = there is none of that name.

    Args:
        certificates: all certificates by name.
        wanted: the name; True = the only one, or the one named `default`.
    """
    if wanted is True and len(certificates) == 1:
        return next(iter(certificates.values()))
    name = DEFAULT_NAME if wanted is True else wanted
    return certificates.get(name) if isinstance(name, str) else None


def find_certificate(path: str | Path, wanted: bool | str) -> Certificate:
    """A certificate of a `.nemo`.

    Args:
        wanted: see `named_certificate`.

    Raises:
        ValueError: there is no such certificate, or there are several and `wanted` is True.
    """
    with NemoArchive(path) as archive:
        found = read_certificates(archive)
    certificate = named_certificate(found, wanted)
    if certificate is None:
        name = DEFAULT_NAME if wanted is True else wanted
        has = f"its certificates are {', '.join(found)}" if found else "it has none"
        raise ValueError(
            f"{path} has no certificate {name!r}, {has}; name one of them, or make one with "
            "examples/megatron_gpt_early_exit_calibrate.py"
        )
    return certificate


def store_certificate(path: str | Path, certificate: Certificate, output: str | Path | None = None) -> Path:
    """Put a certificate into a `.nemo`; see `nemo_ee.checkpoint.portable.put_member`."""
    return put_member(path, member_of(certificate.name), certificate_text(certificate).encode(), output)


def certificate_text(certificate: Certificate) -> str:
    """The JSON text. A number that is not finite is an error: JSON has no infinities."""
    for value in (certificate.guarantee.empirical_risk, certificate.guarantee.mean_depth):
        assert math.isfinite(value), value
    return json.dumps(certificate.to_mapping(), indent=2, allow_nan=False) + "\n"
