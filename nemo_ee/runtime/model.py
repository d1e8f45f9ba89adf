# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A GPT with exits on one device that implements `DecodingModel`.

    x' = x + W_o attention(W_qkv norm(x));   x'' = x' + W_2 act(W_1 norm(x'))

with RMSNorm, gated SiLU and rotary positions, or LayerNorm, GELU or ReLU and learned positions; in some families the
query and key heads pass an RMSNorm before they are rotated.

It is fast because it needs few operations per token: query, key and value are one product, gate and up another,
residuals are added by the product that ends a half layer, keys and values go into the cache with one copy. Attention
runs in fp32 on the CPU whatever the weights' dtype is, which is both exact and faster there.

Shapes: n positions, h hidden, H query heads, K key-value heads, d their size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from nemo_ee.exits.probe import ExitProbe
from nemo_ee.generation.decoding_model import DecodingModel, TokenPositions, with_probes
from nemo_ee.generation.kv_cache import KVCache, Placement
from nemo_ee.generation.rotary import RotaryTable
from nemo_ee.runtime.exported_model import ExportedModel
from nemo_ee.runtime.linear import Linear
from nemo_ee.runtime.norm import Norm
from nemo_ee.runtime.rotary_frequencies import inverse_frequencies


def _gated_silu(inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _gated_silu,
    "relu": F.relu,
    "gelu": partial(F.gelu, approximate="tanh"),
    "gelu_erf": F.gelu,
}


@dataclass(frozen=True)
class MlpWeights:
    """An MLP with the norm in front of it. `fc1`: h to 2f, gate's columns first, or to f; `fc2`: f to h."""

    norm: Norm
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class LayerWeights:
    """A transformer layer. `qkv`: h to (H + 2K) d, pairs of rotary dimensions together; `heads_norm`: weights of the
    RMSNorm over every query and key head, `[H + K, d]`, or None; `proj`: H d to h."""

    norm: Norm
    qkv: Linear
    heads_norm: Tensor | None
    proj: Linear
    mlp: MlpWeights


@dataclass(frozen=True)
class HeadWeights:
    """An exit head, or the final exit: the modules that run, in this order, on the hidden state at its tap."""

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


class RuntimeModel(DecodingModel):
    """A `DecodingModel` over loaded weights; made by `nemo_ee.runtime.loader.load_model`.

    Attributes:
        config: sizes, family and exits; `architecture`: without the exits.
        num_layers, vocab_size, max_positions, exits, device, exits_with_kv: see `DecodingModel`.
    """

    def __init__(
        self,
        config: ExportedModel,
        weights: Weights,
        dtype: torch.dtype,
        probes: Mapping[str, ExitProbe] = MappingProxyType({}),
    ) -> None:
        self.config, self.weights = config, weights
        architecture = self.architecture = config.architecture
        self.num_layers, self.vocab_size = architecture.num_layers, architecture.vocab_size
        self.max_positions = architecture.usable_positions
        self.exits_with_kv = [name for name, head in weights.heads.items() if head.layer is not None]
        self.device, self.dtype = weights.embedding.device, dtype
        self.exits = with_probes((exit.point for exit in config.exits), probes, self.device)
        self._cache_dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        self._rotary = None
        if not architecture.learned_positions:
            frequencies = inverse_frequencies(architecture)
            self._rotary = RotaryTable(
                lambda length: torch.arange(length).float()[:, None] * frequencies, device=self.device
            )
        # Every segment of a forward pass needs the same rotations, and exits are evaluated in between.
        self._rotations: WeakKeyDictionary[TokenPositions, Tensor] = WeakKeyDictionary()
        self._num_heads, self._num_kv_heads = architecture.num_attention_heads, architecture.num_query_groups
        self._num_rotated = self._num_heads + self._num_kv_heads
        self._activate = ACTIVATIONS[architecture.hidden_act]
        self._head_dim = architecture.kv_channels
        self._scale = self._head_dim**-0.5

    def new_cache(self, num_sequences: int, max_length: int, active_exits: tuple[str, ...]) -> KVCache:
        """Storage for every layer (slots 0..L-1) and every active `layer` exit (slot = its name)."""
        own = [name for name in active_exits if self.weights.heads[name].layer is not None]
        return KVCache(
            [*range(self.num_layers), *own],
            num_sequences,
            max_length,
            self._num_kv_heads,
            self._head_dim,
            self._cache_dtype,
            self.device,
        )

    @torch.inference_mode()
    def embed(self, tokens: LongTensor, positions: TokenPositions) -> Tensor:
        """Word embeddings, with learned positions where the model has them. Returns `[n, h]`."""
        hidden, learned = F.embedding(tokens, self.weights.embedding).to(self.dtype), self.weights.positions
        if learned is None:
            return hidden
        return hidden + F.embedding(positions.position, learned)

    @torch.inference_mode()
    def run(self, hidden: Tensor, positions: TokenPositions, start: int, stop: int, cache: KVCache) -> Tensor:
        """Run the half layers (start, stop]; odd ones are attention, even ones MLPs. `hidden`: `[n, h]`."""
        placement, rotation = cache.place(positions), self._rotation(positions)
        for half in range(start, stop):
            layer = self.weights.layers[half >> 1]
            if half & 1:
                hidden = self._mlp(layer.mlp, hidden)
            else:
                hidden = self._attention(layer, hidden, placement, rotation, cache, half >> 1)
        return hidden

    @torch.inference_mode()
    def write_exit_kv(self, name: str, hidden: Tensor, positions: TokenPositions, cache: KVCache) -> None:
        """A `layer` exit writes its keys and values; other exits do nothing. `hidden`: `[n, h]`."""
        layer = self.weights.heads[name].layer
        if layer is not None:
            self._write_kv(layer, hidden, positions, cache, name)

    @torch.inference_mode()
    def propagate(self, hidden: Tensor, positions: TokenPositions, stop: int, cache: KVCache) -> None:
        """Write keys and values of all layers past `stop` as if `hidden` `[n, h]` came in (`runtime.propagation`)."""
        for index in range((stop + 1) // 2, self.num_layers):
            self._write_kv(self.weights.layers[index], hidden, positions, cache, index)

    @torch.inference_mode()
    def exit_logits(self, name: str | None, hidden: Tensor, positions: TokenPositions, cache: KVCache) -> Tensor:
        """Logits of an exit, or of the final exit (None). `hidden`: `[n, h]`. Returns `[n, v]`, fp32."""
        head = self.weights.heads[name]
        if head.layer is not None:
            placement, rotation = cache.place(positions), self._rotation(positions)
            hidden = self._attention(head.layer, hidden, placement, rotation, cache, name)
            hidden = self._mlp(head.layer.mlp, hidden)
        if head.mlp is not None:
            hidden = self._mlp(head.mlp, hidden)
        if head.norm is not None:
            hidden = head.norm(hidden)
        return head.output(hidden).float()

    def _mlp(self, mlp: MlpWeights, hidden: Tensor) -> Tensor:
        return mlp.fc2.added_to(hidden, self._activate(mlp.fc1(mlp.norm(hidden))))

    def _rotation(self, positions: TokenPositions) -> Tensor | None:
        """The rotation of each row, `[n, 1, d/2]`; None without rotary positions."""
        if self._rotary is None:
            return None
        found = self._rotations.get(positions)
        if found is None:
            found = self._rotations[positions] = self._rotary.at(positions)
        return found

    def _heads(self, layer: LayerWeights, hidden: Tensor, rotation: Tensor | None) -> Tensor:
        """`[n, h]` -> queries, keys and values `[n, H + 2K, d]` in the cache's dtype, rotated to their positions."""
        heads = layer.qkv(layer.norm(hidden)).view(hidden.shape[0], -1, self._head_dim)
        if layer.heads_norm is not None:
            rotated, epsilon = heads[:, : self._num_rotated].float(), self.architecture.norm_epsilon
            heads[:, : self._num_rotated] = F.rms_norm(rotated, (self._head_dim,), eps=epsilon) * layer.heads_norm
        if rotation is not None:
            # A pair of neighbouring numbers is one complex number. Values come last and are not rotated.
            heads = heads.float()
            heads[:, : self._num_rotated].view(torch.complex64).mul_(rotation)
        return heads.to(self._cache_dtype)

    def _attention(
        self,
        layer: LayerWeights,
        hidden: Tensor,
        placement: Placement,
        rotation: Tensor | None,
        cache: KVCache,
        slot: int | str,
    ) -> Tensor:
        """A layer's attention and residual. `hidden`: `[n, h]`, as is the result."""
        heads, num_heads = self._heads(layer, hidden, rotation), self._num_heads
        cache.write(slot, placement, heads[:, num_heads:])
        attended = cache.attend(slot, placement, heads[:, :num_heads], self._scale).to(hidden.dtype)
        return layer.proj.added_to(hidden, attended)

    def _write_kv(
        self, layer: LayerWeights, hidden: Tensor, positions: TokenPositions, cache: KVCache, slot: int | str
    ) -> None:
        """Keys and values of a layer, without its attention. `hidden`: `[n, h]`."""
        heads = self._heads(layer, hidden, self._rotation(positions))
        cache.write(slot, cache.place(positions), heads[:, self._num_heads :])
