# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Matrix products in the layout and arithmetic that are fastest on a device.

Decoding one token reads every weight once, so fewer bytes are more speed. On x86 CPUs, weights that are stored in half
precision are kept in fp16 and multiplied with fp32 inputs and sums (FBGEMM, arXiv 2101.05615): to fp32's own rounding
what fp32 weights would give, in less than half of the time. fp16 holds every bf16 number from 2**-14 to its largest,
smaller ones to within 2**-25: in a matrix whose largest number is at least 2**-6, an error of at most 2**-19 of that.
Other matrices stay in fp32.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

_LARGEST_FP16 = 65504.0
# Of a matrix's largest number; below it the rounding of the small ones would show.
_SMALLEST_MAXIMUM = 2.0**-6


class Linear(Protocol):
    """`[n, in]` -> `[n, out]`."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """The product, with the bias if there is one."""
        ...

    def added_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """`residual` + the product. `residual`: `[n, out]`, left as it is."""
        ...


@dataclass(frozen=True)
class PlainLinear:
    """`weight`: `[in, out]`, contiguous along whichever axis is faster; `bias`: `[out]`."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """See `Linear`."""
        return torch.mm(inputs, self.weight) if self.bias is None else torch.addmm(self.bias, inputs, self.weight)

    def added_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """See `Linear`: one operation but for the bias."""
        result = torch.addmm(residual, inputs, self.weight)
        return result if self.bias is None else result.add_(self.bias)


@dataclass(frozen=True)
class HalfLinear:
    """fp16 weights, fp32 inputs and sums. `packed`: from `torch.fbgemm_pack_gemm_matrix_fp16`; `bias`: `[out]`."""

    packed: Tensor
    bias: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """See `Linear`."""
        return torch.fbgemm_linear_fp16_weight_fp32_activation(inputs, self.packed, self.bias)

    def added_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """See `Linear`."""
        return torch.fbgemm_linear_fp16_weight_fp32_activation(inputs, self.packed, self.bias).add_(residual)


@dataclass(frozen=True)
class QuantizedHalfLinear:
    """`HalfLinear` through the quantized operators, which take 7 us longer to call. `packed`: from
    `torch.ops.quantized.linear_prepack_fp16`, bias included."""

    packed: Any

    def __call__(self, inputs: Tensor) -> Tensor:
        """See `Linear`."""
        return torch.ops.quantized.linear_dynamic_fp16(inputs, self.packed)

    def added_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """See `Linear`."""
        return torch.ops.quantized.linear_dynamic_fp16(inputs, self.packed).add_(residual)


def make_linear(weight: Tensor, bias: Tensor | None, *, stored_in_half: bool) -> Linear:
    """The fastest linear for a weight.

    Args:
        weight: `[out, in]`, in the dtype to compute in.
        bias: `[out]`.
        stored_in_half: its numbers are bf16 or fp16 ones.
    """
    if weight.device.type != "cpu" or weight.dtype is not torch.float32:
        return PlainLinear(weight.t(), bias)
    if stored_in_half and packs_half_weights() and _SMALLEST_MAXIMUM <= weight.abs().amax() <= _LARGEST_FP16:
        return make_half_linear(weight, bias)
    # One row times the transpose is up to three times faster than times the matrix itself.
    return PlainLinear(weight.t().contiguous(), bias)


def make_half_linear(weight: Tensor, bias: Tensor | None) -> HalfLinear | QuantizedHalfLinear:
    """fp16 copies of `weight` `[out, in]`, fp32, within fp16's range, behind the product that is quicker to call."""
    if not _has_direct_product():
        return QuantizedHalfLinear(torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias))
    with warnings.catch_warnings():
        # PyTorch warns once, at packing and at the product, that a later version removes the direct calls; the other
        # class is for such versions.
        warnings.simplefilter("ignore")
        linear = HalfLinear(torch.fbgemm_pack_gemm_matrix_fp16(weight.contiguous()), bias)
        linear(weight.new_zeros((1, weight.shape[1])))
    return linear


@cache
def _has_direct_product() -> bool:
    """Whether this PyTorch has the direct call, with a bias that may be left out."""
    operator = getattr(torch.ops.aten, "fbgemm_linear_fp16_weight_fp32_activation", None)
    return operator is not None and "Tensor? bias" in str(operator.default._schema)


def packs_half_weights() -> bool:
    """Whether this PyTorch has the fp16 products."""
    return (
        torch.backends.quantized.engine in ("fbgemm", "x86") and "fbgemm" in torch.backends.quantized.supported_engines
    )
