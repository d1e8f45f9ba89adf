# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Certificates of an export: those of the loaded weights, and the check that a request is within their setting.

An export lists the certificates of its `.nemo` in manifest.json, beside the sha256 of every file. A certificate is
used only while those files are the exported ones, and only for requests inside the setting it was made in.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_ee.certificates.certificate import Certificate, Setting, named_certificate
from nemo_ee.certificates.validity import KV_POLICY, setting_problems, stop_problems
from nemo_ee.export.manifest import MANIFEST, read_manifest, sha256_of
from nemo_ee.generation.request import Request
from nemo_ee.serving.errors import ApiError
from nemo_ee.serving.protocol import ApiRequest
from nemo_ee.settings.user_input import shortened
from nemo_ee.text.special_tokens import EndOfText

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


def requested_certificate(certificates: Mapping[str, Certificate], wanted: object) -> Certificate:
    """The certificate a request names; see `named_certificate`.

    Raises:
        ApiError: 400, there is none.
    """
    certificate = named_certificate(certificates, wanted)
    if certificate is None:
        rule = "this model carries no certificate; give a threshold"
        if certificates:
            rule = f"its certificates are {', '.join(certificates)}; name one of them"
        raise ApiError(400, f"early_exit.certificate = {shortened(wanted)}: {rule}", param="early_exit")
    return certificate


def check_setting(
    certificate: Certificate, call: ApiRequest, requests: Sequence[Request], precision: str, end_of_text: EndOfText
) -> None:
    """Check a request against the setting its certificate was made in.

    Args:
        precision: precision of the weights: `32`, `bf16`, or another, for which no certificate is made.
        end_of_text: the tokens that end answers here.

    Raises:
        ApiError: 400, with every difference.
    """
    sampling = call.sampling
    given_sampling: dict[str, Any] = {"greedy": sampling.greedy, "repetition_penalty": sampling.repetition_penalty}
    if not sampling.greedy:
        given_sampling |= {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p}
    certified = certificate.setting.tokens_to_generate
    setting = Setting(
        mode="early_exit",
        kv=KV_POLICY,
        precision=precision,
        tokens_to_generate=certified,  # compared below, under its name in requests
        stop_on_eos=not call.ignore_eos,
        add_BOS=None,  # as the tokenizer does
        sampling=given_sampling,
    )
    problems = [*setting_problems(certificate, setting), *stop_problems(certificate, end_of_text)]
    others = sorted({request.max_new_tokens for request in requests} - {certified})
    problems += [f"max_tokens={requested}, certified max_tokens={certified}" for requested in others]
    given = {"stop": call.stops, "stop_token_ids": call.stop_token_ids, "min_tokens": call.min_tokens}
    given |= {key: getattr(sampling, key) for key in ("presence_penalty", "frequency_penalty", "logit_bias")}
    if not sampling.greedy:
        given["min_p"] = sampling.min_p
    problems += [f"{key} is given, certified without {key}" for key, value in given.items() if value]
    if problems:
        listed = "; ".join(problems)
        raise ApiError(
            400,
            f"certificate {certificate.name!r} does not cover this request: {listed}. Change it, or give a threshold",
            param="early_exit",
        )


def promise(certificate: Certificate) -> dict[str, Any]:
    """Summary of the guarantee, for answers and the model's card."""
    made = certificate.guarantee
    return {
        "name": certificate.name,
        "risk": made.risk,
        "epsilon": made.epsilon,
        "delta": made.delta,
        "max_tokens": certificate.setting.tokens_to_generate,
        "sampling": dict(certificate.setting.sampling),
    }
