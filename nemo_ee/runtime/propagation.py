# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`kv: propagate`: a token that leaves writes its hidden state through the keys and values of the layers it skips.

    K_l(t) = W_k norm_l(h_exit(t)),  V_l(t) = W_v norm_l(h_exit(t))   for every skipped layer l

(the state propagation of CALM, arXiv 2207.07061, section 3.3). No token is pending and nothing is computed later, so
the result is an approximation, also for tokens that run to full depth. It suits an engine that keeps one cache length
for all layers and decides once for the whole batch, and is the reference for exports to such engines: the tokens of a
step leave at an exit iff the confidence of every one of them passes. `generation.engine` is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ee.exits.confidence import confidence, leaves
from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.generation.policy import EvaluatedExit, ExitPolicy
from nemo_ee.runtime.model import RuntimeModel


@dataclass(frozen=True)
class PropagationResult:
    """New tokens of each sequence, and the exit each was read from (None = the final exit)."""

    tokens: tuple[tuple[int, ...], ...]
    exits: tuple[tuple[str | None, ...], ...]


class PropagatingBatch:
    """A batch of sequences with its cache; each `run` is one forward pass.

    Args:
        model: the model.
        exits: exits to evaluate, in the model's order.
        criterion: criterion of the confidence.
        num_sequences, max_length: size of the cache.
    """

    def __init__(
        self, model: RuntimeModel, exits: Sequence[EvaluatedExit], criterion: str, num_sequences: int, max_length: int
    ) -> None:
        self.model, self.criterion = model, criterion
        self.exits = tuple(exits)
        self.cache = model.new_cache(num_sequences, max_length, ())

    def run(self, tokens: Mapping[int, tuple[int, Sequence[int]]], *, evaluating: bool) -> tuple[str | None, Tensor]:
        """Run tokens of some sequences, each from a first position on, and read the last token of each sequence.

        Args:
            tokens: sequence -> (first position, tokens), sequences ascending.
            evaluating: evaluate the exits, in a step of one token for each sequence; False runs to full depth, as for
                prompts.

        Returns:
            Name of the exit of the logits (None = the final exit), and logits `[sequences, v]`, fp32.
        """
        spans = {sequence: range(first, first + len(own)) for sequence, (first, own) in tokens.items()}
        positions = TokenPositions.of(spans, self.model.device)
        flat = torch.tensor([token for _, own in tokens.values() for token in own], device=self.model.device)
        hidden, depth = self.model.embed(flat, positions), 0
        for exit in self.exits if evaluating else ():
            hidden = self.model.run(hidden, positions, depth, exit.point.stop, self.cache)
            depth = exit.point.stop
            logits = self.model.exit_logits(exit.point.name, hidden, positions, self.cache)
            if bool(leaves(confidence(logits, self.criterion), exit.threshold, self.criterion).all()):
                self.model.propagate(hidden, positions, depth, self.cache)
                return exit.point.name, logits
        hidden = self.model.run(hidden, positions, depth, 2 * self.model.num_layers, self.cache)
        last = positions.select(torch.tensor([group.last_row for group in positions.groups]))
        rows = torch.tensor([group.last_row for group in positions.groups], device=self.model.device)
        return None, self.model.exit_logits(None, hidden[rows], last, self.cache)


def generate_propagating(
    model: RuntimeModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: Sequence[int],
    policy: ExitPolicy,
    stop_tokens: Collection[int] = (),
) -> PropagationResult:
    """Greedy decoding of a batch; prompts and first tokens at full depth. A sequence that has ended leaves the batch.

    Args:
        prompts: token ids of each sequence, ragged.
        max_new_tokens: one per prompt, from 1.
        policy: thresholds; without a cap on pending tokens, because none are pending.
        stop_tokens: ids that end a sequence.

    Raises:
        ValueError: an exit that attends, a cap, or sequences that do not fit the model.
    """
    exits = _checked(model, prompts, max_new_tokens, policy)
    lengths = [len(prompt) + new for prompt, new in zip(prompts, max_new_tokens, strict=True)]
    batch = PropagatingBatch(model, exits, policy.criterion, len(prompts), max(lengths))
    tokens: list[list[int]] = [[] for _ in prompts]
    read_from: list[list[str | None]] = [[] for _ in prompts]
    inputs = {sequence: (0, list(prompt)) for sequence, prompt in enumerate(prompts)}
    evaluating = False
    while inputs:
        exit, logits = batch.run(inputs, evaluating=evaluating)
        for sequence, token in zip(inputs, logits.argmax(dim=-1).tolist(), strict=True):
            tokens[sequence].append(token)
            read_from[sequence].append(exit)
        inputs = {
            sequence: (first + len(own), tokens[sequence][-1:])
            for sequence, (first, own) in inputs.items()
            if len(tokens[sequence]) < max_new_tokens[sequence] and tokens[sequence][-1] not in stop_tokens
        }
        evaluating = True
    return PropagationResult(tuple(map(tuple, tokens)), tuple(map(tuple, read_from)))


def _checked(
    model: RuntimeModel, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], policy: ExitPolicy
) -> tuple[EvaluatedExit, ...]:
    exits, problems = policy.evaluated_exits(model.exits), []
    attending = [exit.point.name for exit in exits if model.weights.heads[exit.point.name].layer is not None]
    if attending:
        problems.append(
            f"exits {', '.join(attending)} have a transformer layer of their own, whose keys and values kv: propagate "
            "does not keep; leave them out (ExitPolicy(active=...))"
        )
    if policy.max_pending_tokens is not None:
        problems.append(
            f"max_pending_tokens={policy.max_pending_tokens}: with kv: propagate no token is pending; use None"
        )
    if len(prompts) != len(max_new_tokens) or not prompts:
        problems.append(f"{len(prompts)} prompts and {len(max_new_tokens)} max_new_tokens: give one number per prompt")
    for index, (prompt, new) in enumerate(zip(prompts, max_new_tokens, strict=False)):
        if not prompt or new < 1 or len(prompt) + new > model.max_positions:
            problems.append(
                f"prompt {index} has {len(prompt)} tokens and requests {new}; both must be at least 1 and their "
                f"sum at most {model.max_positions}"
            )
    if problems:
        raise ValueError("; ".join(problems))
    return exits
