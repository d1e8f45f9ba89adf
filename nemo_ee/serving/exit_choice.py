# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""From a request's `early_exit` field and the server's defaults to a mode and a policy for the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_ee.certificates.certificate import Certificate
from nemo_ee.generation.decoding_model import DecodingModel
from nemo_ee.generation.policy import ExitPolicy, plan_exits
from nemo_ee.serving.errors import ApiError
from nemo_ee.serving.protocol import EarlyExit
from nemo_ee.serving.request_certificates import requested_certificate
from nemo_ee.settings.user_input import shortened

_OTHER_KEYS = ("max_pending_tokens", "num_draft_tokens", "draft_rule")
# Options each mode ignores. Passing one is an error, so that users do not think it had an effect.
_UNUSED = {
    "full": ("threshold", "certificate", "exits", *_OTHER_KEYS),
    "static_depth": ("threshold", "certificate", *_OTHER_KEYS),
    "self_speculative": ("certificate", "max_pending_tokens"),
    "early_exit": ("num_draft_tokens", "draft_rule"),
}


@dataclass(frozen=True)
class ExitChoice:
    """Mode and policy of a request, and the certificate they come from, if any."""

    mode: str
    policy: ExitPolicy
    certificate: Certificate | None = None


def exit_choice(
    given: EarlyExit | None, model: DecodingModel, default: ExitChoice, certificates: Mapping[str, Certificate]
) -> ExitChoice:
    """Check the field against the model.

    Args:
        given: the request's `early_exit`; None or without keys = the server's defaults.
        model: the served model, for its exits.
        default: the server's choice; also for keys that are not given.
        certificates: the model's, by name.

    Raises:
        ApiError: 400, with every problem.
    """
    keys = {} if given is None else {key: getattr(given, key) for key in given.model_fields_set}
    if not keys:
        return default
    # A threshold or a certificate implies early exit, also where the server's own mode is another.
    keeps = default.mode in ("early_exit", "self_speculative") and "certificate" not in keys
    mode = keys.get("mode", default.mode if keeps else "early_exit")
    problems = list(_problems(keys, mode, [point.name for point in model.exits]))
    if problems:
        raise ApiError(400, "; ".join(problems), param="early_exit")
    if "certificate" in keys:
        certificate = requested_certificate(certificates, keys["certificate"])
        # Without thresholds only full depth was certified.
        return ExitChoice("early_exit" if certificate.thresholds else "full", certificate.policy(), certificate)
    try:
        policy = ExitPolicy(
            # The server's threshold may be invalid for the request's criterion; 0 is valid for every criterion.
            0.0 if "threshold" in _UNUSED[mode] else keys.get("threshold", default.policy.thresholds),
            criterion=keys.get("criterion", default.policy.criterion),
            active=keys.get("exits", default.policy.active),
            **{key: keys.get(key, getattr(default.policy, key)) for key in _OTHER_KEYS if key not in _UNUSED[mode]},
        )
        plan_exits(mode, policy, model.exits, model.num_layers)
    except ValueError as problem:
        raise ApiError(400, f"early_exit: {problem}", param="early_exit") from None
    return ExitChoice(mode, policy)


def _problems(keys: Mapping[str, Any], mode: str, known: Sequence[str]) -> Iterator[str]:
    unused = [key for key in _UNUSED[mode] if key in keys]
    if unused:
        yield f"early_exit: mode {mode!r} does not use {', '.join(unused)}; leave that out or use another mode"
    if "certificate" in keys:
        other = [key for key in ("threshold", "exits", "criterion", *_OTHER_KEYS) if key in keys]
        if other:
            yield f"early_exit: certificate and {', '.join(other)} are both given; a certificate sets all of them"
    for key in ("exits", "threshold"):
        names = keys.get(key)
        unknown = [name for name in names if name not in known] if isinstance(names, tuple | dict) else []
        if unknown:
            own = ", ".join(known) or "none"
            yield f"early_exit.{key} names {shortened(unknown[0])}; this model's exits are {own}"
    by_value = mode == "self_speculative" and keys.get("draft_rule") == "value"
    if by_value and "threshold" in keys:
        yield "early_exit: draft_rule 'value' does not use threshold; leave one of them out"
    if "criterion" in keys and "threshold" not in keys and mode in ("early_exit", "self_speculative") and not by_value:
        yield "early_exit.criterion needs a threshold of its own; give both"
