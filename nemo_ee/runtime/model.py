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

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from nemo_ee.generation.items import Items
from nemo_ee.runtime.config import RuntimeConfig
from nemo_ee.runtime.linear import Linear
from nemo_ee.runtime.rotary import RotaryTable, inverse_frequencies


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
class NormWeights:
    """RMSNorm has a weight, LayerNorm weight and bias, or neither. `[h]`."""

    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class MlpWeights:
    """An MLP with the norm in front of it. `fc1`: h to 2f, gate's columns first, or to f; `fc2`: f to h."""

    norm: NormWeights
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class LayerWeights:
    """A transformer layer. `qkv`: h to (H + 2K) d, pairs of rotary dimensions together; `proj`: H d to h."""

    norm: NormWeights
    qkv: Linear
    proj: Linear
    mlp: MlpWeights


@dataclass(frozen=True)
class HeadWeights:
    """An exit head, or the final exit: what runs, in this order, on the hidden state at its tap."""

    layer: LayerWeights | None
    mlp: MlpWeights | None
    norm: NormWeights | None
    output: Linear


@dataclass(frozen=True)
class Weights:
    """All of a model. `positions`: learned ones; `heads`: by exit name, the final exit under None."""

    embedding: Tensor
    positions: Tensor | None
    layers: tuple[LayerWeights, ...]
    heads: dict[str | None, HeadWeights]


