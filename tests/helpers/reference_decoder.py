# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A naive early-exit decoder for `TinyTransformer`: every step recomputes the whole sequence, without any cache.

It shares the stub's weights and nothing else: attention is a loop over heads, decisions and the cap on waiting tokens
are written out, and nothing ever waits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.helpers.stub_models import LayerWeights, TinyTransformer, mlp, normed


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


def sure(logits: Tensor, criterion: str, threshold: float) -> bool:
    """Whether a token with these logits `[v]` leaves."""
    p = logits.double().softmax(dim=0).tolist()
    first, second = sorted(p, reverse=True)[:2]
    if criterion == "max_probability":
        return first > threshold
    if criterion == "margin":
        return first - second > threshold
    return -sum(x * math.log(x) for x in p if x > 0) < threshold


def decode(
    model: TinyTransformer,
    prompt: Sequence[int],
    num_new_tokens: int,
    *,
    thresholds: Mapping[str, float],
    criterion: str = "max_probability",
    max_pending_tokens: int | None = None,
    forced: Sequence[int] | None = None,
) -> tuple[list[int], list[str | None], list[Tensor]]:
    """Greedy decoding of one sequence.

    Args:
        thresholds: of the active exits.
        forced: feed these tokens instead of the most likely ones (scoring).

    Returns:
        New tokens, the exit each was read from, and the logits `[v]` it was read from.
    """
    tokens, exits, rows = list(prompt), [], []
    waiting = 0
    for step in range(num_new_tokens):
        states = hidden_by_stop(model, tokens)
        chosen = None
        if step > 0 and (max_pending_tokens is None or waiting < max_pending_tokens):
            for point in model.exits:
                name = point.name
                if name in thresholds and sure(logits_at(model, name, states)[-1], criterion, thresholds[name]):
                    chosen = name
                    break
        row = logits_at(model, chosen, states)[-1]
        at_end = chosen is None or model.configs[chosen].stop == 2 * model.num_layers
        if step > 0:
            waiting = 0 if at_end else waiting + 1
        tokens.append(int(row.argmax()) if forced is None else forced[step])
        exits.append(chosen)
        rows.append(row)
    return tokens[len(prompt) :], exits, rows


def speculate(
    model: TinyTransformer,
    prompt: Sequence[int],
    num_new_tokens: int,
    *,
    thresholds: Mapping[str, float],
    criterion: str = "max_probability",
    max_pending_tokens: int | None = None,
    stop: int | None = None,
) -> tuple[list[int], list[str | None], list[tuple[int, int]]]:
    """Greedy self-speculation of one sequence: drafts are collected, then each is held against the full model.

    Returns:
        New tokens, the exit that drafted each (None = the final exit's own), and (drafted, accepted) of every check.
    """

    def full(tokens):
        return int(logits_at(model, None, hidden_by_stop(model, tokens))[-1].argmax())

    def draft_of(tokens):
        states = hidden_by_stop(model, tokens)
        for point in model.exits:
            if point.name in thresholds and point.stop < 2 * model.num_layers:
                row = logits_at(model, point.name, states)[-1]
                if sure(row, criterion, thresholds[point.name]):
                    return int(row.argmax()), point.name
        return None

    tokens, exits, checks = [*prompt, full(prompt)], [None], []
    drafts: list[tuple[int, str]] = []
    while len(tokens) < len(prompt) + num_new_tokens and tokens[-1] != stop:
        ahead = [*tokens, *(token for token, _ in drafts)]
        at_stop = bool(drafts) and drafts[-1][0] == stop
        is_last = len(ahead) + 1 == len(prompt) + num_new_tokens
        at_cap = max_pending_tokens is not None and len(drafts) >= max_pending_tokens
        draft = None if at_stop or is_last or at_cap else draft_of(ahead)
        if draft is not None:
            drafts.append(draft)
            continue
        accepted = 0
        for token, name in drafts:
            tokens.append(full(tokens))
            exits.append(name if tokens[-1] == token else None)
            if tokens[-1] != token:
                break
            accepted += 1
        if accepted == len(drafts) and tokens[-1] != stop:
            tokens.append(full(tokens))
            exits.append(None)
        if drafts:
            checks.append((len(drafts), accepted))
        drafts = []
    return tokens[len(prompt) :], exits, checks
