# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding over pipeline stages: the engine runs on the first stage, the other stages execute its commands.

    engine -> PipelinedDecodingModel (first stage)          DecodingStage (every later stage)
      embed, run its own half layers
      run(start, stop] past them     -- RUN, hidden -->     run its half layers, keep the result [n, h] here,
                                                            or pass it on to the next stage
      logits of an exit              -- EXIT_LOGITS -->     evaluate the head
                                     <-- [n, v] --
      write_exit_kv, truncate, new_cache  -- ... -->

For the engine this is one `DecodingModel`: policy, sampling, pending tokens and stops are the same as on one stage, so
tokens, exits and confidences are too. Hidden states past the first stage stay where they were computed, indexed by
(sequence, position); the engine holds tensors `[n, 0]` in their place. This is sufficient because the engine never
returns to a state after it has run on from it.

Only EXIT_LOGITS waits for an answer. A token that leaves on the first stage is followed by the next token at once. Its
deeper layers run later, after a few such tokens (`run_pending_after`), by a RUN that the first stage does not wait
for, so later stages work meanwhile. A token that leaves on a later stage costs the answer's way back; its deeper
layers also run beside the next token.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import torch
from torch import LongTensor, Tensor

from nemo_ee.exits.placement import StagePlacement
from nemo_ee.exits.probe import ExitProbe
from nemo_ee.generation.decoding_model import DecodingModel, ExitPoint, TokenPositions
from nemo_ee.generation.kv_cache import KVCache
from nemo_ee.megatron.decoding.decoding_adapter import MegatronDecodingModel
from nemo_ee.megatron.decoding.stage_lines import (
    FINAL_EXIT,
    Command,
    Op,
    StageLines,
    decode_positions,
    encode_positions,
)
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel

# Number of pending tokens of a sequence at which they run. More of them in one batch cost later stages (and the rest
# of the first stage) less; fewer leave less to do when a token goes deep.
RUN_PENDING_AFTER = 8


def open_decoding_model(
    model: EarlyExitGPTModel,
    placements: Sequence[StagePlacement],
    *,
    timeout_minutes: float = 30.0,
    probes: Mapping[str, ExitProbe] = MappingProxyType({}),
) -> MegatronDecodingModel | PipelinedDecodingModel | DecodingStage:
    """Make a model ready to decode. Every rank must call it.

    Args:
        model: this rank's stage, at full depth, its weights loaded and in the dtype to decode in.
        placements: placements of all stages.
        timeout_minutes: longest time to wait for a stage; then the run ends with an error.
        probes: the exits' probes by name, for a single stage; several stages use none.

    Returns:
        On a single stage, and on the first of several, a model for `EarlyExitEngine`; on the others a `DecodingStage`,
        whose `serve` must be called.

    Raises:
        ValueError: a model that cannot decode, with every reason.
    """
    if len(placements) == 1:
        return MegatronDecodingModel(model, probes=probes)
    own = MegatronDecodingModel(model, one_of_many=True)
    lines = StageLines(timedelta(minutes=timeout_minutes))
    kind = DecodingStage if lines.stage else PipelinedDecodingModel
    return kind(own, placements, lines)


class _Pipeline:
    """Facts about the whole pipeline that every stage has.

    Attributes:
        exits: the exits of all stages, as in `DecodingModel`.
        ends: last stop of each stage.
    """

    def __init__(self, own: MegatronDecodingModel, placements: Sequence[StagePlacement], lines: StageLines) -> None:
        self.own, self.lines = own, lines
        points = [ExitPoint(exit.name, exit.layer, exit.stop) for stage in placements for exit in stage.exits]
        self.exits = tuple(sorted(points, key=lambda point: point.stop))
        self.ends = tuple(2 * stage.last_layer for stage in placements)
        assert self.ends[-1] == 2 * own.num_layers, "a full-depth model"
        self.device = own.device

    def holder(self, stop: int) -> int:
        """The stage that computes the states at a stop."""
        return next(stage for stage, end in enumerate(self.ends) if stop <= end)


