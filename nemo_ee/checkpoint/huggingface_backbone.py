# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A pre-trained backbone's architecture, and its config in the words of NeMo's `MegatronGPTModel`.

May import: the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Biases a family may put on the four linears of a layer.
QKV, PROJ, FC1, FC2 = "qkv", "proj", "fc1", "fc2"


@dataclass(frozen=True)
class RopeScaling:
    """Stretched rotary positions: `linear` (all frequencies / factor) or `llama3` (only the long wavelengths)."""

    type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class HuggingFaceBackbone:
    """A supported model's architecture. `vocab_size` is the true one; layouts pad it as they need."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    sequence_length: int
    normalization: str
    norm_affine: bool
    layernorm_epsilon: float
    activation: str
    openai_gelu: bool
    linear_biases: frozenset[str]
    position_embedding_type: str
    rotary_base: float
    rope_scaling: RopeScaling | None
    share_embeddings_and_output_weights: bool
    init_method_std: float

    @property
    def bias(self) -> bool:
        """Whether Megatron's `add_bias_linear` is needed: one switch for all linears, so the others get zeros."""
        return bool(self.linear_biases - {QKV})

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have a bias of their own."""
        return QKV in self.linear_biases

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies activation(gate) and up."""
        return self.activation.endswith("glu")

    def nemo_config(self) -> dict[str, Any]:
        """The part of a NeMo `MegatronGPTModel` config that follows from the architecture.

        The keys are the same for all families, but for two: `bias_activation_fusion: false` is there only where fusing
        would be wrong, NeMo's four numbers of `scale_positional_embedding` only when that is on. All but `vocab_size`,
        `rope_scaling` (the numbers once more, for our own model and for export) and `activation: relu` are read by
        NeMo's own model too.
        """
        scaling = self.rope_scaling
        linear = scaling is not None and scaling.type == "linear"
        llama3 = scaling is not None and scaling.type == "llama3"
        config: dict[str, Any] = {
            "mcore_gpt": True,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.kv_channels,
            "vocab_size": self.vocab_size,
            "encoder_seq_length": self.sequence_length,
            "max_position_embeddings": self.max_position_embeddings,
            "normalization": self.normalization,
            "layernorm_epsilon": self.layernorm_epsilon,
            "activation": self.activation,
            "openai_gelu": self.openai_gelu,
            "bias": self.bias,
            "qkv_bias": self.qkv_bias,
            "position_embedding_type": self.position_embedding_type,
            "rotary_percentage": 1.0,
            "rotary_base": self.rotary_base,
            "seq_len_interpolation_factor": scaling.factor if linear else None,
            "scale_positional_embedding": llama3,
            "rope_scaling": None,
            "share_embeddings_and_output_weights": self.share_embeddings_and_output_weights,
            "init_method_std": self.init_method_std,
            "transformer_block_type": "pre_ln",
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "ffn_dropout": 0.0,
        }
        if not self.gated:
            # Megatron's fused GELU is the tanh approximation whatever is asked for, and there is no fused ReLU.
            config["bias_activation_fusion"] = False
        if linear:
            config["rope_scaling"] = {"type": "linear", "factor": scaling.factor}
        if llama3:
            config |= {
                "scale_factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "old_context_len": scaling.original_max_position_embeddings,
            }
            config["rope_scaling"] = {
                "type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }
        return config
