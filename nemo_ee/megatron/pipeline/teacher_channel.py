# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The final exit's distributions on their way from the last pipeline stage back to exits that learn from them.

    last stage:      layers -> final norm -> what the exits need, sent at once to every stage that listens
    earlier stages:  layers -> send on -> hold the taps until the microbatch's teacher is there -> the exits' work

With top-k the k token ids and probabilities travel, otherwise the final hidden state, from which a stage that holds
the output weight forms the whole distribution again. Stage i of S holds the taps of at most S - i + 1 microbatches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup, Work, irecv, isend

from nemo_ee.megatron.loss.teacher import FullTeacher, Teacher, TopKTeacher
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel, StageOutput
from nemo_ee.megatron.model.low_rank import spread_over_tensor_parallel
from nemo_ee.megatron.pipeline.exit_loss import MicroBatch
from nemo_ee.megatron.pipeline.transport import talking_to


class TeacherChannel:
    """One stage's end of it.

    Args:
        model: this stage of a full-depth model.
        temperature, top_k: see `exits.objective`.
        listening: for each stage, whether one of its exits learns from the final exit.
        group: a group of the pipeline's ranks for this traffic alone, since transfers of one group between two ranks
            run in the order in which they were posted and these go the other way; None for a pipeline of one stage.
        autocast: dtype of mixed precision, None for none.
    """

    def __init__(
        self,
        model: EarlyExitGPTModel,
        *,
        temperature: float,
        top_k: int | None,
        listening: Sequence[bool],
        group: ProcessGroup | None,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.temperature, self.top_k, self.group = model, temperature, top_k, group
        stage, self.num_stages = model.placement.stage, len(listening)
        ranks = [0] if group is None else torch.distributed.get_process_group_ranks(group)
        self.listens, self.is_source = listening[stage], stage == self.num_stages - 1
        self._source = ranks[-1]
        self._targets = [rank for rank, wants in zip(ranks[:-1], listening, strict=False) if wants]
        # One microbatch more than the pipeline needs to come back: a slow moment of a later stage stops nobody.
        self.delay = self.num_stages - stage if self.listens and not self.is_source else 0
        self.dtype = autocast or model.config.params_dtype
        self._sent: deque[tuple[int, Work, Tensor]] = deque()
        self._connect()

    def _connect(self) -> None:
        """One element to every stage that listens, before the first microbatch.

        NCCL connects two ranks in their first transfer and blocks the host until both are there; a listener posts its
        first receive before it sends the state that the last stage would have to wait for.
        """
        one = torch.zeros(1, device=next(self.model.parameters()).device)
        if self.is_source:
            for rank in self._targets:
                with talking_to(self.group, rank, "connects to"):
                    isend(one, dst=rank, group=self.group).wait()
        elif self.listens:
            with talking_to(self.group, self._source, "connects to"):
                irecv(one, src=self._source, group=self.group).wait()

    def after_forward(self, stage: StageOutput, batch: MicroBatch) -> Callable[[], Teacher] | None:
        """Send the teacher on the last stage, post its receive on stages that listen.

        Returns:
            A call that waits for the microbatch's teacher; None on a stage without exits that learn from it.
        """
        if self.is_source:
            payload = self._payload(stage.hidden)
            self._send(payload)
            return (lambda: self._teacher(payload)) if self.listens else None
        if not self.listens:
            return None
        buffers = [torch.empty(shape, dtype=dtype, device=batch.tokens.device) for shape, dtype in self._shapes(batch)]
        does = "waits for the final exit's distributions of"
        with talking_to(self.group, self._source, does):
            works = [irecv(buffer, src=self._source, group=self.group) for buffer in buffers]

        def received() -> Teacher:
            with talking_to(self.group, self._source, does):
                for work in works:
                    work.wait()
            return self._teacher(buffers)

        return received

    def drain(self) -> None:
        """Wait for every outstanding send."""
        self._wait_for_sends(0)

    def _payload(self, hidden: Tensor) -> list[Tensor]:
        if self.top_k is None:
            return [hidden.to(self.model.config.params_dtype).contiguous()]
        weight = self.model.backbone_output_weight().to(self.dtype)
        hidden = spread_over_tensor_parallel(hidden, self.model.config).flatten(0, 1)
        best = TopKTeacher.of(
            hidden, weight, top_k=self.top_k, temperature=self.temperature, vocabulary=self.model.vocabulary()
        )
        return [best.ids.to(torch.int32), best.probabilities]

    def _shapes(self, batch: MicroBatch) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of `_payload`."""
        micro_batch, sequence = batch.tokens.shape
        config = self.model.config
        if self.top_k is not None:
            shape = (micro_batch * sequence, self.top_k)
            return [(shape, torch.int32), (shape, torch.float32)]
        if config.sequence_parallel:
            sequence //= parallel_state.get_tensor_model_parallel_world_size()
        return [((sequence, micro_batch, config.hidden_size), config.params_dtype)]

    def _teacher(self, payload: Sequence[Tensor]) -> Teacher:
        if self.top_k is not None:
            return TopKTeacher(payload[0].long(), payload[1])
        hidden = spread_over_tensor_parallel(payload[0], self.model.config).flatten(0, 1)
        weight = self.model.backbone_output_weight().to(self.dtype)
        return FullTeacher(hidden, weight, self.temperature)

    def _send(self, payload: Sequence[Tensor]) -> None:
        # The listeners posted their receives before this microbatch's state left them: no send waits for long.
        self._wait_for_sends(2 * len(payload) * len(self._targets))
        for rank in self._targets:
            with talking_to(self.group, rank, "sends the final exit's distributions to"):
                self._sent += [(rank, isend(tensor, dst=rank, group=self.group), tensor) for tensor in payload]

    def _wait_for_sends(self, allowed: int) -> None:
        while len(self._sent) > allowed:
            rank, work, _ = self._sent.popleft()
            with talking_to(self.group, rank, "sends the final exit's distributions to"):
                work.wait()


def new_pipeline_group(timeout: timedelta) -> ProcessGroup:
    """A second group of this rank's pipeline. Every rank of the world must call it."""
    ours = torch.distributed.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    pipelines: list[list[int]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(pipelines, ours)
    unique = sorted({tuple(ranks) for ranks in pipelines})
    return torch.distributed.new_subgroups_by_enumeration([list(ranks) for ranks in unique], timeout=timeout)[0]
