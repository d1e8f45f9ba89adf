# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the layers that a step skips.

    K_l = W_k,l norm_l(h),  V_l = W_v,l norm_l(h)   for every skipped layer l, h = hidden state at the exit

RMSNorm divides by the same number in every layer, so with its weights folded into the projections one matrix product
gives the keys and values of all skipped layers, and one call rotates all keys. The cache write is a call per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update

from nemo_ee.export.vllm.compiled import compiled

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class SkippedLayers(nn.Module):
    """The key and value projections of the layers behind the first exit.

    Args:
        layers: vLLM's decoder layers; their weights are loaded, and not yet packed for the device.
        first: index of the first layer that a step may skip.
        config: the configuration of the engine.

    The projections are a copy: `2 * key_value_heads * head_dim * hidden_size` numbers for each of these layers.

    Raises:
        ValueError: the attention backend cannot write keys and values without attention.
    """

    def __init__(self, layers: nn.ModuleList, first: int, config: VllmConfig) -> None:
        super().__init__()
        self._config, self._projections = config, {}
        self.first, behind = first, list(layers)[first:]
        self.names = [layer.self_attn.attn.layer_name for layer in behind]
        if not behind:  # the only exits are on the last layer
            return
        attention = behind[0].self_attn
        for backend in {layer.self_attn.attn.attn_backend for layer in behind}:
            if backend.forward_includes_kv_cache_update:
                raise ValueError(
                    f"early exit: the attention backend {backend.get_name()} writes keys and values only together "
                    "with attention; choose another with --attention-backend"
                )
        self.heads, self.head_dim = attention.num_kv_heads, attention.head_dim
        self.epsilon = behind[0].input_layernorm.variance_epsilon
        self.rotary = attention.rotary_emb
        projections = [layer.self_attn.qkv_proj for layer in behind]
        keys_from = attention.q_size
        folded = [
            (projection.weight[keys_from:].float() * layer.input_layernorm.weight.float()).to(projection.weight.dtype)
            for projection, layer in zip(projections, behind, strict=True)
        ]
        self.register_buffer("weight", torch.stack(folded), persistent=False)  # [layers, 2 * heads * head_dim, h]
        has_bias = projections[0].bias is not None
        bias = torch.stack([projection.bias[keys_from:] for projection in projections]) if has_bias else None
        self.register_buffer("bias", bias, persistent=False)
        norms = [layer.self_attn.k_norm for layer in behind if hasattr(layer.self_attn, "k_norm")]  # Qwen3
        self.key_epsilon = norms[0].variance_epsilon if norms else None
        self.register_buffer("key_norm", torch.stack([n.weight for n in norms]) if norms else None, persistent=False)

    def write(self, hidden: Tensor, positions: Tensor, first: int) -> None:
        """Write keys and values of every layer from `first` on.

        Args:
            hidden: `[rows, h]`.
            positions: `[rows]`.
            first: index of the first skipped layer.
        """
        names = self.names[first - self.first :]
        if not names:
            return
        if first not in self._projections:
            project = self._projection(first - self.first)
            self._projections[first] = compiled(project, self._config)
        keys, values = self._projections[first](hidden, positions)
        for name, own_keys, own_values in zip(names, keys.unbind(1), values.unbind(1), strict=True):
            unified_kv_cache_update(own_keys, own_values, name)

    def _projection(self, begin: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        weight = self.weight[begin:].flatten(0, 1)
        bias = None if self.bias is None else self.bias[begin:].flatten()
        key_norm = None if self.key_norm is None else self.key_norm[begin:].unsqueeze(1)
        layers = len(self.names) - begin

        def run(hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            """Keys and values, both `[rows, layers, heads, head_dim]`."""
            rows = hidden.shape[0]
            both = functional.linear(_divided_by_rms(hidden, self.epsilon), weight, bias)
            keys, values = both.view(rows, layers, 2, self.heads, self.head_dim).unbind(2)
            if key_norm is not None:
                keys = _divided_by_rms(keys, self.key_epsilon) * key_norm
            keys, _ = self.rotary(positions, keys.reshape(rows, -1), None)
            return keys.view(rows, layers, self.heads, self.head_dim), values

        return run


def _divided_by_rms(x: Tensor, epsilon: float) -> Tensor:
    square = x.float()
    return (square * torch.rsqrt(square.square().mean(dim=-1, keepdim=True) + epsilon)).to(x.dtype)
