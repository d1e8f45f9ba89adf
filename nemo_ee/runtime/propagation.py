# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`kv: propagate`: a token that leaves writes its hidden state through the keys and values of the layers it skips.

    K_l(t) = W_k norm_l(h_exit(t)),  V_l(t) = W_v norm_l(h_exit(t))   for every skipped layer l

(the state propagation of CALM, arXiv 2207.07061, section 3.3). No token is pending and nothing is computed later, so
the result is an approximation, also for tokens that run to full depth. It suits an engine that keeps one cache length
for all layers, and is the reference for exports to such engines. `generation.engine` is exact.

Such an engine runs a step to one depth for all of its tokens. Two rules:

    together    the step ends at the first exit where the confidence of every token passes; all are read there
                (TensorRT-LLM)
    row by row  each token is read from the first exit that its confidence passes; the step ends with the last one. A
                step with a token that no exit may read runs to full depth, and all of its tokens are read there (vLLM)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ee.exits.confidence import exit_confidence, leaves
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
        exits: exits to evaluate for each sequence, in the model's order.
        criterion: criterion of the confidence.
        max_length: size of the cache, in tokens of a sequence.
        row_by_row: the rule row by row; else the rule together.
    """

    def __init__(
        self, model: RuntimeModel, exits: Sequence[Sequence[EvaluatedExit]], criterion: str, max_length: int,
        *, row_by_row: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.criterion, self.row_by_row = model, criterion, row_by_row
        self.thresholds = [{exit.point: exit.threshold for exit in own} for own in exits]
        evaluated = {point for own in self.thresholds for point in own}
        self.points = [point for point in model.exits if point in evaluated]
        self.cache = model.new_cache(len(exits), max_length, ())

    def run(
        self, tokens: Mapping[int, tuple[int, Sequence[int]]], *, evaluating: bool
    ) -> tuple[tuple[str | None, ...], Tensor]:
        """Run tokens of some sequences, each from a first position on, and read the last token of each sequence.

        Args:
            tokens: sequence -> (first position, tokens), sequences ascending.
            evaluating: evaluate the exits, in a step of one token for each sequence; False runs to full depth, as for
                prompts.

        Returns:
            For each sequence the name of the exit of its logits (None = the final exit), and logits `[sequences, v]`,
            fp32.
        """
        spans = {sequence: range(first, first + len(own)) for sequence, (first, own) in tokens.items()}
        positions = TokenPositions.of(spans, self.model.device)
        flat = torch.tensor([token for _, own in tokens.values() for token in own], device=self.model.device)
        hidden, depth = self.model.embed(flat, positions), 0
        thresholds = [self.thresholds[sequence] for sequence in tokens]
        remaining, read_from = list(range(len(tokens))), [None] * len(tokens)
        logits = hidden.new_empty(len(tokens), self.model.vocab_size, dtype=torch.float32)
        for point in self.points if evaluating and all(thresholds) else ():
            hidden = self.model.run(hidden, positions, depth, point.stop, self.cache)
            depth = point.stop
            rows = torch.tensor(remaining)
            at_tap = hidden[rows.to(hidden.device)]
            at_exit = self.model.exit_logits(point.name, at_tap, positions.select(rows), self.cache)
            confidences = exit_confidence(self.criterion, at_exit, at_tap, point.probe)
            passes = [
                point in thresholds[row] and bool(leaves(own, thresholds[row][point], self.criterion))
                for row, own in zip(remaining, confidences, strict=True)
            ]
            if not self.row_by_row and not all(passes):
                continue
            for row, own, leaving in zip(remaining, at_exit, passes, strict=True):
                if leaving:
                    logits[row], read_from[row] = own, point.name
            remaining = [row for row, leaving in zip(remaining, passes, strict=True) if not leaving]
            if not remaining:
                self.model.propagate(hidden, positions, depth, self.cache)
                return tuple(read_from), logits
        hidden = self.model.run(hidden, positions, depth, 2 * self.model.num_layers, self.cache)
        last = torch.tensor([positions.groups[row].last_row for row in remaining])
        logits[remaining] = self.model.exit_logits(
            None, hidden[last.to(hidden.device)], positions.select(last), self.cache
        )
        return tuple(read_from), logits


def generate_propagating(
    model: RuntimeModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: Sequence[int],
    policy: ExitPolicy | Sequence[ExitPolicy],
    stop_tokens: Collection[int] = (),
    row_by_row: bool = False,
) -> PropagationResult:
    """Greedy decoding of a batch; prompts and first tokens at full depth. A sequence that has ended leaves the batch.

    Args:
        prompts: token ids of each sequence, ragged.
        max_new_tokens: one per prompt, from 1.
        policy: thresholds, for all sequences or one per prompt, with one criterion; without a cap on pending tokens,
            because none are pending.
        stop_tokens: ids that end a sequence.
        row_by_row: the rule row by row; else the rule together.

    Raises:
        ValueError: an exit that attends, a cap, or sequences that do not fit the model.
    """
    policies = [policy] * len(prompts) if isinstance(policy, ExitPolicy) else list(policy)
    exits = _checked(model, prompts, max_new_tokens, policies)
    lengths = [len(prompt) + new for prompt, new in zip(prompts, max_new_tokens, strict=True)]
    batch = PropagatingBatch(model, exits, policies[0].criterion, max(lengths), row_by_row=row_by_row)
    tokens: list[list[int]] = [[] for _ in prompts]
    read_from: list[list[str | None]] = [[] for _ in prompts]
    inputs = {sequence: (0, list(prompt)) for sequence, prompt in enumerate(prompts)}
    evaluating = False
    while inputs:
        exits, logits = batch.run(inputs, evaluating=evaluating)
        for sequence, exit, token in zip(inputs, exits, logits.argmax(dim=-1).tolist(), strict=True):
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
    model: RuntimeModel, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], policies: list[ExitPolicy]
) -> list[tuple[EvaluatedExit, ...]]:
    exits, problems = [policy.evaluated_exits(model.exits) for policy in policies], []
    names = {exit.point.name: None for own in exits for exit in own}
    attending = [name for name in names if model.weights.heads[name].layer is not None]
    if attending:
        problems.append(
            f"exits {', '.join(attending)} have a transformer layer of their own, whose keys and values kv: propagate "
            "does not keep; leave them out (ExitPolicy(active=...))"
        )
    for cap in {policy.max_pending_tokens for policy in policies} - {None}:
        problems.append(f"max_pending_tokens={cap}: with kv: propagate no token is pending; use None")
    if len({policy.criterion for policy in policies}) > 1 or len(policies) != len(prompts):
        problems.append(f"{len(policies)} policies: give one, or one per prompt with the same criterion")
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
