# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A `.nemo`'s architecture as the config.json of the TensorRT-LLM class that computes it.

`nemo_ee.families` has the class of each architecture, and its special keys. Fields and classes: TensorRT-LLM 0.20 to
1.2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_ee.families.architecture import ALL_LINEARS, QKV, Architecture, keyed
from nemo_ee.families.family import Family
from nemo_ee.families.registry import engine_family

_KEYS = keyed(
    "vocab_size hidden_size num_attention_heads max_position_embeddings hidden_act norm_epsilon",
    ffn_hidden_size="intermediate_size",
    num_layers="num_hidden_layers",
    num_query_groups="num_key_value_heads",
    kv_channels="head_size",
    tied="tie_word_embeddings",
)


def stock_family(architecture: Architecture) -> Family:
    """The family whose class in TensorRT-LLM computes an architecture.

    Raises:
        ValueError: no class computes it.
    """
    family = engine_family(architecture)
    if family is None:
        biases, norm = ", ".join(sorted(architecture.biases)) or "none", architecture.qk_norm
        raise ValueError(f"no class of TensorRT-LLM computes this: biases in {biases}, qk_layernorm={norm}")
    return family


def checkpoint_config(
    architecture: Architecture,
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
    dtype: str,
    early_exit: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The contents of a unified checkpoint's config.json.

    Args:
        architecture: the written model; a draft has another one than the backbone.
        early_exit: table of the exits; stock classes keep unknown keys and do nothing with them.
    """
    a, engine = architecture, stock_family(architecture).engine
    config: dict[str, Any] = {
        "architecture": engine.architecture,
        "dtype": dtype,
        "logits_dtype": "float32",
        **{key: getattr(a, field) for field, key in _KEYS.items()},
        "position_embedding_type": "learned_absolute" if a.learned_positions else "rope_gpt_neox",
        # Embeddings stay whole on every rank: classes of some releases cannot split them.
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {
            "world_size": tensor_parallel * pipeline_parallel,
            "tp_size": tensor_parallel,
            "pp_size": pipeline_parallel,
        },
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }
    config |= engine.fields(a)
    if early_exit is not None:
        config["early_exit"] = dict(early_exit)
    return config


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The inverse of `checkpoint_config`, for checking a directory without its source.

    Raises:
        KeyError: a field is missing.
    """
    learned = config["position_embedding_type"] == "learned_absolute"
    # OPT's class has all biases, GPT's a switch for all, the others one for query, key and value and one for the MLP.
    bias = config.get("bias", True) if learned else config["mlp_bias"]
    qkv_bias = not learned and config["attn_bias"]
    return Architecture(
        **{field: config[key] for field, key in _KEYS.items()},
        layer_norm=learned,
        qk_norm=config.get("qwen_type") == "qwen3",
        biases=ALL_LINEARS if bias else frozenset({QKV} if qkv_bias else ()),
        learned_positions=learned,
        rotary_base=config.get("rotary_base", 10000.0),
        rotary_scaling=config.get("rotary_scaling"),
    )
