# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""GPT-2: LayerNorm, learned positions; every linear has a bias and is stored as its transpose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_ee.families.architecture import ALL_LINEARS, FC1, Architecture, keyed
from nemo_ee.families.config_reader import PLAIN, ConfigReader
from nemo_ee.families.family import EngineClass, Family
from nemo_ee.families.gguf_metadata import GgufForm
from nemo_ee.families.tensors import Names

# transformers' names of the activations, for writing.
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
_GGUF_NAMES = Names(
    base="",
    words="token_embd.weight",
    positions="position_embd.weight",
    layer="blk.{}.",
    attention_norm="attn_norm",
    qkv=("attn_qkv",),
    proj="attn_output",
    mlp_norm="ffn_norm",
    fc1=("ffn_up",),
    fc2="ffn_down",
    final_norm="output_norm",
    output="output.weight",
)


_KEYS = keyed(
    "vocab_size",
    hidden_size="n_embd",
    ffn_hidden_size="n_inner",
    num_layers="n_layer",
    num_attention_heads="n_head",
    max_position_embeddings="n_positions",
    norm_epsilon="layer_norm_epsilon",
    tied="tie_word_embeddings",
    init_method_std="initializer_range",
)


def read_layer_norm_model(
    reader: ConfigReader, keys: Mapping[str, str], activation: str, *, ffn: int | None = None, **others: Any
) -> Architecture:
    """The architecture of a config.json: LayerNorm, learned positions, a key-value head per query head.

    Args:
        keys: see `Family`.
        activation: default of `activation_function`.
        ffn: default of the MLP size; None = its key is required.
        others: further fields of `Architecture`.
    """
    fields = reader.fields(keys, ffn_hidden_size=ffn, norm_epsilon=1e-5, tied=True, init_method_std=0.02)
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    names = keys["hidden_size"], keys["num_attention_heads"]
    reader.refuse_if(hidden % heads, f"{names[0]}: {hidden}, not a multiple of {names[1]} {heads}")
    reader.used_length(fields["max_position_embeddings"])
    return Architecture(
        **fields,
        num_query_groups=heads,
        kv_channels=max(hidden // heads, 1),
        hidden_act=reader.choice("activation_function", activation, PLAIN),
        # Learned positions are a stored matrix, whose rows NeMo counts by encoder_seq_length.
        sequence_length=fields["max_position_embeddings"],
        layer_norm=True,
        learned_positions=True,
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
    ffn = 4 * hidden if isinstance(hidden, int) else 1
    return read_layer_norm_model(reader, _KEYS, "gelu_new", ffn=ffn, family="gpt2", biases=ALL_LINEARS)


GPT2 = Family(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    config_class="GPT2Config",
    names=_NAMES,
    keys=_KEYS,
    read=_read,
    other_keys=lambda a: {"activation_function": ACTIVATIONS.get(a.hidden_act)},
    special_tokens={"bos_token_id": 50256, "eos_token_id": 50256},
    engine=EngineClass(
        architecture="GPTForCausalLM",
        computes=lambda a: a.layer_norm,
        fields=lambda a: {"gpt_variant": "gpt2", "bias": FC1 in a.biases},
    ),
    gguf=GgufForm(
        architecture="gpt2",
        names=_GGUF_NAMES,
        fields={"layer_norm": True, "learned_positions": True, "hidden_act": "gelu"},
        computes=lambda a: a.biases == ALL_LINEARS,
    ),
)
