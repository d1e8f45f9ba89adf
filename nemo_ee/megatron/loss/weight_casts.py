# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Output weights in the dtype of the matrix products, formed once where exits and microbatches read the same one.

Under mixed precision with fp32 parameters each exit's loss needs its output weight in half precision. The backbone's,
which shared outputs, low-rank outputs and the teacher read, is cast once in a step. An exit's own is cast once in a
step if it is the stage's only one, else for every microbatch: to keep all of them would take as much memory as bf16
parameters do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class WeightCasts:
    """The last cast of a frozen weight and the last one of a trained weight, kept inside a `with` block.

    No weight may change inside the block, which is the part of a step before its optimizers. The weights' version
    counters do not tell: torch's fused optimizers do not count. Outside of a block every call casts.
    """

    def __init__(self) -> None:
        self._kept: dict[bool, tuple[Tensor, Tensor]] | None = None  # trained -> (weight, cast); None: no block

    def __enter__(self) -> WeightCasts:
        self._kept = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._kept = None

    def of(self, weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The weights in `dtype`, without gradients: the weight itself where it has it."""
        return [self._of(weight, dtype) for weight in weights]

    def _of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if weight.dtype == dtype:
            return weight.detach()
        if self._kept is None:
            return weight.detach().to(dtype)
        own, cast = self._kept.pop(weight.requires_grad, (None, None))
        if own is not weight or cast.dtype != dtype:
            cast = None  # its memory is free before the new one is formed
            cast = weight.detach().to(dtype)
        self._kept[weight.requires_grad] = weight, cast
        return cast
