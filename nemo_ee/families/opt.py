# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""OPT: LayerNorm, learned positions from row 2 on, ReLU. Only OPT has switches for its biases and norm weights."""

from __future__ import annotations

from typing import Any

from nemo_ee.families.architecture import ALL_LINEARS, FC1, Architecture, keyed
from nemo_ee.families.config_reader import ConfigReader
from nemo_ee.families.family import EngineClass, Family
from nemo_ee.families.gpt2 import ACTIVATIONS, read_layer_norm_model
from nemo_ee.families.tensors import Names

_NO_FINAL_NORM = "_remove_final_layer_norm"
_NAMES = Names(
    base="model.",
    words="model.decoder.embed_tokens.weight",
    positions="model.decoder.embed_positions.weight",
    position_offset=2,  # the first two rows were padding and are not used
    layer="model.decoder.layers.{}.",
    attention_norm="self_attn_layer_norm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    fc1=("fc1",),
    fc2="fc2",
    final_norm="model.decoder.final_layer_norm",
)


_KEYS = keyed(  # the norms' epsilon has no key; it is 1e-5
    "vocab_size hidden_size num_attention_heads max_position_embeddings",
    ffn_hidden_size="ffn_dim",
    num_layers="num_hidden_layers",
    tied="tie_word_embeddings",
    init_method_std="init_std",
)


def _read(reader: ConfigReader) -> Architecture:
    hidden, projected = reader.get("hidden_size"), reader.get("word_embed_proj_dim")
    reader.refuse({"do_layer_norm_before": "norms after the residual (OPT-350m) are not supported"}, value=False)
    reader.refuse_if(
        projected is not None and projected != hidden,
        f"word_embed_proj_dim: {projected}, projected embeddings (hidden_size is {hidden}) are not supported",
    )
    reader.refuse({_NO_FINAL_NORM: "the final norm is needed"})
    return read_layer_norm_model(
        reader,
        _KEYS,
        "relu",
        family="opt",
        norm_affine=reader.flag("layer_norm_elementwise_affine", True),
        biases=ALL_LINEARS if reader.flag("enable_bias", True) else frozenset(),
    )


def _other_keys(a: Architecture) -> dict[str, Any]:
    return {
        "activation_function": ACTIVATIONS.get(a.hidden_act),
        "word_embed_proj_dim": a.hidden_size,
        "do_layer_norm_before": True,
        "enable_bias": FC1 in a.biases,
    }


OPT = Family(
    model_type="opt",
    model_class="OPTForCausalLM",
    config_class="OPTConfig",
    names=_NAMES,
    keys=_KEYS,
    read=_read,
    other_keys=_other_keys,
    special_tokens={"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
    chosen_for=lambda a: a.hidden_act == "relu" or not a.biases,
    droppable_final_norm=_NO_FINAL_NORM,
    engine=EngineClass(
        architecture="OPTForCausalLM",
        computes=lambda a: a.layer_norm and a.hidden_act == "relu" and FC1 in a.biases,
        fields=lambda a: {"do_layer_norm_before": True},
    ),
)
