# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What the supported Hugging Face families are in Megatron's words: their config.json, read and checked once.

Families: Llama 2/3, Mistral, Qwen2/2.5, GPT-2, OPT. Anything that Megatron's GPT would compute differently from
the model's own code is refused with its reason; all reasons come in one message. Absent optional keys mean what they
mean in the transformers library. Custom code named by a config.json is never run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from nemo_ee.checkpoint.architecture import linear_scaling, llama3_scaling
from nemo_ee.checkpoint.huggingface_backbone import FC1, FC2, PROJ, QKV, HuggingFaceBackbone, biases
from nemo_ee.text.huggingface_json import rotary_settings

# Hugging Face's names of the tanh approximation of GELU.
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")
_ERF_GELU = ("gelu", "gelu_python")


class _ConfigReader:
    """config.json's values with their checks; faults are collected, a faulty value reads as a harmless stand-in."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.faults: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number; required when there is no default."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.faults.append(f"{name}: {value!r}, must be a whole number of at least 1")
            return 1
        return value

    def number(self, name: str, default: float | None = None, *, within: dict[str, Any] | None = None) -> float:
        """A positive finite number; required when there is no default."""
        value = (self.values if within is None else within).get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            self.faults.append(f"{name}: {value!r}, must be a number above 0")
            return 1.0
        return value

    def refuse_if(self, condition: Any, reason: str) -> None:
        if condition:
            self.faults.append(reason)


def backbone_from_config(values: dict[str, Any], sequence_length: int | None = None) -> HuggingFaceBackbone:
    """Reads the contents of a config.json.

    Args:
        values: the parsed file.
        sequence_length: the length the model is to be used with, default the model's own maximum.

    Raises:
        ValueError: unsupported or inconsistent; the message lists every reason.
    """
    family = values.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"model_type: {family!r} is not supported; supported are {', '.join(_FAMILIES)}")
    reader = _ConfigReader(values)
    _refuse_what_no_family_has(reader)
    length = reader.size("n_positions" if family == "gpt2" else "max_position_embeddings")
    if sequence_length is not None:
        reader.refuse_if(
            not 1 <= sequence_length <= length,
            f"sequence length {sequence_length}: must lie in 1..{length}, the model's",
        )
    backbone = _FAMILIES[family](reader, family, length, sequence_length or length)
    if reader.faults:
        raise ValueError("; ".join(reader.faults))
    return backbone


def _refuse_what_no_family_has(reader: _ConfigReader) -> None:
    quantised = reader.get("quantization_config") or reader.get("compression_config")
    reader.refuse_if(quantised, "quantization_config: quantised weights are not read; use the unquantised model")
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        value = reader.get(name)
        reader.refuse_if(
            isinstance(value, int) and value > 0, f"{name}: {value}, mixtures of experts are not supported"
        )
    for name in ("use_parallel_residual", "parallel_residual", "parallel_attn"):
        reader.refuse_if(reader.get(name), f"{name}: true, attention and MLP in parallel are not supported")
    custom = reader.get("auto_map")
    reader.refuse_if(
        isinstance(custom, dict) and any("Model" in name for name in custom),
        "auto_map: the model brings its own code, which is never run; remove it if the stock class computes the same",
    )
    reader.refuse_if(reader.get("is_encoder_decoder"), "is_encoder_decoder: true, only decoders are supported")
    reader.refuse_if(reader.get("add_cross_attention"), "add_cross_attention: true, only plain decoders are supported")
    reader.refuse_if(reader.get("pruned_heads"), "pruned_heads: pruned attention heads are not supported")


def _llama_like(reader: _ConfigReader, family: str, length: int, sequence_length: int) -> HuggingFaceBackbone:
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    default_groups = (
        heads if "num_key_value_heads" in reader.values else {"mistral": 8, "qwen2": 32}.get(family, heads)
    )
    groups = reader.size("num_key_value_heads", default=default_groups)
    head_size = reader.get("head_dim")
    if head_size is None:
        reader.refuse_if(hidden % heads, f"hidden_size: {hidden}, not a multiple of num_attention_heads {heads}")
        head_size = max(hidden // heads, 1)
    else:
        head_size = reader.size("head_dim")
    reader.refuse_if(heads % groups, f"num_key_value_heads: {groups}, does not divide num_attention_heads {heads}")
    reader.refuse_if(head_size % 2, f"head_dim: {head_size}, rotary positions need an even number")
    act = reader.get("hidden_act", "silu")
    reader.refuse_if(act not in ("silu", "swish"), f"hidden_act: {act!r} is not supported; supported are silu, swish")
    _check_sliding_window(reader, family, sequence_length)
    base, scaling = _rope(reader)
    linears = {QKV} if family == "qwen2" else set()
    if family == "llama":
        linears |= {QKV, PROJ} if reader.get("attention_bias", False) else set()
        linears |= {FC1, FC2} if reader.get("mlp_bias", False) else set()
    return HuggingFaceBackbone(
        family=family,
        num_layers=reader.size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=reader.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_size,
        vocab_size=reader.size("vocab_size"),
        max_position_embeddings=length,
        sequence_length=sequence_length,
        layer_norm=False,
        norm_affine=True,
        norm_epsilon=reader.number("rms_norm_eps", 1e-6),
        hidden_act="silu",
        learned_positions=False,
        rotary_base=base,
        rotary_scaling=scaling,
        tied=bool(reader.get("tie_word_embeddings", False)),
        init_method_std=reader.number("initializer_range", 0.02),
        **biases(frozenset(linears)),
    )


def _check_sliding_window(reader: _ConfigReader, family: str, sequence_length: int) -> None:
    if family == "llama":
        return
    window = reader.get("sliding_window", 4096)
    if family == "qwen2":
        layers = reader.get("num_hidden_layers")
        first = reader.get("max_window_layers", 28)
        unused = isinstance(layers, int) and isinstance(first, int) and first >= layers
        window = window if reader.get("use_sliding_window", False) and not unused else None
    if window is None:
        return
    if not isinstance(window, int) or isinstance(window, bool):
        reader.faults.append(f"sliding_window: {window!r}, must be a whole number or null")
        return
    reader.refuse_if(
        window < sequence_length,
        f"sliding_window: {window} is shorter than the sequence length {sequence_length}, which Megatron's local "
        f"attention cannot do; ask for a sequence length of at most {window}",
    )


def _rope(reader: _ConfigReader) -> tuple[float, dict[str, Any] | None]:
    try:
        settings = rotary_settings(reader.values)
    except ValueError as fault:
        reader.faults.append(str(fault))
        return 1.0, None
    base, kind = reader.number("rope_theta", within=settings), settings["rope_type"]
    partial = settings.get("partial_rotary_factor", reader.get("partial_rotary_factor", 1.0))
    reader.refuse_if(partial != 1.0, f"partial_rotary_factor: {partial!r}, only 1.0 is supported")
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, linear_scaling(reader.number("factor", within=settings))
    if kind == "llama3":
        low, high = (reader.number(name, within=settings) for name in ("low_freq_factor", "high_freq_factor"))
        reader.refuse_if(low >= high, f"low_freq_factor: {low}, must be below high_freq_factor {high}")
        original = reader.number("original_max_position_embeddings", within=settings)
        return base, llama3_scaling(reader.number("factor", within=settings), low, high, original)
    reader.faults.append(f"rope type {kind!r} is not supported; supported are default, linear, llama3")
    return base, None


def _plain_activation(reader: _ConfigReader, name: str, default: str) -> str:
    """`hidden_act` of an MLP without gate."""
    act = reader.get(name, default)
    if act in _TANH_GELU:
        return "gelu"
    if act in _ERF_GELU:
        return "gelu_erf"
    supported = ", ".join(("relu", *_ERF_GELU, *_TANH_GELU))
    reader.refuse_if(act != "relu", f"{name}: {act!r} is not supported; supported are {supported}")
    return "relu"


def _layer_norm_family(
    reader: _ConfigReader, family: str, length: int, names: Sequence[str], **others: Any
) -> HuggingFaceBackbone:
    """GPT-2 and OPT: LayerNorm, learned positions, one query group per head. `names`: hidden, layers, heads."""
    hidden, layers, heads = (reader.size(name) for name in names)
    reader.refuse_if(hidden % heads, f"{names[0]}: {hidden}, not a multiple of {names[2]} {heads}")
    return HuggingFaceBackbone(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=max(hidden // heads, 1),
        vocab_size=reader.size("vocab_size"),
        max_position_embeddings=length,
        # Learned positions are a stored matrix, whose rows NeMo counts by encoder_seq_length.
        sequence_length=length,
        layer_norm=True,
        learned_positions=True,
        rotary_base=10000.0,
        rotary_scaling=None,
        tied=bool(reader.get("tie_word_embeddings", True)),
        **others,
    )


def _gpt2(reader: _ConfigReader, family: str, length: int, sequence_length: int) -> HuggingFaceBackbone:
    reader.refuse_if(
        reader.get("scale_attn_by_inverse_layer_idx", False),
        "scale_attn_by_inverse_layer_idx: true, attention scores scaled by layer are not supported",
    )
    reader.refuse_if(
        reader.get("reorder_and_upcast_attn", False), "reorder_and_upcast_attn: true, this attention is not supported"
    )
    reader.refuse_if(
        not reader.get("scale_attn_weights", True), "scale_attn_weights: false, unscaled attention is not supported"
    )
    hidden = reader.get("n_embd")
    return _layer_norm_family(
        reader,
        family,
        length,
        ("n_embd", "n_layer", "n_head"),
        ffn_hidden_size=reader.size("n_inner", default=4 * hidden if isinstance(hidden, int) else 1),
        norm_affine=True,
        norm_epsilon=reader.number("layer_norm_epsilon", 1e-5),
        hidden_act=_plain_activation(reader, "activation_function", "gelu_new"),
        init_method_std=reader.number("initializer_range", 0.02),
        **biases(frozenset({QKV, PROJ, FC1, FC2})),
    )


def _opt(reader: _ConfigReader, family: str, length: int, sequence_length: int) -> HuggingFaceBackbone:
    hidden, projected = reader.get("hidden_size"), reader.get("word_embed_proj_dim")
    reader.refuse_if(
        not reader.get("do_layer_norm_before", True),
        "do_layer_norm_before: false, norms after the residual (OPT-350m) are not supported",
    )
    reader.refuse_if(
        projected is not None and projected != hidden,
        f"word_embed_proj_dim: {projected}, projected embeddings (hidden_size is {hidden}) are not supported",
    )
    reader.refuse_if(
        reader.get("_remove_final_layer_norm", False), "_remove_final_layer_norm: true, the final norm is needed"
    )
    return _layer_norm_family(
        reader,
        family,
        length,
        ("hidden_size", "num_hidden_layers", "num_attention_heads"),
        ffn_hidden_size=reader.size("ffn_dim"),
        norm_affine=bool(reader.get("layer_norm_elementwise_affine", True)),
        norm_epsilon=1e-5,
        hidden_act=_plain_activation(reader, "activation_function", "relu"),
        init_method_std=reader.number("init_std", 0.02),
        **biases(frozenset({QKV, PROJ, FC1, FC2} if reader.get("enable_bias", True) else ())),
    )


_FAMILIES: dict[str, Callable[[_ConfigReader, str, int, int], HuggingFaceBackbone]] = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "gpt2": _gpt2,
    "opt": _opt,
}
