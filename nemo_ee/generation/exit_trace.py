# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Confidence, agreement and log-probability of every exit along given text, and the simulation of any policy on them.

A token that leaves early keeps its hidden state, and pending tokens run through the deeper layers with the values of a
full-depth run. So at a position of given text an exit's distribution does not depend on where earlier tokens left, and
one full-depth pass that evaluates every exit at every position contains what any policy would see there. Only the cap
on pending tokens depends on earlier decisions; it is replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import torch
from torch import LongTensor, Tensor

from nemo_ee.exits.confidence import exit_confidence, leaves
from nemo_ee.generation.decoding_model import DecodingModel, ExitPoint
from nemo_ee.generation.policy import missing_probes
from nemo_ee.generation.sampling import GREEDY, SamplingParams, sample
from nemo_ee.generation.teacher_forcing import TeacherForcedPass

_TENSORS = ("valid", "confidences", "agrees", "own_tokens", "logprobs")


@dataclasses.dataclass(frozen=True, eq=False)
class ExitTrace:
    """n continuations of at most t tokens, e exits; everything on the CPU. Padding is where `valid` is False.

    Attributes:
        exits: the evaluated exits, in the model's order; index e in a choice means the final exit.
        num_layers: number of the model's layers.
        criterion: criterion of the confidences.
        valid: `[n, t]`, bool, whether the continuation has such a token.
        confidences: `[n, t, e]`, fp32.
        agrees: `[n, t, e]`, bool, whether the exit's own next token equals the continuation's.
        own_tokens: `[n, t, e + 1]`, int32, the next token that each exit would choose, the final exit last.
        logprobs: `[n, t, e + 1]`, fp32, ln p of the continuation's token at each exit, the final exit last.
    """

    exits: tuple[ExitPoint, ...]
    num_layers: int
    criterion: str
    valid: Tensor
    confidences: Tensor
    agrees: Tensor
    own_tokens: Tensor
    logprobs: Tensor

    @staticmethod
    def join(traces: Sequence[ExitTrace]) -> ExitTrace:
        """Join the continuations of several traces of the same exits."""
        first, longest = traces[0], max(trace.valid.shape[1] for trace in traces)
        assert all((own.exits, own.criterion) == (first.exits, first.criterion) for own in traces)
        joined = {name: torch.cat([_padded(getattr(own, name), longest) for own in traces]) for name in _TENSORS}
        return dataclasses.replace(first, **joined)

    def select(self, rows: Sequence[int]) -> ExitTrace:
        """These continuations alone."""
        return dataclasses.replace(self, **{name: getattr(self, name)[list(rows)] for name in _TENSORS})

    def choices(self, thresholds: Sequence[float], max_pending_tokens: int | None = None) -> LongTensor:
        """The exit at which each token would be read: `[n, t]`, its index, e = the final exit.

        Args:
            thresholds: one for each of `exits`.
            max_pending_tokens: as in `ExitPolicy`.
        """
        num_exits = len(self.exits)
        assert len(thresholds) == num_exits, "one threshold for each exit"
        passes = torch.ones(*self.valid.shape, num_exits + 1, dtype=torch.bool)
        for index, threshold in enumerate(thresholds):
            passes[..., index] = leaves(self.confidences[..., index], threshold, self.criterion)
        choice = passes.int().argmax(dim=2)  # the first exit that passes
        choice[:, :1] = num_exits  # the first new token comes from the final exit
        if max_pending_tokens is not None:
            self._cap(choice, max_pending_tokens)
        return choice

    def _cap(self, choice: LongTensor, max_pending_tokens: int) -> None:
        """Run tokens to full depth where so many are pending, in place."""
        final = len(self.exits)
        # A token that leaves at the end of the stack is not pending.
        at_end = torch.tensor([*(point.stop == 2 * self.num_layers for point in self.exits), True])
        pending = torch.zeros(len(choice), dtype=torch.long)
        for step in range(1, choice.shape[1]):
            choice[:, step].masked_fill_(pending >= max_pending_tokens, final)
            pending = torch.where(at_end[choice[:, step]], 0, pending + 1)

    def disagreement(self, choice: LongTensor) -> Tensor:
        """Share of each continuation's tokens that the exit they are read at would not choose. `[n]`, fp64.

        The final exit never disagrees, because the continuation is its own.
        """
        agrees = torch.cat([self.agrees, torch.ones_like(self.valid)[..., None]], dim=2)
        return self._mean(~_at(agrees, choice))

    def nll_excess(self, choice: LongTensor) -> Tensor:
        """Mean ln p of each continuation under the final exit minus that under the chosen exits. `[n]`, fp64, nats."""
        excess = self.logprobs[..., -1].double() - _at(self.logprobs, choice).double()
        return self._mean(excess)

    def depth(self, choice: LongTensor) -> Tensor:
        """Mean number of layers below the exits where each continuation is read. `[n]`, fp64."""
        layers = torch.tensor([*(point.layer for point in self.exits), self.num_layers])
        return self._mean(layers[choice])

    def _mean(self, values: Tensor) -> Tensor:
        values = values.double().masked_fill(~self.valid, 0.0)
        return values.sum(dim=1) / self.valid.sum(dim=1)


