# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One stage's forward pass of joint training: backbone and exits in one graph, for Megatron's unmodified schedules.

    loss = final exit's loss + sum over exits of weight_e * loss_e      (EE-LLM, arXiv 2312.04916, section 3)

A schedule passes a stage's output on and later returns its gradient; it has no place for losses on the way. So an
exit's loss is attached to the hidden state it was computed from, as Megatron-core attaches the auxiliary losses of
mixture-of-experts and multi-token prediction: forward, the hidden state passes unchanged; backward, the loss gets the
gradient 1 and its gradient is added to the hidden state's own. No loss has to travel between stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from nemo_ee.megatron.loss.differentiable_cross_entropy import differentiable_cross_entropy
from nemo_ee.megatron.model.microbatch import MicroBatch
from nemo_ee.megatron.pipeline.exit_loss import exit_terms
from nemo_ee.megatron.pipeline.stage_context import StageContext


class _AttachLoss(torch.autograd.Function):
    """(hidden, loss) -> hidden; in the backward pass the loss gets the gradient 1."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad_hidden, torch.ones_like(loss)


def attach_loss(hidden: Tensor, loss: Tensor) -> Tensor:
    """The hidden state [s, b, h], whose backward pass also runs that of `loss` (a scalar computed from it).

    The result is a tensor of its own that shares the memory: a pipeline schedule that frees what it has sent empties
    the result and leaves `hidden`, which the exit's graph still needs.
    """
    return make_viewless_tensor(inp=_AttachLoss.apply(hidden, loss), requires_grad=True, keep_graph=True)


def forward_with_exit_losses(
    context: StageContext, batch: MicroBatch, *, loss_scales: Mapping[str, float], losses: dict[str, Tensor]
) -> Tensor:
    """This stage's layers with the losses of its exits attached. Recomputes activations by the config.

    Every rank of the tensor-parallel group must call it. On stages after the first the schedule has handed over the
    received hidden state by `set_input_tensor`.

    Args:
        context: this stage, full depth.
        batch: the microbatch.
        loss_scales: exit name -> factor on the summed loss in the training objective.
        losses: gets every exit's summed loss by name, fp32, without a graph; with recomputation twice the same value.

    Returns:
        [s, b, h] ([s/tp, b, h] under sequence parallelism) to send on; on the last stage the final norm's output.
    """
    model = context.model
    with context.mixed_precision():
        hidden, rotary, *_ = model._preprocess(batch.tokens, batch.position_ids)
    hidden = model.decoder.input_tensor if hidden is None else hidden
    if not hidden.requires_grad:
        # Frozen embeddings: recomputation only sends gradients into layers whose input wants one.
        hidden.requires_grad_()
    hidden = make_viewless_tensor(inp=hidden, requires_grad=True, keep_graph=True)
    layers = _LayersWithExits(context, batch, rotary, loss_scales, losses)
    # Under sequence parallelism every rank drops out its own part of the sequence, as in Megatron's own block.
    sequence = tensor_parallel.get_cuda_rng_tracker().fork() if model.config.sequence_parallel else nullcontext()
    with sequence:
        for first, end, recompute in recomputed_ranges(model.config, len(model.decoder.layers)):
            run = partial(layers.run, first, end)
            hidden = tensor_parallel.checkpoint(run, False, hidden) if recompute else run(hidden)
    if model.decoder.final_layernorm is not None:
        with context.mixed_precision():
            hidden = model.decoder.final_layernorm(hidden)
    return make_viewless_tensor(inp=hidden, requires_grad=True, keep_graph=True)


@dataclass(frozen=True)
class _LayersWithExits:
    """One microbatch on its way through a stage's layers. See `forward_with_exit_losses`."""

    context: StageContext
    batch: MicroBatch
    rotary_pos_emb: Tensor | None
    loss_scales: Mapping[str, float]
    losses: dict[str, Tensor]

    def run(self, first: int, end: int, hidden: Tensor) -> Tensor:
        """[s, b, h] after the layers first..end-1 of the stage."""
        with self.context.mixed_precision():  # in here, because a recomputation runs outside the caller's
            for layer in self.context.model.decoder.layers[first:end]:
                hidden, _ = layer._forward_attention(
                    hidden, self.batch.attention_mask, rotary_pos_emb=self.rotary_pos_emb
                )
                hidden = self._attach_exits(hidden, 2 * layer.layer_number - 1)
                hidden = self._attach_exits(layer._forward_mlp(hidden), 2 * layer.layer_number)
            return hidden

    def _attach_exits(self, hidden: Tensor, stop: int) -> Tensor:
        """The hidden state with the losses of the exits whose tap it is."""
        scaled = []
        for head in self.context.model.exits:
            if head.exit.stop == stop:
                inputs, weights = exit_terms(head, hidden, self.batch, self.rotary_pos_emb)
                loss = label_loss(self.context, inputs, weights, self.batch)
                self.losses[head.exit.name] = loss.detach()
                scaled.append(loss * self.loss_scales[head.exit.name])
        return attach_loss(hidden, torch.stack(scaled).sum()) if scaled else hidden


def final_exit_loss(context: StageContext, hidden: Tensor, batch: MicroBatch) -> Tensor:
    """The final exit's label cross-entropy on the last stage, summed over the counting tokens; differentiable.

    Args:
        hidden: the final norm's output [s, b, h] ([s/tp, b, h] under sequence parallelism).
    """
    model = context.model
    return label_loss(context, [model.final_hidden(hidden)], [model.backbone_output_weight()], batch)


def label_loss(context: StageContext, inputs: list[Tensor], weights: list[Tensor], batch: MicroBatch) -> Tensor:
    """Summed label cross-entropy of one output projection, given as terms (see `exit_terms`); differentiable."""
    return differentiable_cross_entropy(
        inputs,
        weights,
        *batch.flat_labels(),
        vocabulary=context.model.vocabulary(),
        dtype=context.autocast,
    )


def recomputed_ranges(config: TransformerConfig, num_layers: int) -> list[tuple[int, int, bool]]:
    """(first, end, recompute?) of consecutive layers of a stage, by Megatron's `recompute_*` settings.

    `full` with `uniform` recomputes pieces of `recompute_num_layers` layers, with `block` the first
    `recompute_num_layers` layers one by one. `selective` is done inside the layers.
    """
    if config.recompute_granularity != "full":
        return [(0, num_layers, False)]
    size = config.recompute_num_layers
    if config.recompute_method == "uniform":
        return [(first, min(first + size, num_layers), True) for first in range(0, num_layers, size)]
    size = min(size, num_layers)
    rest = [(size, num_layers, False)] if size < num_layers else []
    return [(first, first + 1, True) for first in range(size)] + rest
