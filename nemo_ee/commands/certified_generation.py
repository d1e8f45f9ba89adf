# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Generation under a certificate: the request with the certificate's policy, or every reason why it is not valid."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_ee.certificates.certificate import Certificate, find_certificate
from nemo_ee.certificates.validity import identify, model_problems, setting_of, setting_problems, stop_problems
from nemo_ee.checkpoint.tokenizer_files import stored_end_of_text
from nemo_ee.commands.generation_request import GenerationRequest

logger = logging.getLogger(__name__)


def with_certificate(request: GenerationRequest, config: Mapping[str, Any]) -> GenerationRequest:
    """The request with the policy of a certificate, if its config asks for one.

    Args:
        request: made from `config`, which is thereby checked.
        config: conf/megatron_gpt_early_exit_generate.yaml as plain containers; `certificate` and
            `allow_other_setting` are read.

    Raises:
        ValueError: no such certificate, or it is about another model or (without `allow_other_setting`) another
            setting; all reasons in one message.
    """
    wanted, path = config["certificate"], request.path
    faults = []
    if not isinstance(wanted, bool | str | None):
        faults.append(f"certificate={wanted!r} must be True, a name, or null")
    if not isinstance(config["allow_other_setting"], bool):
        faults.append(f"allow_other_setting={config['allow_other_setting']!r} must be True or False")
    if faults:
        raise ValueError("nothing was generated:\n" + "\n".join(f"  {one}" for one in faults))
    if wanted in (None, False):
        return request
    certificate = find_certificate(path, wanted)
    faults = list(model_problems(certificate, identify(path)))
    outside = [*setting_problems(certificate, setting_of(config)), *_length_faults(certificate, request)]
    outside += stop_problems(certificate, stored_end_of_text(path))
    if outside and not config["allow_other_setting"]:
        way_out = "change it, or set allow_other_setting=True to run without the guarantee"
        faults += [f"{one}; {way_out}" for one in outside]
    if faults:
        listed = "\n".join(f"  {one}" for one in faults)
        raise ValueError(f"certificate {certificate.name!r} of {path} does not hold here:\n{listed}")
    for one in outside:
        logger.warning("certificate %r: %s; its guarantee does not hold for this run", certificate.name, one)
    promise, thresholds = certificate.guarantee, dict(certificate.thresholds)
    logger.info(
        "certificate %r: %s at most %g with confidence %g, %s", certificate.name, promise.risk, promise.epsilon,
        1 - promise.delta, f"thresholds {thresholds}" if thresholds else "full depth",
    )  # fmt: skip
    return dataclasses.replace(request, policy=certificate.policy(), mode=request.mode if thresholds else "full")


def _length_faults(certificate: Certificate, request: GenerationRequest) -> Iterator[str]:
    """Where answers end that ran on in calibration, or run on where they ended."""
    if request.min_new_tokens:
        yield f"min_tokens_to_generate={request.min_new_tokens}, certified min_tokens_to_generate=0"
    # An answer that is compared up to a text may end there.
    until = certificate.guarantee.answer_until
    if request.end_strings and (until is None or request.end_strings != (until,)):
        allowed = "[]" if until is None else f"[] or {[until]}"
        yield f"end_strings={list(request.end_strings)}, certified end_strings={allowed}"
