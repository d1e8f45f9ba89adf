# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What the tensors of a stock class are called, and of an exit head beside it, family by family.

May import: the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """Names of a family's tensors; those of a layer without its prefix, all but `embedding` without `.weight`.

    Attributes:
        layer: prefix of a layer, with its index from 0.
        qkv, fc1: linears that are computed together, in their order.
        positions: learned positions, if any.
        transposed: linears are stored as [in, out].
    """

    embedding: str
    layer: str
    final_norm: str
    attention_norm: str
    qkv: tuple[str, ...]
    proj: str
    mlp_norm: str
    fc1: tuple[str, ...]
    fc2: str
    positions: str | None = None
    transposed: bool = False


_SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

LLAMA = Names(
    embedding="model.embed_tokens.weight",
    layer="model.layers.{}.",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    qkv=_SEPARATE,
    proj="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    fc1=("mlp.gate_proj", "mlp.up_proj"),
    fc2="mlp.down_proj",
)
GPT2 = Names(
    embedding="transformer.wte.weight",
    layer="transformer.h.{}.",
    final_norm="transformer.ln_f",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    proj="attn.c_proj",
    mlp_norm="ln_2",
    fc1=("mlp.c_fc",),
    fc2="mlp.c_proj",
    positions="transformer.wpe.weight",
    transposed=True,
)
OPT = Names(
    embedding="model.decoder.embed_tokens.weight",
    layer="model.decoder.layers.{}.",
    final_norm="model.decoder.final_layer_norm",
    attention_norm="self_attn_layer_norm",
    qkv=_SEPARATE,
    proj="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    fc1=("fc1",),
    fc2="fc2",
    positions="model.decoder.embed_positions.weight",
)

NAMES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "gpt2": GPT2, "opt": OPT}
