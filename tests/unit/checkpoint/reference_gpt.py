# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's own GPT built from a `nemo_config()` and filled from a `WeightSource`, as a judge of both."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from nemo_ee.checkpoint.chunk_reader import WeightSource

VOCAB_MULTIPLE = 16


def build_gpt(config: dict[str, Any]) -> Any:
    """A `GPTModel` with Megatron's local layer spec, its vocabulary padded. Needs Megatron's parallel state."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    norm = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[config["normalization"]]
    gelu = functional.gelu if not config["openai_gelu"] else lambda x: functional.gelu(x, approximate="tanh")
    activation = {"fast-swiglu": functional.silu, "gelu": gelu, "relu": functional.relu}[config["activation"]]
    transformer = TransformerConfig(
        normalization=norm,
        activation_func=activation,
        gated_linear_unit=config["activation"].endswith("glu"),
        add_bias_linear=config["bias"],
        add_qkv_bias=config["qkv_bias"],
        qk_layernorm=config["qk_layernorm"],
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        use_cpu_initialization=True,
        **{
            name: config[name]
            for name in (
                "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
                "layernorm_epsilon hidden_dropout attention_dropout"
            ).split()
        },
    )
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=norm, qk_layernorm=config["qk_layernorm"]),
        vocab_size=-(-config["vocab_size"] // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        max_sequence_length=config["encoder_seq_length"],
        share_embeddings_and_output_weights=config["share_embeddings_and_output_weights"],
        position_embedding_type=config["position_embedding_type"],
        rotary_percent=config["rotary_percentage"],
        rotary_base=config["rotary_base"],
        seq_len_interpolation_factor=config["seq_len_interpolation_factor"],
    )
    if config["scale_positional_embedding"]:
        rotary = model.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            config["scale_factor"],
            config["low_freq_factor"],
            config["high_freq_factor"],
            config["old_context_len"],
        )
    return model.eval()


@torch.no_grad()
def fill(model: Any, source: WeightSource) -> set[str]:
    """Copies every shard that Megatron would save from `source`; returns the keys that were read."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    keys = set()
    state = model.sharded_state_dict()
    values = [value.build() if isinstance(value, ShardedTensorFactory) else value for value in nested_values(state)]
    for shard in (shard for value in values for shard in (value if isinstance(value, list) else [value])):
        if not isinstance(shard, ShardedTensor):
            continue
        shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
        chunk = source.read(shard.key, shard.global_offset, shape, allow_missing_rows=shard.allow_shape_mismatch)
        shard.data.copy_(chunk.view(shard.data.shape))
        keys.add(shard.key)
    for name, parameter in model.named_parameters():
        assert not parameter.isnan().any(), f"{name} was not filled"
    return keys


@torch.no_grad()
def gpt_logits(model: Any, tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits [b, s, v] of `tokens` [b, s], padding rows cut off."""
    length = tokens.shape[1]
    positions = torch.arange(length)[None].expand_as(tokens)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return model(tokens, positions, mask)[..., :vocab_size].float()
