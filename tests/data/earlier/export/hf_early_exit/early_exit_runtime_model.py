# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A GPT with exits on one device, as the decoding engine wants it (`DecodingModel`).

    x' = x + W_o attention(W_qkv norm(x));   x'' = x' + W_2 act(W_1 norm(x'))

with RMSNorm, gated SiLU and rotary positions, or LayerNorm, GELU or ReLU and learned positions.

Few operations per token are what makes it fast: query, key and value are one product, gate and up another, residuals
are added by the product that ends a half layer, keys and values go into the cache with one copy. Attention runs in
fp32 on the CPU whatever the weights' dtype is, which is both exact and faster there.

Shapes: n items, h hidden, H query heads, K key-value heads, d their size, v vocabulary.
May import: torch, nemo_ee.generation, nemo_ee.runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from .early_exit_generation_items import Items
from .early_exit_runtime_attention import Placement, RuntimeCache
from .early_exit_runtime_config import RuntimeConfig
from .early_exit_runtime_linear import Linear
from .early_exit_runtime_norm import Norm
from .early_exit_runtime_rotary import RotaryTable, inverse_frequencies


def _gated_silu(inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _gated_silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class MlpWeights:
    """An MLP with the norm in front of it. `fc1`: h to 2f, gate's columns first, or to f; `fc2`: f to h."""

    norm: Norm
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class LayerWeights:
    """A transformer layer. `qkv`: h to (H + 2K) d, pairs of rotary dimensions together; `proj`: H d to h."""

    norm: Norm
    qkv: Linear
    proj: Linear
    mlp: MlpWeights


@dataclass(frozen=True)
class HeadWeights:
    """An exit head, or the final exit: what runs, in this order, on the hidden state at its tap."""

    layer: LayerWeights | None
    mlp: MlpWeights | None
    norm: Norm | None
    output: Linear


@dataclass(frozen=True)
class Weights:
    """All of a model. `positions`: learned ones; `heads`: by exit name, the final exit under None."""

    embedding: Tensor
    positions: Tensor | None
    layers: tuple[LayerWeights, ...]
    heads: dict[str | None, HeadWeights]


class RuntimeModel:
    """A `DecodingModel` over loaded weights; made by `nemo_ee.runtime.loader.load_model`.

    Attributes:
        config: what it is.
        num_layers, vocab_size, max_positions, exits, device: see `DecodingModel`.
    """

    def __init__(self, config: RuntimeConfig, weights: Weights, dtype: torch.dtype) -> None:
        self.config, self.weights = config, weights
        self.num_layers, self.vocab_size = config.num_layers, config.vocab_size
        self.max_positions = config.max_positions
        self.exits = tuple(exit.point for exit in config.exits)
        self.device, self.dtype = weights.embedding.device, dtype
        self._cache_dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        self._rotary = None
        if config.rope is not None:
            frequencies = inverse_frequencies(config.rope, config.head_dim)
            self._rotary = RotaryTable(frequencies, self.device)
        self._num_turned = config.num_heads + config.num_kv_heads
        self._activate = ACTIVATIONS[config.activation]
        self._scale = config.head_dim**-0.5

    def new_cache(self, num_sequences: int, max_length: int, active_exits: tuple[str, ...]) -> RuntimeCache:
        """Room for every layer (slots 0..L-1) and every active `layer` exit (slot = its name)."""
        own = [name for name in active_exits if self.weights.heads[name].layer is not None]
        shape = (num_sequences, 2 * self.config.num_kv_heads, max_length, self.config.head_dim)
        return RuntimeCache([*range(self.num_layers), *own], shape, self._cache_dtype, self.device)

    @torch.inference_mode()
    def embed(self, tokens: LongTensor, items: Items) -> Tensor:
        """Word embeddings, with learned positions where the model has them. Returns `[n, h]`."""
        hidden, positions = F.embedding(tokens, self.weights.embedding).to(self.dtype), self.weights.positions
        if positions is None:
            return hidden
        return hidden + F.embedding(items.position + self.config.position_offset, positions)

    @torch.inference_mode()
    def run(self, hidden: Tensor, items: Items, start: int, stop: int, cache: RuntimeCache) -> Tensor:
        """Run the half layers (start, stop]; odd ones are attention, even ones MLPs. `hidden`: `[n, h]`."""
        placement, rotation = self._place(items)
        cache.reach(items.groups)  # exits write at positions that have come to them, so these are all
        for half in range(start, stop):
            layer = self.weights.layers[half >> 1]
            if half & 1:
                hidden = self._mlp(layer.mlp, hidden)
            else:
                hidden = self._attention(layer, hidden, placement, rotation, cache.slabs[half >> 1])
        return hidden

    @torch.inference_mode()
    def observe_exit(self, name: str, hidden: Tensor, items: Items, cache: RuntimeCache) -> None:
        """A `layer` exit writes its keys and values; other exits do nothing. `hidden`: `[n, h]`."""
        layer = self.weights.heads[name].layer
        if layer is not None:
            self._remember(layer, hidden, items, cache.slabs[name])

    @torch.inference_mode()
    def propagate(self, hidden: Tensor, items: Items, stop: int, cache: RuntimeCache) -> None:
        """Write keys and values of all layers past `stop` as if `hidden` `[n, h]` came in (`runtime.propagation`)."""
        for index in range((stop + 1) // 2, self.num_layers):
            self._remember(self.weights.layers[index], hidden, items, cache.slabs[index])

    @torch.inference_mode()
    def exit_logits(self, name: str | None, hidden: Tensor, items: Items, cache: RuntimeCache) -> Tensor:
        """Logits of an exit, or of the final exit (None). `hidden`: `[n, h]`. Returns `[n, v]`, fp32."""
        head = self.weights.heads[name]
        if head.layer is not None:
            hidden = self._attention(head.layer, hidden, *self._place(items), cache.slabs[name])
            hidden = self._mlp(head.layer.mlp, hidden)
        if head.mlp is not None:
            hidden = self._mlp(head.mlp, hidden)
        if head.norm is not None:
            hidden = head.norm(hidden)
        return head.output(hidden).float()

    def _mlp(self, mlp: MlpWeights, hidden: Tensor) -> Tensor:
        return mlp.fc2.added_to(hidden, self._activate(mlp.fc1(mlp.norm(hidden))))

    def _place(self, items: Items) -> tuple[Placement, Tensor | None]:
        """Where the items stand, and their rotation, `[n, 1, d/2]`; None without rotary positions.

        Kept with the items, since every segment of a flight asks for the same, and others may ask in between.
        """
        kept = items.__dict__.get("placed")
        if kept is None or kept[0] is not self:
            rotation = None if self._rotary is None else self._rotary.at(items)
            kept = items.__dict__["placed"] = self, Placement(items, self._cache_dtype), rotation
        return kept[1], kept[2]

    def _heads(self, layer: LayerWeights, hidden: Tensor, rotation: Tensor | None) -> Tensor:
        """`[n, h]` -> queries, keys and values `[n, H + 2K, d]` in the cache's dtype, turned to their positions."""
        heads = layer.qkv(layer.norm(hidden)).view(hidden.shape[0], -1, self.config.head_dim)
        if rotation is not None:
            # A pair of neighbouring numbers is a complex one; values, which stand last, are not turned.
            heads = heads.float()
            heads[:, : self._num_turned].view(torch.complex64).mul_(rotation)
        return heads.to(self._cache_dtype)

    def _attention(
        self, layer: LayerWeights, hidden: Tensor, placement: Placement, rotation: Tensor | None, slab: Tensor
    ) -> Tensor:
        """A layer's attention and residual. `hidden`: `[n, h]`, as is the result."""
        heads, num_heads = self._heads(layer, hidden, rotation), self.config.num_heads
        placement.write(heads[:, num_heads:], slab)
        attended = placement.attend(heads[:, :num_heads], slab, self._scale).to(hidden.dtype)
        return layer.proj.added_to(hidden, attended)

    def _remember(self, layer: LayerWeights, hidden: Tensor, items: Items, slab: Tensor) -> None:
        """Keys and values of a layer, without its attention. `hidden`: `[n, h]`."""
        placement, rotation = self._place(items)
        placement.write(self._heads(layer, hidden, rotation)[:, self.config.num_heads :], slab)
