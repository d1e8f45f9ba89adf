# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What every exit says along known continuations, from one pass; and every exit policy simulated on it.

A token that leaves early keeps its hidden state, and what waits runs through the deeper layers with the values of a
full-depth run. So at a position of a known text an exit's distribution does not depend on where earlier tokens left,
and one full-depth pass that asks every exit at every position holds all that any policy would see there. Only the cap
on waiting tokens looks back; it is replayed.

May import: torch, `nemo_ee.exits` and `nemo_ee.generation.{descent,items,sampling,scoring}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import torch
from torch import LongTensor, Tensor

from nemo_ee.exits.confidence import confidence, leaves
from nemo_ee.generation.descent import pick_rows
from nemo_ee.generation.items import DecodingModel, ExitPoint, Items
from nemo_ee.generation.sampling import GREEDY, SamplingParams, sample
from nemo_ee.generation.scoring import LOGITS_PER_QUESTION


@dataclasses.dataclass(frozen=True, eq=False)
class ExitTable:
    """n continuations of at most t tokens, e exits; everything on the CPU. Padding is where `valid` is False.

    Attributes:
        exits: the exits asked, in the model's order; index e in a choice means the final exit.
        num_layers: of the model.
        criterion: of the confidences.
        valid: `[n, t]`, bool, whether the continuation has such a token.
        confidences: `[n, t, e]`, fp32.
        agrees: `[n, t, e]`, bool, whether the exit's own next token is the continuation's.
        logprobs: `[n, t, e + 1]`, fp32, ln of the continuation's token at each exit, the final one last.
    """

    exits: tuple[ExitPoint, ...]
    num_layers: int
    criterion: str
    valid: Tensor
    confidences: Tensor
    agrees: Tensor
    logprobs: Tensor

    @staticmethod
    def join(tables: Sequence[ExitTable]) -> ExitTable:
        """The continuations of several tables of the same exits in one."""
        first, longest = tables[0], max(table.valid.shape[1] for table in tables)
        assert all((own.exits, own.criterion) == (first.exits, first.criterion) for own in tables)
        names = ("valid", "confidences", "agrees", "logprobs")
        joined = {name: torch.cat([_padded(getattr(own, name), longest) for own in tables]) for name in names}
        return dataclasses.replace(first, **joined)

    def select(self, rows: Sequence[int]) -> ExitTable:
        """These continuations alone."""
        names = ("valid", "confidences", "agrees", "logprobs")
        return dataclasses.replace(self, **{name: getattr(self, name)[list(rows)] for name in names})

    def choices(self, thresholds: Sequence[float], max_waiting: int | None = None) -> LongTensor:
        """Where each token would be read: `[n, t]`, index of the exit, e = the final exit.

        Args:
            thresholds: one for each of `exits`.
            max_waiting: as in `ExitPolicy`.
        """
        num_exits = len(self.exits)
        assert len(thresholds) == num_exits, "one threshold for each exit"
        sure = torch.ones(*self.valid.shape, num_exits + 1, dtype=torch.bool)
        for index, threshold in enumerate(thresholds):
            sure[..., index] = leaves(self.confidences[..., index], threshold, self.criterion)
        choice = sure.int().argmax(dim=2)  # the first that is sure
        choice[:, :1] = num_exits  # the first new token comes from the final exit
        if max_waiting is not None:
            self._cap(choice, max_waiting)
        return choice

    def _cap(self, choice: LongTensor, max_waiting: int) -> None:
        """Send tokens to full depth where so many wait already, in place."""
        final = len(self.exits)
        # At an exit that taps the end of the stack nothing is left to wait for.
        at_end = torch.tensor([*(point.stop == 2 * self.num_layers for point in self.exits), True])
        waiting = torch.zeros(len(choice), dtype=torch.long)
        for step in range(1, choice.shape[1]):
            choice[:, step].masked_fill_(waiting >= max_waiting, final)
            waiting = torch.where(at_end[choice[:, step]], 0, waiting + 1)

    def disagreement(self, choice: LongTensor) -> Tensor:
        """Share of each continuation's tokens that the exit they are read at would have chosen otherwise. `[n]`, fp64.

        The final exit never disagrees: the continuation is its own.
        """
        agrees = torch.cat([self.agrees, torch.ones_like(self.valid)[..., None]], dim=2)
        return self._mean(~_at(agrees, choice))

    def nll_excess(self, choice: LongTensor) -> Tensor:
        """Mean nats by which each continuation is less likely than under the final exit alone. `[n]`, fp64."""
        excess = self.logprobs[..., -1].double() - _at(self.logprobs, choice).double()
        return self._mean(excess)

    def depth(self, choice: LongTensor) -> Tensor:
        """Mean number of layers below the exits each continuation is read at. `[n]`, fp64."""
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


class TablePass:
    """The pass that fills a table.

    Args:
        model: what to run.
        exits: names of the exits to ask; None = all.
        criterion: of the confidence.

    Raises:
        ValueError: a name the model does not have.
    """

    def __init__(self, model: DecodingModel, exits: Collection[str] | None, criterion: str) -> None:
        known = [point.name for point in model.exits]
        unknown = [name for name in exits or () if name not in known]
        if unknown:
            raise ValueError(f"exits {unknown} are not the model's; its exits are {', '.join(known) or 'none'}")
        self.model, self.criterion = model, criterion
        self.exits = tuple(point for point in model.exits if exits is None or point.name in exits)
        self.device = getattr(model, "device", torch.device("cpu"))

    @torch.inference_mode()
    def run(
        self,
        sequences: Sequence[Sequence[int]],
        num_context: Sequence[int],
        sampling: Sequence[SamplingParams] | None = None,
    ) -> ExitTable:
        """Run a batch once at full depth and ask everybody about every continuation token.

        Args:
            sequences: token ids, prompt and continuation.
            num_context: length of each prompt, at least 1 and less than the whole.
            sampling: how each continuation was chosen, so that an exit's own token is the one it would give under the
                same random numbers; None = greedily.
        """
        fed = [list(own[:-1]) for own in sequences]  # the last token predicts nothing that is compared
        items = Items.of({index: range(len(own)) for index, own in enumerate(fed)}, self.device)
        cache = self.model.new_cache(len(fed), max(map(len, fed)), tuple(point.name for point in self.exits))
        lengths = [len(own) - context for own, context in zip(sequences, num_context, strict=True)]
        batch = _Batch(sequences, items, num_context, sampling or [GREEDY] * len(fed))
        shape = (len(fed), max(lengths))
        table = ExitTable(
            exits=self.exits,
            num_layers=self.model.num_layers,
            criterion=self.criterion,
            valid=torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None],
            confidences=torch.zeros(*shape, len(self.exits)),
            agrees=torch.zeros(*shape, len(self.exits), dtype=torch.bool),
            logprobs=torch.zeros(*shape, len(self.exits) + 1),
        )
        flat = torch.tensor([token for own in fed for token in own], dtype=torch.long, device=self.device)
        hidden, depth = self.model.embed(flat, items), 0
        for stop in sorted({*(point.stop for point in self.exits), 2 * self.model.num_layers}):
            hidden, depth = self.model.run(hidden, items, depth, stop, cache), stop
            for index, point in enumerate(self.exits):
                if point.stop == stop:
                    self._ask(point.name, index, hidden, batch, cache, table)
        self._ask(None, len(self.exits), hidden, batch, cache, table)
        return table

    def _ask(
        self, name: str | None, index: int, hidden: Tensor, batch: _Batch, cache: object, table: ExitTable
    ) -> None:
        """Fill one exit's column; a `layer` exit hears of the prompts first, because its questions attend to them."""
        if name is not None:
            others = sorted(set(range(len(batch.items))) - set(batch.rows))
            if others:
                self.model.observe_exit(name, *pick_rows(hidden, batch.items, others), cache)
        at_once = max(1, LOGITS_PER_QUESTION // self.model.vocab_size)
        # The first new token is the final exit's whatever the policy, but its row is asked about like any other: it is
        # the last of the prompt, and an exit that attends must have heard of it before the next.
        for begin in range(0, len(batch.rows), at_once):
            rows, cells = batch.rows[begin : begin + at_once], batch.cells[begin : begin + at_once]
            logits = self.model.exit_logits(name, *pick_rows(hidden, batch.items, rows), cache)
            where = tuple(torch.tensor(cells).T)
            tokens = torch.tensor([batch.token(cell) for cell in cells], device=logits.device)
            chosen = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1)
            table.logprobs[(*where, index)] = chosen.float().cpu()
            if name is not None:
                table.confidences[(*where, index)] = confidence(logits, self.criterion).cpu()
                table.agrees[(*where, index)] = batch.own_tokens(logits, cells) == tokens.cpu()


class _Batch:
    """Which row of a pass is about which token of which continuation."""

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        items: Items,
        num_context: Sequence[int],
        sampling: Sequence[SamplingParams],
    ) -> None:
        self.sequences, self.items, self.num_context, self.sampling = sequences, items, num_context, sampling
        self.rows: list[int] = []  # ascending
        self.cells: list[tuple[int, int]] = []  # of the table
        for group, own, context in zip(items.groups, sequences, num_context, strict=True):
            for offset in range(len(own) - context):
                self.rows.append(group.first_row + context - 1 + offset)
                self.cells.append((group.sequence, offset))

    def token(self, cell: tuple[int, int]) -> int:
        """The continuation's token."""
        sequence, offset = cell
        return self.sequences[sequence][self.num_context[sequence] + offset]

    def own_tokens(self, logits: Tensor, cells: Sequence[tuple[int, int]]) -> Tensor:
        """What these logits `[m, v]` would choose at these cells. `[m]`, int64, on the CPU."""
        if all(own.takes_the_most_likely for own in self.sampling):
            return logits.argmax(dim=1).cpu()
        positions = [self.num_context[sequence] + offset for sequence, offset in cells]
        previous = [self.sequences[cell[0]][:position] for cell, position in zip(cells, positions, strict=True)]
        return torch.tensor(sample(logits, [self.sampling[own] for own, _ in cells], positions, previous))
