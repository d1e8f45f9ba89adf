# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A `.nemo`'s architecture in TensorRT-LLM's words: which stock class computes it, and the config.json of that class.

    RMSNorm, gated SiLU, rotary positions, no bias or all biases    LlamaForCausalLM (Llama, Mistral)
    the same with a bias on query, key and value alone              Qwen2ForCausalLM
    LayerNorm, ReLU, learned positions, all biases                  OPTForCausalLM
    LayerNorm, tanh-GELU or ReLU, learned positions                 GPTForCausalLM

Fields and classes: TensorRT-LLM 0.20 to 1.2.1. Anything that no stock class computes the same way is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_ee.checkpoint.architecture import Architecture


def stock_class(a: Architecture) -> str:
    """TensorRT-LLM's class that computes an architecture."""
    if a.layer_norm:
        return "OPTForCausalLM" if a.hidden_act == "relu" and a.bias else "GPTForCausalLM"
    return "Qwen2ForCausalLM" if a.qkv_bias and not a.bias else "LlamaForCausalLM"


def checkpoint_config(
    architecture: Architecture,
    *,
    num_layers: int,
    tensor_parallel: int,
    pipeline_parallel: int,
    dtype: str,
    tied: bool,
    early_exit: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The contents of a unified checkpoint's config.json.

    Args:
        num_layers: of the model written, which for a draft is not the backbone's.
        tied: the output projection is the word embeddings.
        early_exit: table of the exits; stock classes keep unknown keys and do nothing with them.
    """
    a, name = architecture, stock_class(architecture)
    config: dict[str, Any] = {
        "architecture": name,
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_size": a.kv_channels,
        "intermediate_size": a.ffn_hidden_size,
        "hidden_act": a.hidden_act,
        "norm_epsilon": a.norm_epsilon,
        "position_embedding_type": "learned_absolute" if a.learned_positions else "rope_gpt_neox",
        "max_position_embeddings": a.max_position_embeddings,
        # Embeddings stay whole on every rank: whether a class can share them out differs between releases.
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "tie_word_embeddings": tied,
        "mapping": {
            "world_size": tensor_parallel * pipeline_parallel,
            "tp_size": tensor_parallel,
            "pp_size": pipeline_parallel,
        },
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }
    if a.learned_positions:
        config |= {"do_layer_norm_before": True} if name.startswith("OPT") else {"gpt_variant": "gpt2", "bias": a.bias}
    else:
        config |= {"rotary_base": a.rotary_base, "rotary_scaling": a.rotary_scaling}
        config |= {"attn_bias": a.qkv_bias, "mlp_bias": a.bias}
        if name.startswith("Qwen2"):
            config |= {"qwen_type": "qwen2"}
    if early_exit is not None:
        config["early_exit"] = dict(early_exit)
    return config


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The inverse of `checkpoint_config`, for checking a directory without its source.

    Raises:
        KeyError: a field is missing.
    """
    learned = config["position_embedding_type"] == "learned_absolute"
    bias = _bias_of(config, learned)
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_size"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        layer_norm=learned,
        norm_epsilon=config["norm_epsilon"],
        hidden_act=config["hidden_act"],
        bias=bias,
        qkv_bias=bias if learned else config["attn_bias"],
        learned_positions=learned,
        rotary_base=config.get("rotary_base", 10000.0),
        rotary_scaling=config.get("rotary_scaling"),
        tied=config["tie_word_embeddings"],
    )


def _bias_of(config: Mapping[str, Any], learned: bool) -> bool:
    if not learned:
        return config["mlp_bias"]
    return True if config["architecture"] == "OPTForCausalLM" else config["bias"]
