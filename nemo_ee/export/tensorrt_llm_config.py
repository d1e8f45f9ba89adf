# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A `.nemo`'s architecture in TensorRT-LLM's words: which stock class computes it, and the config.json of that class.

    RMSNorm, gated SiLU, rotary positions, no bias or all biases    LlamaForCausalLM (Llama, Mistral)
    the same with a bias on query, key and value alone              Qwen2ForCausalLM
    LayerNorm, ReLU, learned positions, all biases                  OPTForCausalLM
    LayerNorm, tanh-GELU or ReLU, learned positions                 GPTForCausalLM

Fields and classes: TensorRT-LLM 0.20 to 1.2.1. Anything that no stock class computes the same way is refused.

May import: the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SWIGLU = ("swiglu", "fast-swiglu")


@dataclass(frozen=True)
class Architecture:
    """What a backbone is, read once from a `.nemo`'s config with NeMo's own defaults."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm: bool
    norm_epsilon: float
    hidden_act: str
    bias: bool
    qkv_bias: bool
    learned_positions: bool
    rotary_base: float
    rotary_scaling: dict[str, Any] | None
    tied: bool

    @property
    def gated(self) -> bool:
        """Whether the MLP has the two branches `fc` (activated) and `gate` (linear)."""
        return self.hidden_act == "silu"

    @property
    def drafts(self) -> bool:
        """Whether exits are written as stand-alone draft models too."""
        return not self.learned_positions


def read_architecture(
    config: Mapping[str, Any], *, stored_rows: int, max_positions: int | None, erf_gelu: bool = False
) -> Architecture:
    """Read a `.nemo`'s model config.

    Args:
        config: plain values.
        stored_rows: rows of the stored word embeddings; the vocabulary size where the config has none, as NeMo's own
            exporter has it.
        max_positions: overrides the config's `max_position_embeddings`.
        erf_gelu: the exact GELU can be computed where this goes, and is called `gelu_erf`; TensorRT-LLM has only the
            tanh approximation.

    Raises:
        ValueError: what no stock class computes, all in one message.
    """
    get = config.get
    heads, hidden = int(get("num_attention_heads") or 1), int(get("hidden_size") or 1)
    normalization = str(get("normalization") or "layernorm").lower()
    activation = str(get("activation") or "gelu").lower()
    positions = str(get("position_embedding_type") or "learned_absolute").lower()
    # NeMo fuses bias and activation unless told not to, and Megatron's fused GELU is the tanh approximation.
    tanh_gelu = bool(get("openai_gelu") or activation == "openai-gelu" or get("bias_activation_fusion", True))
    llama_like = normalization == "rmsnorm" and activation in _SWIGLU and positions == "rope"
    gpt_like = normalization == "layernorm" and activation in ("gelu", "openai-gelu", "relu")
    gpt_like = gpt_like and positions == "learned_absolute"
    faults = []
    if not llama_like and not gpt_like:
        faults.append(
            f"normalization={normalization}, activation={activation}, position_embedding_type={positions}: no stock "
            "class is known for this; supported are (rmsnorm, swiglu, rope) and (layernorm, gelu or relu, "
            "learned_absolute)"
        )
    if gpt_like and activation == "gelu" and not tanh_gelu and not erf_gelu:
        faults.append("activation=gelu without openai_gelu: TensorRT-LLM's GELU is the tanh approximation, not this")
    if gpt_like and get("qkv_bias") and not get("bias", True):
        faults.append("qkv_bias without bias: GPTForCausalLM has one switch for all biases")
    faults += _faults_of_settings(get)
    scaling = None
    if llama_like:
        scaling, fault = _rotary_scaling(get)
        faults += fault
    if faults:
        raise ValueError("; ".join(faults))
    bias = bool(get("bias", True))
    qkv_bias = bool(get("qkv_bias", False)) or bias
    length = max_positions or get("max_position_embeddings") or get("encoder_seq_length")
    act = "silu" if llama_like else "relu" if activation == "relu" else "gelu" if tanh_gelu else "gelu_erf"
    return Architecture(
        name=_class_name(llama_like, act, bias, qkv_bias),
        num_layers=int(config["num_layers"]),
        hidden_size=hidden,
        ffn_hidden_size=int(get("ffn_hidden_size") or 4 * hidden),
        num_attention_heads=heads,
        num_query_groups=int(get("num_query_groups") or heads),
        kv_channels=int(get("kv_channels") or hidden // heads),
        vocab_size=int(get("vocab_size") or stored_rows),
        max_position_embeddings=int(length),
        layer_norm=gpt_like,
        norm_epsilon=float(get("layernorm_epsilon") or 1e-5),
        hidden_act=act,
        bias=bias,
        qkv_bias=qkv_bias,
        learned_positions=gpt_like,
        rotary_base=float(get("rotary_base") or 10000.0),
        rotary_scaling=scaling,
        tied=bool(get("share_embeddings_and_output_weights", True)),
    )


def _class_name(llama_like: bool, act: str, bias: bool, qkv_bias: bool) -> str:
    if llama_like:
        return "Qwen2ForCausalLM" if qkv_bias and not bias else "LlamaForCausalLM"
    return "OPTForCausalLM" if act == "relu" and bias else "GPTForCausalLM"


def _faults_of_settings(get) -> list[str]:  # noqa: ANN001
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
    """TensorRT-LLM looks a scaling's kind up under `type`, then `rope_type`; its numbers have Hugging Face's names."""
    factor = get("seq_len_interpolation_factor")
    if factor is not None and get("scale_positional_embedding"):
        return None, ["seq_len_interpolation_factor and scale_positional_embedding: one of them only"]
    if factor is not None:
        return {"type": "linear", "rope_type": "linear", "factor": float(factor)}, []
    if not get("scale_positional_embedding"):
        return None, []
    return {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": float(get("scale_factor", 8)),
        "low_freq_factor": float(get("low_freq_factor", 1)),
        "high_freq_factor": float(get("high_freq_factor", 4)),
        "original_max_position_embeddings": int(get("old_context_len", 8192)),
    }, []


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
    a = architecture
    config: dict[str, Any] = {
        "architecture": a.name,
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
        config |= (
            {"do_layer_norm_before": True} if a.name.startswith("OPT") else {"gpt_variant": "gpt2", "bias": a.bias}
        )
    else:
        config |= {"rotary_base": a.rotary_base, "rotary_scaling": a.rotary_scaling}
        config |= {"attn_bias": a.qkv_bias, "mlp_bias": a.bias}
        if a.name.startswith("Qwen2"):
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
        name=config["architecture"],
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
