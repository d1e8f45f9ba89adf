# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The certificate that a request names, and the check that the request is within the setting it was made in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ee.certificates.certificate import Certificate, Setting, named_certificate
from nemo_ee.certificates.validity import KV_POLICY, setting_problems, stop_problems
from nemo_ee.generation.request import Request
from nemo_ee.serving.errors import ApiError
from nemo_ee.serving.protocol import ApiRequest
from nemo_ee.settings.user_input import shortened
from nemo_ee.text.special_tokens import EndOfText


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
