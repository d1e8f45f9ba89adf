# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""From a request's `early_exit` field and the server's defaults to a mode and a policy for the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_ee.certificates.certificate import Certificate
from nemo_ee.generation.decoding_model import DecodingModel
from nemo_ee.generation.policy import MODES, ExitPolicy, plan_exits
from nemo_ee.serving.errors import ApiError, shown
from nemo_ee.serving.request_certificates import requested_certificate

# Options each mode ignores. Passing one is an error, so that users do not think it had an effect.
_UNUSED = {
    "full": ("threshold", "certificate", "exits", "max_pending_tokens", "num_draft_tokens"),
    "static_depth": ("threshold", "certificate", "max_pending_tokens", "num_draft_tokens"),
    "self_speculative": ("certificate", "max_pending_tokens"),
    "early_exit": ("num_draft_tokens",),
}


@dataclass(frozen=True)
class ExitChoice:
    """How a request's tokens leave, and the certificate that says so, if one does."""

    mode: str
    policy: ExitPolicy
    certificate: Certificate | None = None


def exit_choice(
    given: Mapping[str, Any] | None,
    model: DecodingModel,
    default: ExitChoice,
    certificates: Mapping[str, Certificate],
) -> ExitChoice:
    """Check the field against the model.

    Args:
        given: the request's `early_exit`, keys known, values not; None or {} = the server's defaults.
        model: whose exits are meant.
        default: the server's; also for keys that are not given.
        certificates: the model's, by name.

    Raises:
        ApiError: 400, with every fault.
    """
    if not given:
        return default
    # Someone who names a threshold or a certificate wants early exit, also where the server's own mode is another.
    keeps = default.mode in ("early_exit", "self_speculative") and "certificate" not in given
    mode = given.get("mode", default.mode if keeps else "early_exit")
    faults = list(_faults(given, mode, [point.name for point in model.exits]))
    if faults:
        raise ApiError(400, "; ".join(faults), param="early_exit")
    if "certificate" in given:
        certificate = requested_certificate(certificates, given["certificate"])
        # Without thresholds only full depth was certified.
        return ExitChoice("early_exit" if certificate.thresholds else "full", certificate.policy(), certificate)
    try:
        policy = ExitPolicy(
            # The server's threshold may not suit a criterion it does not go with here; 0 suits every one.
            0.0 if "threshold" in _UNUSED[mode] else given.get("threshold", default.policy.thresholds),
            criterion=given.get("criterion", default.policy.criterion),
            active=given.get("exits", default.policy.active),
            **_caps(given, mode, default.policy),
        )
        plan_exits(mode, policy, model.exits, model.num_layers)
    except (ValueError, TypeError) as fault:
        raise ApiError(400, f"early_exit: {fault}", param="early_exit") from None
    return ExitChoice(mode, policy)


def _caps(given: Mapping[str, Any], mode: str, default: ExitPolicy) -> dict[str, Any]:
    """The caps that the mode uses, as given or as the server's default."""
    keys = [key for key in ("max_pending_tokens", "num_draft_tokens") if key not in _UNUSED[mode]]
    return {key: given.get(key, getattr(default, key)) for key in keys}


def _faults(given: Mapping[str, Any], mode: object, known: Sequence[str]):
    if mode not in MODES:
        yield f"early_exit.mode = {shown(mode)} is unknown; use one of {', '.join(MODES)}"
        return
    unused = [key for key in _UNUSED[mode] if key in given]
    if unused:
        yield f"early_exit: mode {mode!r} does not look at {', '.join(unused)}; leave that out or use another mode"
    if "certificate" in given:
        other = [
            key
            for key in ("threshold", "exits", "criterion", "max_pending_tokens", "num_draft_tokens")
            if key in given
        ]
        if other:
            yield f"early_exit: certificate and {', '.join(other)} are both given; a certificate says it all"
    exits = given.get("exits")
    if exits is not None:
        if not isinstance(exits, list) or any(not isinstance(name, str) for name in exits):
            yield f"early_exit.exits = {shown(exits)} must be a list of names, of {', '.join(known) or 'none'}"
            return
        unknown = [name for name in exits if name not in known]
        if unknown:
            yield f"early_exit.exits names {shown(unknown[0])}; this model's exits are {', '.join(known) or 'none'}"
    threshold = given.get("threshold")
    if isinstance(threshold, dict):
        unknown = [name for name in threshold if name not in known]
        if unknown:
            yield (
                f"early_exit.threshold names {shown(unknown[0])}; this model's exits are {', '.join(known) or 'none'}"
            )
    if threshold is not None and not isinstance(threshold, int | float | dict):
        yield f"early_exit.threshold = {shown(threshold)} must be a number, or an object of numbers by exit"
    if given.get("criterion") is not None and not isinstance(given["criterion"], str):
        yield f"early_exit.criterion = {shown(given['criterion'])} must be a name"
    if "criterion" in given and "threshold" not in given and mode in ("early_exit", "self_speculative"):
        yield "early_exit.criterion needs a threshold of its own; give both"
