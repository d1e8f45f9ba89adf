# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Stub models behind the engine's `DecodingModel` protocol.

* `ScriptedModel` has no weights: a script says what each exit answers, and the model checks and counts every piece of
  work the engine asks for. Nothing may be computed twice, out of order, or before what it depends on.
* `TinyTransformer` is a real causal transformer with seeded random weights, grouped queries and all four exit
  architectures, run on `KVCache`. `tests/helpers/reference_decoder.py` recomputes it from scratch.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from nemo_ee.exits.config import ExitConfig
from nemo_ee.exits.probe import ExitProbe
from nemo_ee.generation.decoding_model import DecodingModel, ExitPoint, TokenPositions, with_probes
from nemo_ee.generation.kv_cache import KVCache


def exit_points(*exits: tuple[str, int, int]) -> tuple[ExitPoint, ...]:
    """(name, layer, stop) triples as exit points, sorted by stop."""
    return tuple(sorted((ExitPoint(*exit) for exit in exits), key=lambda point: point.stop))


def random_probes(exits: Sequence[ExitPoint], hidden_size: int, seed: int) -> tuple[ExitPoint, ...]:
    """The exits, each with a probe whose confidence spreads over 0..1."""
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(hidden_size, generator=generator) / math.sqrt(hidden_size) for _ in exits)
    return with_probes(exits, {point.name: ExitProbe(2 * own, 0.1) for point, own in zip(exits, weights, strict=True)})


