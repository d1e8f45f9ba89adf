# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3, and Mistral, which is a Llama with an attention window. Qwen2 and Qwen3 read most of their keys here.

The models have RMSNorm, gated SiLU, rotary positions and grouped queries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nemo_ee.families.architecture import FC1, FC2, PROJ, QKV, Architecture, keyed
from nemo_ee.families.config_reader import GATED, ConfigReader
from nemo_ee.families.family import EngineClass, Family
from nemo_ee.families.gguf_metadata import ROPE_FACTORS, GgufForm
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
# llama.cpp's names; its Llama pairs neighbouring dimensions of a head, the other families pair a head's halves.
LLAMA_GGUF_NAMES = Names(
    base="",
    words="token_embd.weight",
    layer="blk.{}.",
    attention_norm="attn_norm",
    qkv=("attn_q", "attn_k", "attn_v"),
    proj="attn_output",
    mlp_norm="ffn_norm",
    fc1=("ffn_gate", "ffn_up"),
    fc2="ffn_down",
    final_norm="output_norm",
    output="output.weight",
    pairs=True,
    buffers=re.escape(ROPE_FACTORS),
)
_GGUF = GgufForm(architecture="llama", names=LLAMA_GGUF_NAMES)


LLAMA_KEYS = keyed(
    "vocab_size hidden_size num_attention_heads max_position_embeddings",
    ffn_hidden_size="intermediate_size",
    num_layers="num_hidden_layers",
    num_query_groups="num_key_value_heads",
    kv_channels="head_dim",
    norm_epsilon="rms_norm_eps",
    tied="tie_word_embeddings",
    init_method_std="initializer_range",
)

LLAMA_SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


def read_llama_like(
    reader: ConfigReader,
    *,
    keys: Mapping[str, str] = LLAMA_KEYS,
    windowed: bool = False,
    default_groups: int | None = None,
    default_head_size: int | None = None,
    **others: Any,
) -> Architecture:
    """The architecture of a config.json with Llama's keys.

    Args:
        keys: as in `Family`; give them if one differs from Llama's.
        windowed: whether attention has a window.
        default_groups: default of `num_key_value_heads`; None = the number of query heads.
        default_head_size: default of `head_dim`; None = hidden size / heads.
        others: further fields of `Architecture`.
    """
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    if default_head_size is None:
        indivisible = reader.get("head_dim") is None and hidden % heads
        reader.refuse_if(indivisible, f"hidden_size: {hidden}, not a multiple of num_attention_heads {heads}")
    fields = reader.fields(
        keys,
        num_query_groups=heads if "num_key_value_heads" in reader.values else default_groups or heads,
        kv_channels=default_head_size or max(hidden // heads, 1),
        norm_epsilon=1e-6,
        init_method_std=0.02,
    )
    groups, head_size = fields["num_query_groups"], fields["kv_channels"]
    reader.refuse_if(heads % groups, f"num_key_value_heads: {groups}, does not divide num_attention_heads {heads}")
    reader.refuse_if(head_size % 2, f"head_dim: {head_size}, rotary positions need an even number")
    length = reader.used_length(fields["max_position_embeddings"])
    base, scaling = reader.rope()
    return Architecture(
        **fields,
        hidden_act=reader.choice("hidden_act", "silu", GATED),
        rotary_base=base,
        rotary_scaling=scaling,
        sequence_length=length,
        attention_window=reader.window(length) if windowed else None,
        **others,
    )


def rotary_keys(a: Architecture) -> dict[str, Any]:
    """Llama's keys for rotary positions and the activation."""
    return {"hidden_act": "silu", "rope_theta": a.rotary_base, "rope_scaling": a.rotary_scaling}


def rotary_engine_fields(a: Architecture) -> Mapping[str, Any]:
    """The common condition of TensorRT-LLM's classes for rotary models."""
    return {
        "rotary_base": a.rotary_base,
        "rotary_scaling": a.rotary_scaling,
        "attn_bias": QKV in a.biases,
        "mlp_bias": FC1 in a.biases,
    }


def _read_llama(reader: ConfigReader) -> Architecture:
    attention = {QKV, PROJ} if reader.flag("attention_bias") else set()
    mlp = {FC1, FC2} if reader.flag("mlp_bias") else set()
    return read_llama_like(reader, family="llama", biases=frozenset(attention | mlp))


LLAMA = Family(
    model_type="llama",
    model_class="LlamaForCausalLM",
    config_class="LlamaConfig",
    names=LLAMA_NAMES,
    keys=LLAMA_KEYS,
    read=_read_llama,
    other_keys=lambda a: {**rotary_keys(a), "attention_bias": PROJ in a.biases, "mlp_bias": FC1 in a.biases},
    special_tokens=LLAMA_SPECIAL_TOKENS,
    engine=EngineClass(
        architecture="LlamaForCausalLM",
        computes=lambda a: not (a.layer_norm or a.qk_norm or a.biases == {QKV}),
        fields=rotary_engine_fields,
        early_exit="EarlyExitLlamaForCausalLM",
    ),
    pytorch_early_exit=True,
    gguf=_GGUF,
)
MISTRAL = Family(
    model_type="mistral",
    model_class="MistralForCausalLM",
    config_class="MistralConfig",
    names=LLAMA_NAMES,
    keys=LLAMA_KEYS,
    read=lambda reader: read_llama_like(reader, family="mistral", default_groups=8, windowed=True),
    other_keys=lambda a: {**rotary_keys(a), "sliding_window": None},
    special_tokens=LLAMA_SPECIAL_TOKENS,
    pytorch_early_exit=True,
    gguf=_GGUF,
)