class PipelineCache:
    """The first stage's cache, and the number under which later stages keep theirs."""

    def __init__(self, number: int, own: KVCache, lines: StageLines) -> None:
        self.number, self.own, self._lines = number, own, lines

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` positions of one sequence, on every stage."""
        self.own.truncate(sequence, length)
        for stage in range(1, self._lines.num_stages):
            self._lines.command(stage, Command(Op.TRUNCATE, self.number, sequence, length))


class PipelinedDecodingModel(_Pipeline, DecodingModel):
    """A `DecodingModel` on the first stage of several. Made by `open_decoding_model`.

    Use it as a context manager, or call `close`, which ends `serve` on the other stages.

    Attributes:
        num_layers, vocab_size, max_positions, exits, device, run_pending_after: see `DecodingModel`.
    """

    run_pending_after = RUN_PENDING_AFTER

    def __init__(self, own: MegatronDecodingModel, placements: Sequence[StagePlacement], lines: StageLines) -> None:
        super().__init__(own, placements, lines)
        self.num_layers, self.vocab_size, self.max_positions = own.num_layers, own.vocab_size, own.max_positions
        self._number_of: dict[str | None, int] = {point.name: index for index, point in enumerate(self.exits)}
        self._number_of[None] = FINAL_EXIT
        self._holder_of: dict[str | None, int] = {point.name: self.holder(point.stop) for point in self.exits}
        self._holder_of[None] = lines.num_stages - 1
        self._num_caches = 0
        self._dropped: list[int] = []  # caches that are no longer in use
        self._is_open = True

    def __enter__(self) -> PipelinedDecodingModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End `serve` on the other stages. Does nothing if they have ended, or if a transfer has failed."""
        if self._is_open and not self.lines.is_broken:
            self._send_to_all(Command(Op.CLOSE))
            self.lines.drain()
        self._is_open = False

    def new_cache(self, num_sequences: int, max_length: int, active_exits: tuple[str, ...]) -> PipelineCache:
        """A cache on every stage."""
        while self._dropped:
            self._send_to_all(Command(Op.DROP_CACHE, self._dropped.pop()))
        own = self.own.new_cache(num_sequences, max_length, active_exits)
        cache = PipelineCache(self._num_caches, own, self.lines)
        self._num_caches += 1
        weakref.finalize(cache, self._dropped.append, cache.number)
        active = [self._number_of[name] for name in active_exits]
        self._send_to_all(Command(Op.NEW_CACHE, cache.number, num_sequences, max_length, active))
        return cache

    def embed(self, tokens: LongTensor, positions: TokenPositions) -> Tensor:
        """See `MegatronDecodingModel`. Returns `[n, h]`."""
        return self.own.embed(tokens, positions)

    @torch.inference_mode()
    def run(self, hidden: Tensor, positions: TokenPositions, start: int, stop: int, cache: PipelineCache) -> Tensor:
        """Run the half layers (start, stop], without waiting for those of other stages.

        Args:
            hidden: `[n, h]` at a stop of this stage, `[n, 0]` past it.

        Returns:
            The hidden states at `stop`: `[n, h]` on this stage, `[n, 0]` past it.
        """
        if start == stop:
            return hidden
        end = self.ends[0]
        if stop > end:
            self._send_to(start, stop, Command(Op.RUN, cache.number, start, stop, encode_positions(positions)))
        if start < end:
            hidden = self.own.run(hidden, positions, start, min(stop, end), cache.own)
        if stop <= end:
            return hidden
        if start <= end:
            self.lines.send(1, hidden)
        return hidden.new_empty(len(positions), 0)

    def write_exit_kv(self, name: str, hidden: Tensor, positions: TokenPositions, cache: PipelineCache) -> None:
        """See `MegatronDecodingModel`; `hidden` as in `run`."""
        stage = self._holder_of[name]
        if stage == 0:
            self.own.write_exit_kv(name, hidden, positions, cache.own)
        else:
            number = self._number_of[name]
            self.lines.command(
                stage, Command(Op.WRITE_EXIT_KV, cache.number, number, numbers=encode_positions(positions))
            )

    @torch.inference_mode()
    def exit_logits(self, name: str | None, hidden: Tensor, positions: TokenPositions, cache: PipelineCache) -> Tensor:
        """See `MegatronDecodingModel`; `hidden` as in `run`. Waits for the stage that has the exit."""
        stage = self._holder_of[name]
        if stage == 0:
            return self.own.exit_logits(name, hidden, positions, cache.own)
        self.lines.command(
            stage, Command(Op.EXIT_LOGITS, cache.number, self._number_of[name], numbers=encode_positions(positions))
        )
        shape = (len(positions), self.vocab_size)
        return self.lines.receive(stage, shape, self.own.dtype, self.device).float()

    def _send_to(self, start: int, stop: int, command: Command) -> None:
        """Send a command to the later stages that have rows at `start`, or half layers in (start, stop]."""
        for stage in range(1, self.lines.num_stages):
            if self.ends[stage] >= start and self.ends[stage - 1] < stop:
                self.lines.command(stage, command)

    def _send_to_all(self, command: Command) -> None:
        for stage in range(1, self.lines.num_stages):
            self.lines.command(stage, command)


class StageCache:
    """The cache of a later stage, and the newest hidden state of each (sequence, position) that is on this stage.

    `states`: `[num_sequences, max_length, h]`; a state is in use as long as the first stage refers to it.
    """

    def __init__(self, own: KVCache, states: Tensor) -> None:
        self.own, self.states = own, states


class DecodingStage(_Pipeline):
    """A later stage. Made by `open_decoding_model`.

    Attributes:
        caches: number of a cache -> cache.
    """

    def __init__(self, own: MegatronDecodingModel, placements: Sequence[StagePlacement], lines: StageLines) -> None:
        super().__init__(own, placements, lines)
        self.caches: dict[int, StageCache] = {}
        self._begin = self.ends[lines.stage - 1]
        self._end = self.ends[lines.stage]

    @torch.inference_mode()
    def serve(self) -> None:
        """Execute the first stage's commands until it closes.

        Raises:
            RuntimeError: another stage has ended or does not answer.
        """
        carry_out: dict[Op, Any] = {
            Op.NEW_CACHE: self._new_cache,
            Op.DROP_CACHE: lambda command: self.caches.pop(command.cache),
            Op.TRUNCATE: lambda command: self.caches[command.cache].own.truncate(command.first, command.second),
            Op.RUN: self._run,
            Op.WRITE_EXIT_KV: self._write_exit_kv,
            Op.EXIT_LOGITS: self._exit_logits,
        }
        while (command := self.lines.next_command()).op is not Op.CLOSE:
            carry_out[command.op](command)
        self.lines.drain()

    def _new_cache(self, command: Command) -> None:
        active = tuple(self.exits[number].name for number in command.numbers)
        own = self.own.new_cache(command.first, command.second, active)
        shape = (command.first, command.second, self.own.model.config.hidden_size)
        self.caches[command.cache] = StageCache(own, torch.empty(shape, dtype=self.own.dtype, device=self.device))

    def _run(self, command: Command) -> None:
        cache, positions = self.caches[command.cache], decode_positions(command.numbers, self.device)
        start, stop = command.first, command.second
        if start <= self._begin:
            shape = (len(positions), cache.states.shape[-1])
            hidden = self.lines.receive(self.lines.stage - 1, shape, self.own.dtype, self.device)
            start = self._begin
        else:
            hidden = self._states(cache, positions)
        if start < self._end:
            hidden = self.own.run(hidden, positions, start, min(stop, self._end), cache.own)
        if stop > self._end:
            self.lines.send(self.lines.stage + 1, hidden)
        else:
            cache.states[positions.sequence, positions.position] = hidden

    def _states(self, cache: StageCache, positions: TokenPositions) -> Tensor:
        """[n, h]"""
        return cache.states[positions.sequence, positions.position]

    def _write_exit_kv(self, command: Command) -> None:
        cache, positions = self.caches[command.cache], decode_positions(command.numbers, self.device)
        self.own.write_exit_kv(self.exits[command.first].name, self._states(cache, positions), positions, cache.own)

    def _exit_logits(self, command: Command) -> None:
        cache, positions = self.caches[command.cache], decode_positions(command.numbers, self.device)
        name = None if command.first == FINAL_EXIT else self.exits[command.first].name
        logits = self.own.exit_logits(name, self._states(cache, positions), positions, cache.own)
        # They were computed in the model's dtype, so nothing is lost.
        self.lines.send(0, logits.to(self.own.dtype))
