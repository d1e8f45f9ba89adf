# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm with few operations a call.

    RMSNorm: w x / sqrt(mean(x^2) + eps) = sqrt(h) w x / hypot(|x|, sqrt(h eps))      (arXiv 1910.07467, equation 4)

For a row of a few hundred numbers the time is that of starting the operations, so in fp32 on the CPU RMSNorm is
written with four of them, where PyTorch's own takes eight; on other devices and in half precision PyTorch's is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(Protocol):
    """`[n, h]` -> `[n, h]`."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """The normed rows; `hidden` is left as it is."""
        ...


@dataclass(frozen=True)
class RmsNorm:
    """PyTorch's. `weight`: `[h]`, or None."""

    weight: Tensor | None
    epsilon: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """See `Norm`."""
        return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.epsilon)


@dataclass(frozen=True)
class ShortRmsNorm:
    """The right side of the module's formula. `scaled_weight`: `[h]`, sqrt(h) w; `floor`: a number, sqrt(h eps)."""

    scaled_weight: Tensor
    floor: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """See `Norm`."""
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        return torch.mul(hidden, self.scaled_weight).div_(torch.hypot(length, self.floor))


@dataclass(frozen=True)
class LayerNorm:
    """`weight`, `bias`: `[h]`, or None."""

    weight: Tensor | None
    bias: Tensor | None
    epsilon: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """See `Norm`."""
        return F.layer_norm(hidden, hidden.shape[-1:], self.weight, self.bias, self.epsilon)


def make_rms_norm(weight: Tensor | None, epsilon: float) -> Norm:
    """The fastest RMSNorm for this weight's dtype and device. `weight`: `[h]`, or None."""
    if weight is None or weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return RmsNorm(weight, epsilon)
    size = weight.shape[0]
    return ShortRmsNorm(weight * math.sqrt(size), torch.tensor(math.sqrt(size * epsilon)))
