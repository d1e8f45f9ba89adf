# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Architecture of a model: the one description that the importer, the runtime, the cost model and exporters read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# The linears of a layer, each of which may have a bias.
QKV, PROJ, FC1, FC2 = "qkv", "proj", "fc1", "fc2"
ALL_LINEARS = frozenset({QKV, PROJ, FC1, FC2})


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only GPT with norms in front of attention and MLP. The defaults are a Llama's.

    Attributes:
        num_layers, hidden_size, ffn_hidden_size, num_attention_heads: sizes of the model.
        num_query_groups: number of key-value heads.
        kv_channels: size of one head.
        vocab_size: true vocabulary size; layouts pad it as they need.
        max_position_embeddings: longest sequence of the model; number of rows of learned positions.
        layer_norm: whether norms are LayerNorm instead of RMSNorm.
        norm_epsilon: number added to the variance in every norm.
        norm_affine: whether the norms in front of attention, MLP and output have weights.
        qk_norm: whether an RMSNorm over every query and key head precedes the rotary positions.
        hidden_act: `silu` in a gated MLP; `relu`, `gelu` (the tanh approximation) or `gelu_erf` in a plain one.
        biases: the linears of a layer that have a bias, some of `ALL_LINEARS`.
        learned_positions: whether positions are learned instead of rotary.
        rotary_base: base of the rotary frequencies.
        rotary_scaling: result of `linear_scaling` or `llama3_scaling`; None = no scaling.
        tied: whether the output projection is the word embeddings.
        family: transformers' `model_type` of the config.json that was read; None without one.
        sequence_length: the length for which the model will be used; None = `max_position_embeddings`.
        attention_window: number of previous positions that attention reads; None = all.
        init_method_std: standard deviation of new weights.

    The last four do not change what the model computes within its window, so they do not count in a comparison.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm: bool = False
    norm_epsilon: float = 1e-5
    norm_affine: bool = True
    qk_norm: bool = False
    hidden_act: str = "silu"
    biases: frozenset[str] = frozenset()
    learned_positions: bool = False
    rotary_base: float = 10000.0
    rotary_scaling: dict[str, Any] | None = None
    tied: bool = False
    family: str | None = field(default=None, compare=False)
    sequence_length: int | None = field(default=None, compare=False)
    attention_window: int | None = field(default=None, compare=False)
    init_method_std: float = field(default=0.02, compare=False)

    @property
    def gated(self) -> bool:
        """Whether the MLP has two branches, one of them activated."""
        return self.hidden_act == "silu"

    @property
    def qkv_rows(self) -> int:
        """Number of rows of query, key and value together."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def proj_columns(self) -> int:
        """Number of columns of the projection after attention."""
        return self.num_attention_heads * self.kv_channels

    @property
    def fc1_rows(self) -> int:
        """Number of rows of the MLP's first matrix, with both branches of a gated MLP."""
        return self.ffn_hidden_size * (2 if self.gated else 1)

    @property
    def attention_size(self) -> int:
        """Number of elements of a layer's attention matrices."""
        return self.hidden_size * (self.qkv_rows + self.proj_columns)

    @property
    def mlp_size(self) -> int:
        """Number of elements of a layer's MLP matrices."""
        return self.hidden_size * (self.fc1_rows + self.ffn_hidden_size)

    @property
    def usable_positions(self) -> int:
        """Number of positions up to which attention reads the whole sequence."""
        return min(self.max_position_embeddings, self.attention_window or self.max_position_embeddings)

    @property
    def bias(self) -> bool:
        """Megatron's switch for the biases of all linears."""
        return bool(self.biases - {QKV})

    def completed(self) -> Architecture:
        """The same model with every parameter of Megatron's GPT: biases in all linears if a linear other than the
        first has one, and weights in every norm."""
        return dataclasses.replace(self, biases=ALL_LINEARS if self.bias else self.biases, norm_affine=True)

    def differences(self, other: Architecture) -> Iterator[tuple[str, Any, Any]]:
        """(field, value here, value in `other`) of every difference that changes the computation.

        A rotary model may be used at another length than it was trained with.
        """
        for entry in dataclasses.fields(self):
            ours, theirs = getattr(self, entry.name), getattr(other, entry.name)
            length_of_rotary = entry.name == "max_position_embeddings" and not self.learned_positions
            if entry.compare and not length_of_rotary and ours != theirs:
                yield entry.name, ours, theirs


def keyed(same: str, **others: str) -> dict[str, str]:
    """Field of `Architecture` -> its key in a config. `same`: fields whose key has the field's name."""
    return {field: field for field in same.split()} | others


def linear_scaling(factor: float) -> dict[str, Any]:
    """All rotary frequencies / factor, with Hugging Face's names; the kind is given twice, since readers differ."""
    return {"type": "linear", "rope_type": "linear", "factor": float(factor)}


def llama3_scaling(factor: float, low: float, high: float, original: int) -> dict[str, Any]:
    """Llama 3's scaling: only wavelengths beyond the original context length are stretched."""
    return {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": float(low),
        "high_freq_factor": float(high),
        "original_max_position_embeddings": int(original),
    }