class RuntimeCache:
    """Keys and values by position: per slot (a layer, or an exit that attends) `[sequences, 2K, max_length, d]`."""

    def __init__(
        self, slots: list[Hashable], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        # Zeros, because positions past a sequence's end are read, and masked, when sequences are attended to together.
        self.slabs = {slot: torch.zeros(shape, dtype=dtype, device=device) for slot in slots}

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` positions of one sequence: nothing to do, a place is written before it is read."""


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
            num_turned = config.num_heads + config.num_kv_heads
            self._rotary = RotaryTable(frequencies, num_turned, config.num_kv_heads, self.device)
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
        rotation = self._rotation(items)
        for half in range(start, stop):
            layer = self.weights.layers[half >> 1]
            if half & 1:
                hidden = self._mlp(layer.mlp, hidden)
            else:
                hidden = self._attention(layer, hidden, items, rotation, cache.slabs[half >> 1])
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
            hidden = self._attention(head.layer, hidden, items, self._rotation(items), cache.slabs[name])
            hidden = self._mlp(head.layer.mlp, hidden)
        if head.mlp is not None:
            hidden = self._mlp(head.mlp, hidden)
        if head.norm is not None:
            hidden = self._norm(hidden, head.norm)
        return head.output(hidden).float()

    def _norm(self, hidden: Tensor, norm: NormWeights) -> Tensor:
        if self.config.layer_norm:
            return F.layer_norm(hidden, hidden.shape[-1:], norm.weight, norm.bias, self.config.norm_epsilon)
        return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, self.config.norm_epsilon)

    def _mlp(self, mlp: MlpWeights, hidden: Tensor) -> Tensor:
        return mlp.fc2.added_to(hidden, self._activate(mlp.fc1(self._norm(hidden, mlp.norm))))

    def _rotation(self, items: Items) -> Tensor | None:
        """Factors for all heads at the items' positions, `[n, H + 2K, d/2]`; None without rotary positions."""
        if self._rotary is None:
            return None
        groups = items.groups
        if len(groups) == 1 and isinstance(groups[0].positions, range):
            return self._rotary.at(groups[0].positions)
        return self._rotary.at_items(items.position, max(group.length for group in groups) - 1)

    def _turn(self, heads: Tensor, rotation: Tensor | None) -> Tensor:
        """`[n, heads * d]` -> `[n, heads, d]` in the cache's dtype, queries and keys turned to their positions."""
        if rotation is None:
            return heads.view(heads.shape[0], -1, self.config.head_dim).to(self._cache_dtype)
        pairs = torch.view_as_complex(heads.float().view(*rotation.shape, 2))
        return torch.view_as_real(pairs * rotation).flatten(-2).to(self._cache_dtype)

    def _attention(
        self, layer: LayerWeights, hidden: Tensor, items: Items, rotation: Tensor | None, slab: Tensor
    ) -> Tensor:
        """A layer's attention and residual. `hidden`: `[n, h]`, as is the result."""
        heads = self._turn(layer.qkv(self._norm(hidden, layer.norm)), rotation)
        queries = heads[:, : self.config.num_heads]
        self._write(heads[:, self.config.num_heads :], items, slab)
        attended = self._attend(queries, items, slab).to(hidden.dtype)
        return layer.proj.added_to(hidden, attended)

    def _remember(self, layer: LayerWeights, hidden: Tensor, items: Items, slab: Tensor) -> None:
        """Keys and values of a layer, without its attention. `hidden`: `[n, h]`."""
        heads = self._turn(layer.qkv(self._norm(hidden, layer.norm)), self._rotation(items))
        self._write(heads[:, self.config.num_heads :], items, slab)

    def _write(self, keys_values: Tensor, items: Items, slab: Tensor) -> None:
        """Store `[n, 2K, d]` at the items' places in `[sequences, 2K, max_length, d]`."""
        groups = items.groups
        if len(groups) == 1 and isinstance(groups[0].positions, range):
            sequence, _, _, length, positions = groups[0]
            slab[sequence, :, positions.start : length] = keys_values.transpose(0, 1)
        else:
            # Advanced indices on both sides of a slice put the items' axis first: [n, 2K, d].
            slab[items.sequence, :, items.position] = keys_values

    def _attend(self, queries: Tensor, items: Items, slab: Tensor) -> Tensor:
        """`queries`: `[n, H, d]`; every item sees its sequence up to itself. Returns `[n, H d]`."""
        groups = items.groups
        first, last = groups[0].sequence, groups[-1].sequence
        if len(groups) > 1 and len(groups) == len(items) == last + 1 - first:
            return self._attend_each(queries, items, slab[first : last + 1])
        outputs = [
            self._attend_one(queries[first : last + 1], slab[sequence], positions, length)
            for sequence, first, last, length, positions in groups
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_each(self, queries: Tensor, items: Items, slab: Tensor) -> Tensor:
        """One item of each of n neighbouring sequences. `slab`: `[n, 2K, max_length, d]`. Returns `[n, H d]`."""
        count, num_kv = queries.shape[0], self.config.num_kv_heads
        longest = max(group.length for group in items.groups)
        # [n, 1, 1, longest]
        mask = torch.arange(longest, device=queries.device) <= items.position[:, None, None, None]
        # [n, H, d] -> [n, K, H/K, d]: the query heads of a key-value head are rows of one product.
        rows = queries.reshape(count, num_kv, -1, self.config.head_dim)
        keys, values = slab[:, :num_kv, :longest], slab[:, num_kv:, :longest]
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=self._scale)
        return attended.reshape(count, -1)

    def _attend_one(self, queries: Tensor, slab: Tensor, positions: range | tuple[int, ...], length: int) -> Tensor:
        """One sequence. `queries`: `[m, H, d]`; `slab`: `[2K, max_length, d]`. Returns `[m, H d]`."""
        count, num_kv = queries.shape[0], self.config.num_kv_heads
        keys, values = slab[None, :num_kv, :length], slab[None, num_kv:, :length]
        if count == 1:
            # [1, H, d] -> [1, K, H/K, d]: the query heads of a key-value head are rows of one product.
            rows = queries.view(1, num_kv, -1, self.config.head_dim)
            return F.scaled_dot_product_attention(rows, keys, values, scale=self._scale).view(1, -1)
        # [m, H, d] -> [1, H, m, d]
        rows = queries.transpose(0, 1)[None]
        mask = None
        whole = isinstance(positions, range) and positions.start == 0
        if not whole:
            own = torch.tensor(positions, device=queries.device)
            mask = torch.arange(length, device=queries.device) <= own[:, None]  # [m, length]
        attended = F.scaled_dot_product_attention(
            rows, keys, values, attn_mask=mask, is_causal=whole, scale=self._scale, enable_gqa=True
        )
        return attended[0].transpose(0, 1).reshape(count, -1)
