# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A model's architecture as the config of NeMo's `MegatronGPTModel`.

`nemo_config` writes the config. `read_architecture` reads it again with NeMo's defaults and refuses an architecture
that no stock class of any target computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nemo_ee.families.architecture import ALL_LINEARS, QKV, Architecture, keyed, linear_scaling, llama3_scaling

_SWIGLU = ("swiglu", "fast-swiglu")
_KEYS = keyed(
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size "
    "max_position_embeddings rotary_base init_method_std",
    norm_epsilon="layernorm_epsilon",
    qk_norm="qk_layernorm",
    tied="share_embeddings_and_output_weights",
)
# Activation -> NeMo's `activation` and `openai_gelu`.
_NEMO_ACTIVATIONS = {
    "silu": ("fast-swiglu", False),
    "relu": ("relu", False),
    "gelu": ("gelu", True),
    "gelu_erf": ("gelu", False),
}


def nemo_config(a: Architecture) -> dict[str, Any]:
    """The part of a NeMo `MegatronGPTModel` config that follows from the architecture.

    The keys are the same for all models, with three exceptions: `bias_activation_fusion: false` is present only if
    fusing would be wrong, the four numbers of `scale_positional_embedding` only if that is on, and `name` only if
    NeMo's model needs another layer spec than its default. NeMo's model reads all keys except `vocab_size`,
    `rope_scaling` (the same numbers for the early-exit model) and `activation: relu`.
    """
    scaling = a.rotary_scaling or {}
    kind = scaling.get("type")
    activation, openai_gelu = _NEMO_ACTIVATIONS[a.hidden_act]
    config: dict[str, Any] = {
        "mcore_gpt": True,
        **{key: getattr(a, field) for field, key in _KEYS.items()},
        "encoder_seq_length": a.sequence_length or a.max_position_embeddings,
        "normalization": "layernorm" if a.layer_norm else "rmsnorm",
        "activation": activation,
        "openai_gelu": openai_gelu,
        "bias": a.bias,
        "qkv_bias": QKV in a.biases,
        "position_embedding_type": "learned_absolute" if a.learned_positions else "rope",
        "rotary_percentage": 1.0,
        "seq_len_interpolation_factor": scaling["factor"] if kind == "linear" else None,
        "scale_positional_embedding": kind == "llama3",
        "rope_scaling": {key: value for key, value in scaling.items() if key != "rope_type"} or None,
        "transformer_block_type": "pre_ln",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
    }
    if not a.gated:
        # Megatron's fused GELU is the tanh approximation in every case, and there is no fused ReLU.
        config["bias_activation_fusion"] = False
    if a.qk_norm:
        config["name"] = "decoder_block_gpt"  # NeMo's only layer spec with norms of query and key
    if kind == "llama3":
        config |= {
            "scale_factor": scaling["factor"],
            "low_freq_factor": scaling["low_freq_factor"],
            "high_freq_factor": scaling["high_freq_factor"],
            "old_context_len": scaling["original_max_position_embeddings"],
        }
    return config


