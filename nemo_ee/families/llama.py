# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3, and Mistral, which is a Llama with an attention window. Qwen2 and Qwen3 read most of their keys here.

RMSNorm, gated SiLU, rotary positions, grouped queries
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_ee.families.architecture import FC1, FC2, PROJ, QKV, Architecture
from nemo_ee.families.config_reader import GATED, ConfigReader
from nemo_ee.families.family import EngineClass, Family
from nemo_ee.families.tensors import Names

LLAMA_NAMES = Names(
    base="model.",
    words="model.embed_tokens.weight",
    layer="model.layers.{}.",
    attention_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    fc1=("mlp.gate_proj", "mlp.up_proj"),
    fc2="mlp.down_proj",
    final_norm="model.norm",
    buffers=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)


def read_llama_like(
    reader: ConfigReader,
    *,
    default_groups: int | None = None,
    default_head_size: int | None = None,
    **others: Any,
) -> Architecture:
    """The architecture of a config.json with Llama's keys.

    Args:
        default_groups: key-value heads where `num_key_value_heads` is absent; None is one per query head.
        default_head_size: where `head_dim` is absent; None is hidden size / heads.
        others: further fields of `Architecture`.
    """
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    absent = "num_key_value_heads" not in reader.values
    groups = reader.size("num_key_value_heads", default=(default_groups or heads) if absent else heads)
    if default_head_size is None:
        indivisible = reader.get("head_dim") is None and hidden % heads
        reader.refuse_if(indivisible, f"hidden_size: {hidden}, not a multiple of num_attention_heads {heads}")
        default_head_size = max(hidden // heads, 1)
    head_size = reader.size("head_dim", default=default_head_size)
    reader.refuse_if(heads % groups, f"num_key_value_heads: {groups}, does not divide num_attention_heads {heads}")
    reader.refuse_if(head_size % 2, f"head_dim: {head_size}, rotary positions need an even number")
    base, scaling = reader.rope()
    return Architecture(
        num_layers=reader.size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=reader.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_size,
        vocab_size=reader.size("vocab_size"),
        norm_epsilon=reader.number("rms_norm_eps", 1e-6),
        hidden_act=reader.choice("hidden_act", "silu", GATED),
        rotary_base=base,
        rotary_scaling=scaling,
        tied=reader.flag("tie_word_embeddings", False),
        sequence_length=reader.sequence_length or others["max_position_embeddings"],
        init_method_std=reader.number("initializer_range", 0.02),
        **others,
    )


def llama_like_config(a: Architecture) -> dict[str, Any]:
    """Llama's keys, without its biases."""
    scaling = a.rotary_scaling
    return {
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": a.max_position_embeddings,
        "rms_norm_eps": a.norm_epsilon,
        "rope_theta": a.rotary_base,
        "rope_scaling": scaling and {key: value for key, value in scaling.items() if key != "type"},
        "tie_word_embeddings": a.tied,
    }


def rotary_engine_fields(a: Architecture) -> Mapping[str, Any]:
    """What TensorRT-LLM's classes for rotary models have in common."""
    return {
        "rotary_base": a.rotary_base,
        "rotary_scaling": a.rotary_scaling,
        "attn_bias": QKV in a.biases,
        "mlp_bias": FC1 in a.biases,
    }


def _read_llama(reader: ConfigReader) -> Architecture:
    attention = {QKV, PROJ} if reader.flag("attention_bias", False) else set()
    mlp = {FC1, FC2} if reader.flag("mlp_bias", False) else set()
    return read_llama_like(
        reader,
        family="llama",
        max_position_embeddings=reader.positions("max_position_embeddings"),
        biases=frozenset(attention | mlp),
    )


def _read_mistral(reader: ConfigReader) -> Architecture:
    positions = reader.positions("max_position_embeddings")
    return read_llama_like(
        reader,
        family="mistral",
        default_groups=8,
        max_position_embeddings=positions,
        attention_window=reader.window("sliding_window", 4096, reader.sequence_length or positions),
    )


LLAMA = Family(
    model_type="llama",
    model_class="LlamaForCausalLM",
    config_class="LlamaConfig",
    names=LLAMA_NAMES,
    read=_read_llama,
    config=lambda a: llama_like_config(a) | {"attention_bias": PROJ in a.biases, "mlp_bias": FC1 in a.biases},
    engine=EngineClass(
        architecture="LlamaForCausalLM",
        computes=lambda a: not (a.layer_norm or a.qk_norm or a.biases == {QKV}),
        fields=rotary_engine_fields,
        early_exit="EarlyExitLlamaForCausalLM",
    ),
    pytorch_early_exit=True,
)
MISTRAL = Family(
    model_type="mistral",
    model_class="MistralForCausalLM",
    config_class="MistralConfig",
    names=LLAMA_NAMES,
    read=_read_mistral,
    config=lambda a: llama_like_config(a) | {"sliding_window": None},
    pytorch_early_exit=True,
)