def _at(values: Tensor, choice: LongTensor) -> Tensor:
    """`values` `[n, t, e + 1]` at `choice` `[n, t]`."""
    return values.gather(2, choice[..., None])[..., 0]


def _padded(values: Tensor, length: int) -> Tensor:
    missing = values.new_zeros(values.shape[0], length - values.shape[1], *values.shape[2:])
    return torch.cat([values, missing], dim=1)


class TracePass:
    """The forward pass that makes a trace.

    Args:
        model: the model.
        exits: names of the exits to evaluate; None = all.
        criterion: criterion of the confidences.

    Raises:
        ValueError: a name the model does not have, or an exit without the probe that the criterion needs.
    """

    def __init__(self, model: DecodingModel, exits: Collection[str] | None, criterion: str) -> None:
        known = [point.name for point in model.exits]
        unknown = [name for name in exits or () if name not in known]
        if unknown:
            raise ValueError(f"exits {unknown} are not the model's; its exits are {', '.join(known) or 'none'}")
        self.model, self.criterion = model, criterion
        self.exits = tuple(point for point in model.exits if exits is None or point.name in exits)
        for problem in missing_probes(criterion, self.exits):
            raise ValueError(problem)

    @torch.inference_mode()
    def run(
        self,
        sequences: Sequence[Sequence[int]],
        num_context: Sequence[int],
        sampling: Sequence[SamplingParams] | None = None,
    ) -> ExitTrace:
        """Run a batch once at full depth and evaluate every exit at every continuation token.

        Args:
            sequences: token ids, prompt and continuation.
            num_context: length of each prompt, at least 1 and less than the whole.
            sampling: sampling parameters of each continuation, so that an exit's own token is the one it would choose
                with the same random numbers; None = greedy.
        """
        text = TeacherForcedPass(self.model, sequences, tuple(point.name for point in self.exits))
        lengths = [len(own) - context for own, context in zip(sequences, num_context, strict=True)]
        batch = _Batch(sequences, text.first_rows, num_context, sampling or [GREEDY] * len(sequences))
        shape = (len(sequences), max(lengths))
        trace = ExitTrace(
            exits=self.exits,
            num_layers=self.model.num_layers,
            criterion=self.criterion,
            valid=torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None],
            confidences=torch.zeros(*shape, len(self.exits)),
            agrees=torch.zeros(*shape, len(self.exits), dtype=torch.bool),
            own_tokens=torch.zeros(*shape, len(self.exits) + 1, dtype=torch.int32),
            logprobs=torch.zeros(*shape, len(self.exits) + 1),
        )
        for stop in text.run_to({*(point.stop for point in self.exits), 2 * self.model.num_layers}):
            for index, point in enumerate(self.exits):
                if point.stop == stop:
                    self._evaluate(point, index, text, batch, trace)
        self._evaluate(None, len(self.exits), text, batch, trace)
        return trace

    def _evaluate(
        self, point: ExitPoint | None, index: int, text: TeacherForcedPass, batch: _Batch, trace: ExitTrace
    ) -> None:
        """Fill the column of one exit; None: the final exit.

        The first new token is the final exit's under every policy. Its row, the last of the prompt, is evaluated all
        the same, because an exit that attends needs its keys and values before the next row.
        """
        name = None if point is None else point.name
        for rows, logits, tokens, logprobs in text.evaluate(name, list(batch.cells)):
            cells = [batch.cells[row] for row in rows]
            where = tuple(torch.tensor(cells).T)
            trace.logprobs[(*where, index)] = logprobs.float().cpu()
            own_tokens = batch.own_tokens(logits, cells)
            trace.own_tokens[(*where, index)] = own_tokens.int()
            if point is not None:
                value = exit_confidence(self.criterion, logits, text.hidden[list(rows)], point.probe)
                trace.confidences[(*where, index)] = value.cpu()
                trace.agrees[(*where, index)] = own_tokens == tokens.cpu()


class _Batch:
    """The row of a pass that predicts each token of each continuation."""

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        first_rows: Sequence[int],
        num_context: Sequence[int],
        sampling: Sequence[SamplingParams],
    ) -> None:
        self.sequences, self.num_context, self.sampling = sequences, num_context, sampling
        # Row, ascending -> (continuation, token).
        self.cells = {
            first_row + context - 1 + offset: (index, offset)
            for index, (first_row, own, context) in enumerate(zip(first_rows, sequences, num_context, strict=True))
            for offset in range(len(own) - context)
        }

    def own_tokens(self, logits: Tensor, cells: Sequence[tuple[int, int]]) -> Tensor:
        """The tokens that these logits `[m, v]` choose at these cells. `[m]`, int64, on the CPU."""
        if all(own.takes_the_most_likely for own in self.sampling):
            return logits.argmax(dim=1).cpu()
        positions = [self.num_context[sequence] + offset for sequence, offset in cells]
        previous = [self.sequences[cell[0]][:position] for cell, position in zip(cells, positions, strict=True)]
        return torch.tensor(sample(logits, [self.sampling[own] for own, _ in cells], positions, previous))
