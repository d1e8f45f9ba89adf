# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A pre-trained backbone of a Hugging Face family: its architecture, and what only that family's files say of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_ee.checkpoint.architecture import Architecture

# Biases a family may put on the four linears of a layer.
QKV, PROJ, FC1, FC2 = "qkv", "proj", "fc1", "fc2"


@dataclass(frozen=True, kw_only=True)
class HuggingFaceBackbone(Architecture):
    """A supported model.

    Attributes:
        family: transformers' `model_type`.
        sequence_length: the length it is to be used with.
        norm_affine: norms have weights.
        linear_biases: those the family stores. One of `PROJ`, `FC1`, `FC2` makes `bias` true; the others get zeros.
        init_method_std: of new weights.
    """

    family: str
    sequence_length: int
    norm_affine: bool
    linear_biases: frozenset[str]
    init_method_std: float

    def nemo_config(self) -> dict[str, Any]:
        """See `Architecture.nemo_config`."""
        return super().nemo_config() | {
            "encoder_seq_length": self.sequence_length,
            "qkv_bias": QKV in self.linear_biases,
            "init_method_std": self.init_method_std,
        }


def biases(linears: frozenset[str]) -> dict[str, Any]:
    """The fields of a backbone whose family stores biases of these linears."""
    bias = bool(linears - {QKV})
    return {"linear_biases": linears, "bias": bias, "qkv_bias": bias or QKV in linears}
