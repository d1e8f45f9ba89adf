# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One batch being decoded: runs the prompts, feeds tokens, samples, stops each sequence on its own.

May import: torch and `nemo_ee.generation.{descent,items,policy,sampling,stats}`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_ee.generation.descent import Descent, Reading
from nemo_ee.generation.items import DecodingModel
from nemo_ee.generation.policy import AskedExit
from nemo_ee.generation.sampling import GREEDY, SamplingParams, sample
from nemo_ee.generation.stats import DecodingStats, TokenEvent, exit_histogram, mean_depth


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at least 1.
        sampling: how its tokens are chosen.
        stop_tokens: ids that end it; the one that does is its last token.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    stop_tokens: frozenset[int] = frozenset()


class DecodingSession:
    """Decoding of one batch, a step at a time. Made by `EarlyExitEngine.start`, which checks it.

    Attributes:
        cache: the model's key/value storage.
        finished: whether every sequence has ended.
    """

    def __init__(
        self,
        model: DecodingModel,
        requests: Sequence[Request],
        exits: Sequence[AskedExit],
        criterion: str,
        max_waiting: int | None,
    ) -> None:
        self.requests = tuple(requests)
        max_length = max(len(own.prompt) + own.max_new_tokens for own in self.requests)
        with torch.inference_mode():
            self.cache: Any = model.new_cache(len(self.requests), max_length, tuple(exit.point.name for exit in exits))
        self._model = model
        self._descent = Descent(model, self.cache, exits, criterion, max_waiting)
        self._tokens = [list(own.prompt) for own in self.requests]  # with the new ones
        self._running = list(range(len(self.requests)))
        self._prompts_have_run = False

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return not self._running

    @torch.inference_mode()
    def step(self) -> tuple[TokenEvent, ...]:
        """The next token of every sequence that has not ended, in the order of the sequences.

        Raises:
            RuntimeError: the model returned logits that are not numbers.
        """
        if self.finished:
            return ()
        if self._prompts_have_run:
            newest = {index: (len(self._tokens[index]) - 1, self._tokens[index][-1]) for index in self._running}
            readings = self._descent.step(newest)
        else:
            readings = self._descent.prompt({index: self._tokens[index] for index in self._running})
            self._prompts_have_run = True
        events = self._choose(readings)
        self._running = [event.sequence for event in events if event.finish_reason is None]
        return events

    @torch.inference_mode()
    def flush(self) -> None:
        """Run everything that waits, of ended sequences too, to full depth.

        Afterwards every position that was fed has its keys and values in every layer, as after a full-depth run.
        """
        self._descent.flush()

    def waiting(self, sequence: int) -> int:
        """How many tokens of the sequence wait for deeper layers."""
        return self._descent.waiting(sequence)

    def stats(self, events: Sequence[TokenEvent]) -> DecodingStats:
        """Sums over these events and over the work done so far."""
        return DecodingStats(
            num_prompt_tokens=sum(len(own.prompt) for own in self.requests),
            num_tokens=len(events),
            tokens_per_exit=exit_histogram(events, self._model.exits),
            mean_depth=mean_depth(events),
            num_layers=self._model.num_layers,
            computed_layers=self._descent.computed_half_layers / 2,
            asked={point.name: 0 for point in self._model.exits} | self._descent.asked,
        )

    def _choose(self, readings: Sequence[Reading]) -> tuple[TokenEvent, ...]:
        """Sample a token from each reading and record it."""
        logits = torch.stack([reading.logits for reading in readings])
        indices = [reading.sequence for reading in readings]
        positions = [len(self._tokens[index]) for index in indices]
        chosen = sample(
            logits,
            [self.requests[index].sampling for index in indices],
            positions,
            [self._tokens[index] for index in indices],
        )
        of_chosen = logits.gather(1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0]
        logprobs = (of_chosen - logits.logsumexp(dim=1)).tolist()
        events = []
        for reading, position, token, logprob in zip(readings, positions, chosen, logprobs, strict=True):
            if math.isnan(logprob):
                source = "the final exit" if reading.exit is None else f"exit {reading.exit!r}"
                raise RuntimeError(
                    f"sequence {reading.sequence}: the logits for position {position} from {source} are not numbers "
                    "(NaN or inf); check the checkpoint for broken weights, or decode in bf16 or fp32, not fp16"
                )
            self._tokens[reading.sequence].append(token)
            events.append(
                TokenEvent(
                    sequence=reading.sequence,
                    position=position,
                    token=token,
                    exit=reading.exit,
                    layer=reading.layer,
                    confidence=reading.confidence,
                    logprob=logprob,
                    finish_reason=self._finish_reason(reading.sequence),
                )
            )
        return tuple(events)

    def _finish_reason(self, index: int) -> str | None:
        request, tokens = self.requests[index], self._tokens[index]
        if tokens[-1] in request.stop_tokens:
            return "stop"
        return "length" if len(tokens) - len(request.prompt) >= request.max_new_tokens else None
