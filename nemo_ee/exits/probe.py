# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A linear probe on the hidden state at an exit's tap that predicts whether the exit agrees with the final exit.

    confidence = sigmoid(w . h / rms(h) + b),   rms(h) = sqrt(mean(h^2))

The other criteria need the exit's whole distribution, which costs a product with the vocabulary for every token that
stays. A probe costs h multiplications, and the head runs only for tokens that leave. `fit_probe` is logistic
regression; nothing else of the exit changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

SCHEMA_VERSION = 1
_LEAST_RMS = 1e-12
_LARGEST = 80.0  # of the exponent, which fp32 could not hold far beyond


@dataclasses.dataclass(frozen=True, eq=False)
class ExitProbe:
    """A fitted probe.

    Attributes:
        weight: `[h]`, fp32.
        bias: b.
    """

    weight: Tensor
    bias: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """The confidence of each row. `hidden`: `[n, h]` at the tap, any dtype. Returns `[n]`, fp32, on the CPU.

        A row's value does not depend on the other rows: a matrix product, and a vectorised sigmoid, may round by the
        number of rows.
        """
        projected = (hidden.float() * self.weight.to(hidden.device)).sum(dim=-1) / _rms(hidden)[:, 0]
        exponents = (-projected - self.bias).clamp(max=_LARGEST)  # NaN stays NaN, which no threshold lets leave
        return torch.tensor([1 / (1 + math.exp(x)) for x in exponents.tolist()], dtype=torch.float32)


def fit_probe(hidden: Tensor, agrees: Tensor, l2: float = 0.01) -> ExitProbe:
    """Logistic regression of agreement on hidden states: the minimum of mean log loss + l2 |w'|^2.

    Args:
        hidden: `[n, h]`, hidden states at the tap, any floating dtype.
        agrees: `[n]`, bool, whether the exit's most likely token is the final exit's.
        l2: strength of the penalty, > 0; w' are the weights of standardised inputs.

    Raises:
        ValueError: all rows agree, or none does: there is nothing to predict.
    """
    if agrees.all() or not agrees.any():
        raise ValueError(
            f"{'all' if len(agrees) and agrees.all() else 'none'} of {len(agrees)} tokens agree with the final exit, "
            "so a probe has nothing to predict; give more or other prompts"
        )
    features = hidden.float() / _rms(hidden)
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
    features = (features - mean) / deviation
    targets = agrees.float()
    weight = torch.zeros(features.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(features @ weight + bias, targets) + l2 * weight.square().sum()
        value.backward()
        return value

    with torch.inference_mode(False), torch.enable_grad():
        optimizer.step(loss)
    weight = weight.detach() / deviation
    return ExitProbe(weight, float(bias.detach() - weight @ mean))


def to_file(probes: Mapping[str, ExitProbe], facts: Mapping[str, str]) -> dict[str, Any]:
    """The content of a file of probes: the facts, and the probes by the names of their exits, as JSON values."""
    plain = {name: {"weight": probe.weight.tolist(), "bias": probe.bias} for name, probe in probes.items()}
    return {"schema_version": SCHEMA_VERSION, **facts, "probes": plain}


def from_file(values: Any, hidden_size: int) -> dict[str, ExitProbe]:
    """The probes of a file's content.

    Args:
        hidden_size: the model's.

    Raises:
        ValueError: a probe is damaged, of a model of another hidden size, or the file is of another schema version.
    """
    version = values.get("schema_version") if isinstance(values, Mapping) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema version {version!r}, this code reads {SCHEMA_VERSION}; fit the probes again")
    probes = {}
    for name, own in values.get("probes", {}).items():
        try:
            weight, bias = torch.tensor(own["weight"], dtype=torch.float32), float(own["bias"])
        except (TypeError, ValueError, KeyError) as problem:
            raise ValueError(f"probe of exit {name!r}: damaged ({problem!r}); fit it again") from problem
        if weight.shape != (hidden_size,):
            raise ValueError(
                f"probe of exit {name!r}: {list(weight.shape)} weights for a hidden size of {hidden_size}"
            )
        if not (weight.isfinite().all() and math.isfinite(bias)):
            raise ValueError(f"probe of exit {name!r}: has numbers that are not finite; fit it again")
        probes[name] = ExitProbe(weight, bias)
    return probes


def _rms(hidden: Tensor) -> Tensor:
    """`[n, h]` -> `[n, 1]`, fp32."""
    return hidden.float().square().mean(dim=-1, keepdim=True).sqrt().clamp_min(_LEAST_RMS)
