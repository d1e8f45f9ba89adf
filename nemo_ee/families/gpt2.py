# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""GPT-2: LayerNorm, learned positions; every linear has a bias and is stored as its transpose."""

from __future__ import annotations

from typing import Any

from nemo_ee.families.architecture import ALL_LINEARS, FC1, Architecture
from nemo_ee.families.config_reader import PLAIN, ConfigReader
from nemo_ee.families.family import EngineClass, Family
from nemo_ee.families.tensors import Names

# transformers' names of the activations, for what is written.
ACTIVATIONS = {"relu": "relu", "gelu": "gelu_new", "gelu_erf": "gelu"}

_NAMES = Names(
    base="transformer.",
    words="transformer.wte.weight",
    positions="transformer.wpe.weight",
    layer="transformer.h.{}.",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    proj="attn.c_proj",
    mlp_norm="ln_2",
    fc1=("mlp.c_fc",),
    fc2="mlp.c_proj",
    final_norm="transformer.ln_f",
    transposed=True,
    buffers=r"h\.\d+\.attn\.(bias|masked_bias)",
)


def layer_norm_architecture(
    reader: ConfigReader, keys: tuple[str, str, str], positions: int, **others: Any
) -> Architecture:
    """LayerNorm, learned positions, a key-value head per query head. `keys`: hidden size, layers, heads."""
    hidden, layers, heads = (reader.size(key) for key in keys)
    reader.refuse_if(hidden % heads, f"{keys[0]}: {hidden}, not a multiple of {keys[2]} {heads}")
    return Architecture(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=max(hidden // heads, 1),
        vocab_size=reader.size("vocab_size"),
        max_position_embeddings=positions,
        # Learned positions are a stored matrix, whose rows NeMo counts by encoder_seq_length.
        sequence_length=positions,
        layer_norm=True,
        learned_positions=True,
        tied=reader.flag("tie_word_embeddings", True),
        **others,
    )


def _read(reader: ConfigReader) -> Architecture:
    reader.refuse(
        {
            "scale_attn_by_inverse_layer_idx": "attention scores scaled by layer are not supported",
            "reorder_and_upcast_attn": "this attention is not supported",
        }
    )
    reader.refuse({"scale_attn_weights": "unscaled attention is not supported"}, value=False)
    hidden = reader.get("n_embd")
    return layer_norm_architecture(
        reader,
        ("n_embd", "n_layer", "n_head"),
        reader.positions("n_positions"),
        family="gpt2",
        ffn_hidden_size=reader.size("n_inner", default=4 * hidden if isinstance(hidden, int) else 1),
        norm_epsilon=reader.number("layer_norm_epsilon", 1e-5),
        hidden_act=reader.choice("activation_function", "gelu_new", PLAIN),
        biases=ALL_LINEARS,
        init_method_std=reader.number("initializer_range", 0.02),
    )


def _config(a: Architecture) -> dict[str, Any]:
    return {
        "vocab_size": a.vocab_size,
        "activation_function": ACTIVATIONS.get(a.hidden_act),
        "tie_word_embeddings": a.tied,
        "n_embd": a.hidden_size,
        "n_inner": a.ffn_hidden_size,
        "n_layer": a.num_layers,
        "n_head": a.num_attention_heads,
        "n_positions": a.max_position_embeddings,
        "layer_norm_epsilon": a.norm_epsilon,
    }


GPT2 = Family(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    config_class="GPT2Config",
    names=_NAMES,
    read=_read,
    config=_config,
    layers_key="n_layer",
    positions_key="n_positions",
    engine=EngineClass(
        architecture="GPTForCausalLM",
        computes=lambda a: a.layer_norm,
        fields=lambda a: {"gpt_variant": "gpt2", "bias": FC1 in a.biases},
    ),
)
