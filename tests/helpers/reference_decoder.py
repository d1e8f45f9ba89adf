# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`TinyTransformer` for `nemo_ee.generation.reference`: the whole sequence at once, attention as a loop over heads.

It shares the stub's weights and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.helpers.stub_models import LayerWeights, TinyTransformer, mlp, normed


class PlainTransformer:
    """A `PlainModel` over a stub's weights."""

    def __init__(self, model: TinyTransformer) -> None:
        self.model, self.num_layers, self.exits = model, model.num_layers, model.exits

    def hidden_states(self, tokens: Sequence[int]) -> list[Tensor]:
        return hidden_by_stop(self.model, tokens)

    def logits(self, exit: str | None, states: Sequence[Tensor]) -> Tensor:
        return logits_at(self.model, exit, states)


def attention(model: TinyTransformer, layer: LayerWeights, hidden: Tensor) -> Tensor:
    """Causal attention and residual over a whole sequence. `[s, h]` -> `[s, h]`."""
    source, d, length = normed(hidden), model.head_dim, hidden.shape[0]
    outputs = []
    for head in range(model.num_heads):
        kv = head // (model.num_heads // model.num_kv_heads)
        query = source @ layer.query[head * d : (head + 1) * d].T
        key = source @ layer.key[kv * d : (kv + 1) * d].T
        value = source @ layer.value[kv * d : (kv + 1) * d].T
        scores = query @ key.T / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        outputs.append(scores.softmax(dim=-1) @ value)
    return hidden + torch.cat(outputs, dim=1) @ layer.output.T


def hidden_by_stop(model: TinyTransformer, tokens: Sequence[int]) -> list[Tensor]:
    """The hidden states `[s, h]` at every stop 0..2 num_layers."""
    hidden = model.word_embeddings[list(tokens)] + model.position_embeddings[: len(tokens)]
    states = [hidden]
    for layer in model.layers:
        states.append(attention(model, layer, states[-1]))
        states.append(mlp(layer, states[-1]))
    return states


def logits_at(model: TinyTransformer, name: str | None, states: Sequence[Tensor]) -> Tensor:
    """An exit's logits for the whole sequence, `[s, v]`."""
    if name is None:
        return normed(states[-1]) @ model.outputs[None].T
    exit, own = model.configs[name], model.exit_layers[name]
    k = exit.layer
    if exit.architecture == "embedding":
        return states[2 * k] @ model.outputs[name].T
    if exit.architecture == "norm":
        return normed(states[2 * k]) @ model.outputs[name].T
    if exit.architecture == "mlp":
        return normed(mlp(own, states[2 * k - 1])) @ model.outputs[name].T
    return normed(mlp(own, attention(model, own, states[2 * k]))) @ model.outputs[name].T