def read_architecture(
    config: Mapping[str, Any], *, stored_rows: int, max_positions: int | None, erf_gelu: bool = False
) -> Architecture:
    """Read a `.nemo`'s model config.

    Args:
        config: the model config as plain values.
        stored_rows: number of rows of the stored word embeddings. It is the vocabulary size if the config has none,
            as in NeMo's exporter.
        max_positions: overrides the config's `max_position_embeddings`.
        erf_gelu: whether the target computes the exact GELU (`gelu_erf`); TensorRT-LLM has only the tanh
            approximation.

    Raises:
        ValueError: no stock class computes the model; all reasons in one message.
    """
    get = config.get
    heads, hidden = int(get("num_attention_heads") or 1), int(get("hidden_size") or 1)
    normalization = str(get("normalization") or "layernorm").lower()
    activation = str(get("activation") or "gelu").lower()
    positions = str(get("position_embedding_type") or "learned_absolute").lower()
    # NeMo fuses bias and activation by default, and Megatron's fused GELU is the tanh approximation.
    tanh_gelu = bool(get("openai_gelu") or activation == "openai-gelu" or get("bias_activation_fusion", True))
    llama_like = normalization == "rmsnorm" and activation in _SWIGLU and positions == "rope"
    gpt_like = normalization == "layernorm" and activation in ("gelu", "openai-gelu", "relu")
    gpt_like = gpt_like and positions == "learned_absolute"
    problems = []
    if not llama_like and not gpt_like:
        problems.append(
            f"normalization={normalization}, activation={activation}, position_embedding_type={positions}: no stock "
            "class is known for this; supported are (rmsnorm, swiglu, rope) and (layernorm, gelu or relu, "
            "learned_absolute)"
        )
    if gpt_like and activation == "gelu" and not tanh_gelu and not erf_gelu:
        problems.append("activation=gelu without openai_gelu: TensorRT-LLM's GELU is the tanh approximation, not this")
    if gpt_like and get("qkv_bias") and not get("bias", True):
        problems.append("qkv_bias without bias: GPTForCausalLM has one switch for all biases")
    if gpt_like and get("qk_layernorm"):
        problems.append("qk_layernorm with layernorm: no stock class is known for this; Qwen3 has it with rmsnorm")
    problems += _problems_of_settings(get)
    scaling = None
    if llama_like:
        scaling, problem = _rotary_scaling(get)
        problems += problem
    if problems:
        raise ValueError("; ".join(problems))
    biases = ALL_LINEARS if get("bias", True) else frozenset({QKV} if get("qkv_bias", False) else ())
    defaults = {  # NeMo's defaults
        "ffn_hidden_size": 4 * hidden,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "vocab_size": stored_rows,
        "max_position_embeddings": get("encoder_seq_length"),
        "norm_epsilon": 1e-5,
        "qk_norm": False,
        "rotary_base": 10000.0,
        "init_method_std": 0.02,
    }
    types = {
        own.name: {"int": int, "float": float, "bool": bool}.get(own.type) for own in dataclasses.fields(Architecture)
    }
    fields = {field: types[field](get(key) or defaults.get(field)) for field, key in _KEYS.items()}
    fields |= {"num_attention_heads": heads, "tied": bool(get("share_embeddings_and_output_weights", True))}
    if max_positions is not None:
        fields["max_position_embeddings"] = max_positions
    act = "silu" if llama_like else "relu" if activation == "relu" else "gelu" if tanh_gelu else "gelu_erf"
    return Architecture(
        **fields,
        layer_norm=gpt_like,
        hidden_act=act,
        biases=biases,
        learned_positions=gpt_like,
        rotary_scaling=scaling,
    )


def _problems_of_settings(get) -> list[str]:  # noqa: ANN001
    refused = {
        "mcore_gpt": (get("mcore_gpt", True) is False, "NeMo's legacy GPT is not supported"),
        "transformer_block_type": (get("transformer_block_type", "pre_ln") != "pre_ln", "must be pre_ln"),
        "rotary_percentage": (float(get("rotary_percentage", 1.0)) != 1.0, "must be 1.0"),
        "rotary_interleaved": (bool(get("rotary_interleaved")), "must be False"),
        "num_moe_experts": (bool(get("num_moe_experts")), "mixtures of experts are not supported"),
        "window_size": (get("window_size") is not None, "attention windows are not supported"),
        "layernorm_zero_centered_gamma": (bool(get("layernorm_zero_centered_gamma")), "must be False"),
        "apply_query_key_layer_scaling": (bool(get("apply_query_key_layer_scaling")), "must be False"),
    }
    return [f"{key}={get(key)!r}: {why}" for key, (wrong, why) in refused.items() if wrong]


def _rotary_scaling(get) -> tuple[dict[str, Any] | None, list[str]]:  # noqa: ANN001
    factor = get("seq_len_interpolation_factor")
    if factor is not None and get("scale_positional_embedding"):
        return None, ["seq_len_interpolation_factor and scale_positional_embedding: one of them only"]
    if factor is not None:
        return linear_scaling(factor), []
    if not get("scale_positional_embedding"):
        return None, []
    low, high, original = get("low_freq_factor", 1), get("high_freq_factor", 4), get("old_context_len", 8192)
    return llama3_scaling(get("scale_factor", 8), low, high, original), []
