# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Forward pass of a stage over the microbatches of a global batch: hidden states go forward, nothing comes back.

    per microbatch and stage:   receive -> run this stage's layers -> send at once -> the caller's work on the taps

No gradient crosses a stage boundary, so a stage that has sent its microbatch is done with it as far as later stages
are concerned: its exits' forward, loss and backward overlap with the next stages' layers. Megatron's own forward-only
schedule would send only after the exits' work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from torch.nn.functional import linear

from nemo_ee.megatron.loss.teacher import Teacher
from nemo_ee.megatron.model.microbatch import MicroBatch, StageOutput
from nemo_ee.megatron.pipeline.stage_context import StageContext
from nemo_ee.megatron.pipeline.teacher_channel import ArrivingTeacher
from nemo_ee.megatron.pipeline.transport import PostedReceive, Transport

_MAX_OUTSTANDING = 2  # microbatches whose hidden states are on their way to the next stage


def hidden_state_transport() -> Transport:
    """Carries hidden states over Megatron's pipeline group."""
    return Transport(
        parallel_state.get_pipeline_model_parallel_group(),
        carries="hidden states",
        max_outstanding=_MAX_OUTSTANDING,
        way_out=". The same command resumes from the last checkpoint",
    )


def stage_outputs(
    context: StageContext, batches: Sequence[MicroBatch]
) -> Iterator[tuple[MicroBatch, StageOutput, Teacher | None]]:
    """Run this stage's layers over the microbatches of one global batch.

    Every rank of the pipeline must iterate to the end, over the same number of microbatches. One set of taps is alive
    at a time if the caller drops its own before it takes the next.

    Args:
        context: this stage.
        batches: this rank's microbatches.

    Yields:
        (microbatch, what the layers left of it, teacher or None), after the hidden state was sent on. On a stage that
        waits for a teacher each comes later by as many microbatches as the teacher takes to come back.
    """
    delay = 0 if context.teachers is None else context.teachers.delay
    held: deque[tuple[MicroBatch, StageOutput, ArrivingTeacher | None]] = deque()
    posted = _expect_hidden_state(context, batches[0])
    for batch, following in zip_longest(batches, batches[1:]):
        received = None if posted is None else posted.wait()
        # The next receive is posted before this microbatch's layers run, so that the transfer overlaps with them.
        posted = None if following is None else _expect_hidden_state(context, following)
        held.append(_run_and_send(context, batch, received))
        if len(held) > delay:
            yield _with_teacher(context, *held.popleft())
    while held:
        yield _with_teacher(context, *held.popleft())


def _expect_hidden_state(context: StageContext, batch: MicroBatch) -> PostedReceive | None:
    """Post the receive of a microbatch's hidden state; None on the first stage."""
    model, before = context.model, context.transport.stage - 1
    if before < 0:
        return None
    return context.transport.expect(before, model.hidden_shape(batch), model.config.params_dtype, batch.tokens.device)


def _run_and_send(
    context: StageContext, batch: MicroBatch, received: Tensor | None
) -> tuple[MicroBatch, StageOutput, ArrivingTeacher | None]:
    model, transport = context.model, context.transport
    with context.mixed_precision():
        output = model.forward_to_taps(batch, received)
    teacher = None if context.teachers is None else context.teachers.after_forward(output, batch)
    if transport.stage + 1 < transport.num_stages:
        # Under autocast the residual stream stays in the parameters' dtype, so states travel between stages in it.
        transport.send(transport.stage + 1, output.hidden.to(model.config.params_dtype))
    return batch, output if model.post_process else replace(output, hidden=None), teacher


def _with_teacher(
    context: StageContext, batch: MicroBatch, output: StageOutput, teacher: ArrivingTeacher | None
) -> tuple[MicroBatch, StageOutput, Teacher | None]:
    return batch, output, None if teacher is None else context.teachers.teacher(teacher)


@torch.no_grad()
def full_model_logits(context: StageContext, tokens: Tensor) -> Tensor | None:
    """Logits of a full-depth model in the parameters' dtype, for checks. Every rank must call it with the same tokens.

    Args:
        context: a stage of a full-depth model.
        tokens: [b, s] int64.

    Returns:
        [b, s, vocabulary] fp32, true vocabulary, on the last pipeline stage, None on the others.
    """
    model, tokens = context.model, tokens.to(context.device)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    batch = MicroBatch(tokens, tokens, torch.ones_like(tokens, dtype=torch.float32), positions)
    ((_, output, _),) = stage_outputs(replace(context, autocast=None, teachers=None), [batch])
    context.transport.drain()
    if not model.post_process:
        return None
    weight = model.backbone_output_weight()
    logits = linear(model.final_hidden(output.hidden).to(weight.dtype), weight)
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    return logits.view(*tokens.t().shape, -1)[..., : model.true_vocab_size].transpose(0, 1).float()
