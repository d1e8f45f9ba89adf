# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What a request takes from the `.nemo` beside its weights: a certificate's policy, and probes; or all reasons against
it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from nemo_ee.certificates.certificate import Certificate, find_certificate
from nemo_ee.certificates.exit_probes import valid_probes
from nemo_ee.certificates.validity import identify, model_problems, setting_of, setting_problems, stop_problems
from nemo_ee.checkpoint.tokenizer_files import stored_end_of_text
from nemo_ee.commands.generation_request import GenerationRequest
from nemo_ee.exits.probe import ExitProbe

logger = logging.getLogger(__name__)


def with_certificate(request: GenerationRequest) -> GenerationRequest:
    """The request with the policy of the certificate that it names; unchanged if it names none.

    Raises:
        ValueError: no such certificate, or it is for another model or (without `allow_other_setting`) another
            setting; all reasons in one message.
    """
    wanted, path = request.certificate, request.path
    if wanted in (None, False):
        return request
    certificate = find_certificate(path, wanted)
    problems = list(model_problems(certificate, identify(path)))
    outside = [
        *setting_problems(certificate, setting_of(request, request.mode)),
        *_length_problems(certificate, request),
    ]
    outside += stop_problems(certificate, stored_end_of_text(path))
    if outside and not request.allow_other_setting:
        way_out = "change it, or set allow_other_setting=True to run without the guarantee"
        problems += [f"{one}; {way_out}" for one in outside]
    if problems:
        listed = "\n".join(f"  {one}" for one in problems)
        raise ValueError(f"certificate {certificate.name!r} of {path} does not hold here:\n{listed}")
    for one in outside:
        logger.warning("certificate %r: %s; its guarantee does not hold for this run", certificate.name, one)
    guarantee, thresholds = certificate.guarantee, dict(certificate.thresholds)
    logger.info(
        "certificate %r: %s at most %g with confidence %g, %s", certificate.name, guarantee.risk, guarantee.epsilon,
        1 - guarantee.delta, f"thresholds {thresholds}" if thresholds else "full depth",
    )  # fmt: skip
    policy = certificate.policy()
    chosen = {"threshold": policy.thresholds, "exits": policy.active, "mode": request.mode if thresholds else "full"}
    caps = ("max_pending_tokens", "num_draft_tokens")
    own, other = reversed(caps) if request.mode == "self_speculative" else caps
    return request.model_copy(
        update=chosen | {"criterion": policy.criterion, own: policy.max_pending_tokens, other: None}
    )


def _length_problems(certificate: Certificate, request: GenerationRequest) -> Iterator[str]:
    """Settings by which an answer ends at another place than in calibration."""
    if request.min_tokens_to_generate:
        yield f"min_tokens_to_generate={request.min_tokens_to_generate}, certified min_tokens_to_generate=0"
    # With answer_until the text after it does not count, so an answer may end there.
    until = certificate.guarantee.answer_until
    if request.end_strings and (until is None or request.end_strings != (until,)):
        allowed = "[]" if until is None else f"[] or {[until]}"
        yield f"end_strings={list(request.end_strings)}, certified end_strings={allowed}"


def probes_of(request: GenerationRequest) -> Mapping[str, ExitProbe]:
    """The probes that `criterion: probe` needs.

    Raises:
        ValueError: the model has none for its weights, or runs on several pipeline stages.
    """
    stages = request.model.pipeline_model_parallel_size
    if stages > 1:
        raise ValueError(
            f"criterion=probe reads hidden states, which stay on their stage, but model.pipeline_model_parallel_size="
            f"{stages}; set it to 1 and share the layers with model.tensor_model_parallel_size"
        )
    return valid_probes(request.path).probes