@dataclasses.dataclass
class ScriptedCache:
    """What was computed: (sequence, position) per half layer, and what each active exit heard of."""

    num_sequences: int
    max_length: int
    active_exits: tuple[str, ...]
    computed: dict[int, set[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    exit_kv: dict[str, set[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    evaluations: Counter = dataclasses.field(default_factory=Counter)
    rows_per_run: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)  # (start, stop, rows)
    thrown_away: int = 0  # (sequence, position, half layer) triples that `truncate` took back

    def truncate(self, sequence: int, length: int) -> None:
        """Forget a sequence's positions from `length` on."""
        for places in (self.computed, self.exit_kv):
            for key, done in places.items():
                kept = {pair for pair in done if pair[0] != sequence or pair[1] < length}
                self.thrown_away += (places is self.computed and key != 0) * (len(done) - len(kept))
                places[key] = kept


class ScriptedModel(DecodingModel):
    """A model whose exits answer by script.

    Args:
        num_layers: of the pretended stack.
        exits: as from `exit_points`.
        script: (exit name or None, token, position) -> (next token, its probability). It sees the token that was fed,
            not the sequence's number, so that a sequence gets the same answers in any batch.
        vocab_size, max_positions: as in the protocol.

    The hidden state is [token, position, depth]. `cache` is the newest cache.
    """

    def __init__(
        self,
        num_layers: int,
        exits: tuple[ExitPoint, ...],
        script: Callable[[str | None, int, int], tuple[int, float]],
        vocab_size: int = 50,
        max_positions: int = 64,
    ) -> None:
        self.num_layers, self.exits, self.script = num_layers, exits, script
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.cache: ScriptedCache | None = None

    def new_cache(self, num_sequences: int, max_length: int, active_exits: tuple[str, ...]) -> ScriptedCache:
        self.cache = ScriptedCache(num_sequences, max_length, active_exits)
        self.cache.computed = {half: set() for half in range(2 * self.num_layers + 1)}
        self.cache.exit_kv = {name: set() for name in active_exits}
        return self.cache

    def embed(self, tokens: LongTensor, positions: TokenPositions) -> Tensor:
        self._compute(0, positions, self.cache)
        return torch.stack([tokens, positions.position, torch.zeros_like(tokens)], dim=1).float()

    def run(self, hidden: Tensor, positions: TokenPositions, start: int, stop: int, cache: ScriptedCache) -> Tensor:
        assert start < stop <= 2 * self.num_layers, "an empty or impossible segment"
        self._check(hidden, positions, start)
        cache.rows_per_run.append((start, stop, len(positions)))
        for half in range(start + 1, stop + 1):
            self._compute(half, positions, cache)
        hidden = hidden.clone()
        hidden[:, 2] = stop
        return hidden

    def write_exit_kv(self, name: str, hidden: Tensor, positions: TokenPositions, cache: ScriptedCache) -> None:
        self._check(hidden, positions, self._stop_of(name))
        self._write_kv(name, positions, cache)

    def exit_logits(self, name: str | None, hidden: Tensor, positions: TokenPositions, cache: ScriptedCache) -> Tensor:
        self._check(hidden, positions, self._stop_of(name))
        if name is not None:
            self._write_kv(name, positions, cache)
            for pair in pairs(positions):  # a `layer` exit would attend to all of these
                assert {(pair[0], earlier) for earlier in range(pair[1])} <= cache.exit_kv[name], (
                    f"{name}: gap at {pair}"
                )
        rows = []
        for token, position, _ in hidden.long().tolist():
            cache.evaluations[name] += 1
            rows.append(self._logits(*self.script(name, token, position)))
        return torch.stack(rows)

    def _logits(self, token: int, probability: float) -> Tensor:
        rest = (1.0 - probability) / (self.vocab_size - 1)
        probabilities = torch.full((self.vocab_size,), rest)
        probabilities[token] = probability
        return probabilities.log()

    def _stop_of(self, name: str | None) -> int:
        return 2 * self.num_layers if name is None else next(own.stop for own in self.exits if own.name == name)

    def _check(self, hidden: Tensor, positions: TokenPositions, depth: int) -> None:
        assert hidden.shape == (len(positions), 3), "one row per item"
        assert (hidden[:, 2] == depth).all(), f"hidden states at depth {hidden[:, 2].tolist()} taken as depth {depth}"
        assert (hidden[:, 1] == positions.position).all(), "rows and positions are out of step"
        assert pairs(positions) == sorted(set(pairs(positions))), "positions ascend by sequence, then by position"

    def _compute(self, half: int, positions: TokenPositions, cache: ScriptedCache) -> None:
        done = cache.computed[half]
        twice = done & set(pairs(positions))
        assert not twice, f"half layer {half} computed twice for {sorted(twice)}"
        assert all(position < cache.max_length for _, position in pairs(positions)), "past the cache"
        done |= set(pairs(positions))
        for sequence, position in pairs(positions):
            missing = [earlier for earlier in range(position) if (sequence, earlier) not in done]
            assert not missing, f"half layer {half} of {(sequence, position)} misses the positions {missing}"

    def _write_kv(self, name: str, positions: TokenPositions, cache: ScriptedCache) -> None:
        assert name in cache.active_exits, f"exit {name} is not active"
        twice = cache.exit_kv[name] & set(pairs(positions))
        assert not twice, f"exit {name} writes twice for {sorted(twice)}"
        cache.exit_kv[name] |= set(pairs(positions))


def pairs(positions: TokenPositions) -> list[tuple[int, int]]:
    """The (sequence, position) pairs as a list."""
    return list(zip(positions.sequence.tolist(), positions.position.tolist(), strict=True))


@dataclasses.dataclass
class LayerWeights:
    """One pre-norm transformer layer (RMSNorm without a weight, GELU)."""

    query: Tensor  # [heads * d, h]
    key: Tensor  # [kv * d, h]
    value: Tensor  # [kv * d, h]
    output: Tensor  # [h, heads * d]
    up: Tensor  # [f, h]
    down: Tensor  # [h, f]


class TinyTransformer(DecodingModel):
    """A causal transformer with learned positions, grouped queries, and exits of the four architectures.

    Args:
        exits: configs; `name`, `layer` and `architecture` are used.
        num_layers, hidden_size, num_heads, num_kv_heads, vocab_size, max_positions: its shape.
        seed: of all weights.
        sharpness: scales the logits; larger = surer exits.
    """

    head_dim = 8

    def __init__(
        self,
        exits: Sequence[ExitConfig],
        *,
        num_layers: int = 4,
        hidden_size: int = 24,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        vocab_size: int = 37,
        max_positions: int = 64,
        seed: int = 0,
        sharpness: float = 6.0,
    ) -> None:
        self.num_layers, self.vocab_size, self.max_positions = num_layers, vocab_size, max_positions
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.scale = 1.0 / math.sqrt(self.head_dim)
        self.configs = {exit.name: exit for exit in exits}
        self.exits = exit_points(*((exit.name, exit.layer, exit.stop) for exit in exits))
        self.generator = torch.Generator().manual_seed(seed)
        self.hidden_size = hidden_size
        self.word_embeddings = self._random(vocab_size, hidden_size) * math.sqrt(hidden_size)
        self.position_embeddings = self._random(max_positions, hidden_size) * math.sqrt(hidden_size)
        self.layers = [self._layer() for _ in range(num_layers)]
        self.exit_layers = {name: self._layer() for name in self.configs}  # own MLP of `mlp`, own block of `layer`
        self.outputs = {name: sharpness * self._random(vocab_size, hidden_size) for name in (None, *self.configs)}

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator) / math.sqrt(shape[-1])

    def _layer(self) -> LayerWeights:
        h, d = self.hidden_size, self.head_dim
        q, kv, f = self.num_heads * d, self.num_kv_heads * d, 2 * h
        shapes = ((q, h), (kv, h), (kv, h), (h, q), (f, h), (h, f))
        return LayerWeights(*(self._random(*shape) for shape in shapes))

    def new_cache(self, num_sequences: int, max_length: int, active_exits: tuple[str, ...]) -> KVCache:
        attending = [name for name in active_exits if self.configs[name].architecture == "layer"]
        slots = [*range(1, self.num_layers + 1), *attending]
        return KVCache(slots, num_sequences, max_length, self.num_kv_heads, self.head_dim, checked=True)

    def embed(self, tokens: LongTensor, positions: TokenPositions) -> Tensor:
        return self.word_embeddings[tokens] + self.position_embeddings[positions.position]

    def run(self, hidden: Tensor, positions: TokenPositions, start: int, stop: int, cache: KVCache) -> Tensor:
        for half in range(start + 1, stop + 1):
            number = (half + 1) // 2
            layer = self.layers[number - 1]
            hidden = self._attention(number, layer, hidden, positions, cache) if half % 2 else mlp(layer, hidden)
        return hidden

    def write_exit_kv(self, name: str, hidden: Tensor, positions: TokenPositions, cache: KVCache) -> None:
        if self.configs[name].architecture == "layer":
            self._write(name, self.exit_layers[name], normed(hidden), positions, cache)

    def exit_logits(self, name: str | None, hidden: Tensor, positions: TokenPositions, cache: KVCache) -> Tensor:
        architecture = "norm" if name is None else self.configs[name].architecture
        if architecture == "layer":
            hidden = self._attention(name, self.exit_layers[name], hidden, positions, cache)
        if architecture in ("layer", "mlp"):
            hidden = mlp(self.exit_layers[name], hidden)
        if architecture != "embedding":
            hidden = normed(hidden)
        return hidden @ self.outputs[name].T

    def _write(
        self, slot: int | str, layer: LayerWeights, source: Tensor, positions: TokenPositions, cache: KVCache
    ) -> None:
        key, value = (
            (source @ weight.T).unflatten(1, (self.num_kv_heads, self.head_dim)) for weight in (layer.key, layer.value)
        )
        cache.write(slot, cache.place(positions), torch.cat((key, value), dim=1))

    def _attention(
        self, slot: int | str, layer: LayerWeights, hidden: Tensor, positions: TokenPositions, cache: KVCache
    ) -> Tensor:
        source = normed(hidden)
        self._write(slot, layer, source, positions, cache)
        query = (source @ layer.query.T).unflatten(1, (self.num_heads, self.head_dim))
        return hidden + cache.attend(slot, cache.place(positions), query, self.scale) @ layer.output.T


def normed(hidden: Tensor) -> Tensor:
    """RMSNorm without a weight. `[n, h]` -> `[n, h]`."""
    return hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + 1e-6)


def mlp(layer: LayerWeights, hidden: Tensor) -> Tensor:
    """The layer's MLP and residual. `[n, h]` -> `[n, h]`."""
    return hidden + F.gelu(normed(hidden) @ layer.up.T) @ layer.down.T
