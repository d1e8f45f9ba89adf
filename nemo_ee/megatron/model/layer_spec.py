# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Specs of the backbone and the exit heads: Megatron-core modules on Transformer Engine, or the local ones.

The checkpoint keys are the same for both (Megatron's canonical, Transformer-Engine ones): the local spec maps its
separate norms onto the names of the norms that Transformer Engine fuses into the next linear layer.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from nemo_ee.megatron.versions import mlp_submodules


class TorchNorm:
    """`torch.nn.LayerNorm` or `RMSNorm` by `config.normalization`, usable under sequence parallelism.

    Megatron's own wrapper around the torch norms refuses sequence parallelism. Here the parameters carry Megatron's
    mark for sequence parallelism: each tensor-parallel rank sees only its part of the sequence, so their gradients are
    summed over the tensor-parallel group.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs) -> torch.nn.Module:
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "model.normalization=layernorm1p (zero-centred gamma) needs Transformer Engine: "
                "set model.transformer_engine=True on a machine that has it"
            )
        norms = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        norm = norms[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


_PLAIN = "vanilla"  # the softmax of Megatron-core before it had others


class TorchAttention(DotProductAttention):
    """Megatron's own attention as one call of torch, equal up to rounding.

    Its kernels keep no [s, s] scores in memory, but for an attention mask with fp32 on some GPUs.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """See `DotProductAttention`: query [s, b, n, d], key and value [s, b, groups, d] -> [s, b, n * d]."""
        dropout = self.attention_dropout.p if self.training else 0.0
        causal = attention_mask is None and self.attn_mask_type is AttnMaskType.causal
        config = self.config
        plain = attention_bias is None and packed_seq_params is None and not config.apply_query_key_layer_scaling
        plain &= getattr(config, "window_size", None) is None and getattr(config, "softmax_type", _PLAIN) == _PLAIN
        if not plain or dropout or len(query) != len(key):
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
            )
        repeats = query.shape[2] // key.shape[2]
        if repeats > 1 and query.device.type != "cpu" and not (causal and query.dtype is not torch.float32):
            # The flash kernel alone takes fewer key heads on a GPU, and neither fp32 nor a mask.
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        context = scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (query, key, value)),
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).flatten(2)


class TapLinear(ColumnParallelLinear):
    """Megatron's own without the gradient of its input where nobody reads it: an `mlp` exit's first linear, whose
    input is a frozen norm of the tap. Transformer Engine's norm and linear in one form it all the same."""

    def forward(self, input_: Tensor, *arguments, **options) -> tuple[Tensor, Tensor | None]:
        """See `ColumnParallelLinear`."""
        if arguments or options or input_.requires_grad or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input_, *arguments, **options)
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_)
        return linear(input_, self.weight, None if self.skip_bias_add else self.bias), (
            self.bias if self.skip_bias_add else None
        )


@dataclass(frozen=True)
class BackboneSpecs:
    """Building blocks of the backbone and of the exit heads.

    Attributes:
        layer: spec of one transformer layer.
        exit_mlp: spec of an exit's own MLP.
        norm: class of the final norm and of the exits' norms, called with (config, hidden_size, eps).
        local_layer: the layer spec on Megatron's own linears, whatever the backbone uses. Low-rank updates need the
            normed input of a linear, which Transformer Engine's fused norm-linear does not hand out.
        local_norm: the norm that goes with `local_layer`.
    """

    layer: ModuleSpec
    exit_mlp: ModuleSpec
    norm: type
    local_layer: ModuleSpec
    local_norm: type = TorchNorm


def backbone_specs(config: TransformerConfig, *, transformer_engine: bool) -> BackboneSpecs:
    """Specs for a decoder-only GPT.

    Args:
        config: Megatron's transformer config (`normalization` and `qk_layernorm` are read).
        transformer_engine: build on Transformer Engine; otherwise on Megatron's local modules.

    Raises:
        ValueError: `transformer_engine` is set and Transformer Engine is not installed.
    """
    local = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    local.submodules.input_layernorm = TorchNorm
    local.submodules.pre_mlp_layernorm = TorchNorm
    local.submodules.self_attention.submodules.core_attention = TorchAttention
    if config.qk_layernorm:
        heads = local.submodules.self_attention.submodules
        heads.q_layernorm = heads.k_layernorm = TorchNorm
    if not transformer_engine:
        exit_mlp = deepcopy(local.submodules.mlp)
        mlp_submodules(exit_mlp).linear_fc1 = TapLinear
        return BackboneSpecs(local, exit_mlp, TorchNorm, local_layer=local)
    try:
        from megatron.core.extensions.transformer_engine import TENorm
    except ImportError as error:
        raise ValueError(
            "model.transformer_engine=True, but Transformer Engine is not installed; "
            "set model.transformer_engine=False or use a container that has it"
        ) from error
    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return BackboneSpecs(layer, layer.submodules.mlp, TENorm, local_layer=local)
