# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The final exit's distributions on their way from the last pipeline stage back to exits that learn from them.

    last stage:      layers -> final norm -> what the exits need, sent at once to every stage that listens
    earlier stages:  layers -> send on -> hold the taps until the microbatch's teacher is there -> the exits' work

With top-k the k token ids and probabilities travel, otherwise the final hidden state, from which a stage that holds
the output weight forms the whole distribution again. Stage i of S holds the taps of at most S - i + 1 microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.placement import StagePlacement
from nemo_ee.megatron.loss.teacher import FullTeacher, Teacher, TopKTeacher
from nemo_ee.megatron.loss.weight_casts import WeightCasts
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.microbatch import MicroBatch, StageOutput
from nemo_ee.megatron.pipeline.transport import PostedReceive, Transport, new_pipeline_group

# The tensors of one microbatch's teacher: here already on the last stage, on their way on the others.
ArrivingTeacher = Sequence[Tensor | PostedReceive]


class TeacherChannel:
    """One stage's end of the channel. Every rank of the world must make one at the same time.

    Args:
        model: this stage of a full-depth model.
        early_exit: some of its exits learn from the final exit.
        placements: all stages.
        autocast: dtype of mixed precision, None for none.
        timeout: longest time to wait for a transfer.
        chunk_bytes, casts: see `StageContext`.

    Attributes:
        delay: microbatches that this stage holds back while their teachers are on their way.
    """

    def __init__(
        self,
        model: EarlyExitGPTModel,
        early_exit: EarlyExitConfig,
        placements: Sequence[StagePlacement],
        *,
        autocast: torch.dtype | None,
        timeout: timedelta,
        chunk_bytes: int | None = None,
        casts: WeightCasts | None = None,
    ) -> None:
        self.model, self.chunk_bytes, self._casts = model, chunk_bytes, casts or WeightCasts()
        self.temperature, self.top_k = early_exit.distillation.temperature, early_exit.distillation.top_k
        self.dtype = autocast or model.config.params_dtype
        listening = [learns_from_final_exit(early_exit, placement) for placement in placements]
        stage, self._source = model.placement.stage, len(placements) - 1
        self.listens, self.is_source = listening[stage], stage == self._source
        self._targets = [target for target, wants in enumerate(listening[:-1]) if wants]
        # One microbatch more than the pipeline needs to come back: a slow moment of a later stage stops nobody.
        self.delay = len(placements) - stage if self.listens and not self.is_source else 0
        # A group for this traffic alone: transfers of one group between two ranks run in the order in which they were
        # posted, and these go the other way.
        several = len(placements) > 1
        group = new_pipeline_group(timeout=timeout) if several else parallel_state.get_pipeline_model_parallel_group()
        self.transport = Transport(
            group,
            carries="the final exit's distributions",
            # The listeners post their receives before a microbatch's state leaves them: no send waits for long.
            max_outstanding=3 * max(1, len(self._targets)) * (1 if self.top_k is None else 2),
            way_out=". The same command resumes from the last checkpoint",
        )
        self._connect()

    def _connect(self) -> None:
        """One element to every stage that listens, before the first microbatch.

        NCCL connects two ranks in their first transfer and blocks the host until both are there; a listener posts its
        first receive before it sends the state that the last stage would have to wait for.
        """
        device = next(self.model.parameters()).device
        if self.is_source:
            for target in self._targets:
                self.transport.send(target, torch.zeros(1, device=device))
            self.transport.drain()
        elif self.listens:
            self.transport.expect(self._source, (1,), torch.float32, device).wait()

    def after_forward(self, output: StageOutput, batch: MicroBatch) -> ArrivingTeacher | None:
        """Send a microbatch's teacher on the last stage, post its receive on stages that listen.

        Returns:
            What `teacher` takes; None on a stage without exits that learn from the final exit.
        """
        if self.is_source:
            payload = self._payload(output.hidden)
            for target in self._targets:
                for tensor in payload:
                    self.transport.send(target, tensor)
            return payload if self.listens else None
        if not self.listens:
            return None
        device = batch.tokens.device
        return [self.transport.expect(self._source, *like, device) for like in self._shapes(batch)]

    def teacher(self, arriving: ArrivingTeacher) -> Teacher:
        """The teacher that `after_forward` announced, once it is there."""
        payload = [part.wait() if isinstance(part, PostedReceive) else part for part in arriving]
        if self.top_k is not None:
            return TopKTeacher(payload[0].long(), payload[1])
        return FullTeacher(self.model.final_hidden(payload[0]), self._output_weight(), self.temperature)

    def _payload(self, hidden: Tensor) -> list[Tensor]:
        if self.top_k is None:
            return [hidden.to(self.model.config.params_dtype).contiguous()]
        best = TopKTeacher.of(
            self.model.final_hidden(hidden),
            self._output_weight(),
            top_k=self.top_k,
            temperature=self.temperature,
            vocabulary=self.model.vocabulary(),
            chunk_bytes=self.chunk_bytes,
        )
        return [best.ids.to(torch.int32), best.probabilities]

    def _shapes(self, batch: MicroBatch) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of `_payload`."""
        if self.top_k is None:
            return [(self.model.hidden_shape(batch), self.model.config.params_dtype)]
        shape = (batch.tokens.numel(), self.top_k)
        return [(shape, torch.int32), (shape, torch.float32)]

    def _output_weight(self) -> Tensor:
        return self._casts.of([self.model.backbone_output_weight()], self.dtype)[0]


def learns_from_final_exit(early_exit: EarlyExitConfig, placement: StagePlacement) -> bool:
    """Whether some exit of a stage has the final exit as its teacher."""
    return any(early_exit.objective_of(exit.name) != "cross_entropy" for exit in placement.exits)


def keeps_output_weight(early_exit: EarlyExitConfig, placement: StagePlacement) -> bool:
    """Whether a stage forms the final exit's whole distribution from its hidden state."""
    return early_exit.distillation.top_k is None and learns_from_final_exit(early_exit, placement)
