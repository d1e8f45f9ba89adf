# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One stage's forward pass of joint training: backbone and exits in one graph, for Megatron's unmodified schedules.

    loss = final exit's loss + sum over exits of weight_e * loss_e      (EE-LLM, arXiv 2312.04916, section 3)

A schedule hands a stage's output on and later gives back its gradient; it knows nothing of losses on the way. So an
exit's loss is attached to the hidden state it was computed from, as Megatron-core attaches the auxiliary losses of
mixture-of-experts and multi-token prediction: forward, the hidden state passes unchanged; backward, the loss gets the
gradient 1 and what it sends back joins the hidden state's own gradient. No loss has to travel between stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from nemo_ee.megatron.loss.differentiable_cross_entropy import differentiable_cross_entropy
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.megatron.model.exit_head import ExitHead
from nemo_ee.megatron.model.low_rank import spread_over_tensor_parallel
from nemo_ee.megatron.pipeline.exit_loss import MicroBatch

# (exit name, its loss summed over the microbatch's counting tokens, fp32, no graph)
Record = Callable[[str, Tensor], None]


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
    model: EarlyExitGPTModel,
    batch: MicroBatch,
    *,
    loss_scales: Mapping[str, float],
    record: Record,
    autocast: torch.dtype | None,
) -> Tensor:
    """This stage's layers with the losses of its exits attached. Recomputes activations as the config says.

    Every rank of the tensor-parallel group must call it. On stages after the first the schedule has handed over the
    received hidden state by `set_input_tensor`.

    Args:
        model: this stage, full depth.
        batch: the microbatch.
        loss_scales: exit name -> factor on the summed loss in the training objective.
        record: called with every exit's summed loss; with recomputation a second time, with the same value.
        autocast: dtype of mixed precision, None for none.

    Returns:
        [s, b, h] ([s/tp, b, h] under sequence parallelism) to send on; on the last stage the final norm's output.
    """
    config = model.config
    with _autocast(batch, autocast):
        hidden, rotary, *_ = model._preprocess(batch.tokens, batch.position_ids)
    hidden = model.decoder.input_tensor if hidden is None else hidden
    if not hidden.requires_grad:
        # Frozen embeddings: recomputation only sends gradients into layers whose input wants one.
        hidden.requires_grad_()
    hidden = make_viewless_tensor(inp=hidden, requires_grad=True, keep_graph=True)
    heads: dict[int, list[ExitHead]] = {}
    for head in model.exits:
        heads.setdefault(head.exit.stop, []).append(head)

    def with_exits(hidden: Tensor, stop: int) -> Tensor:
        if stop not in heads:
            return hidden
        losses = []
        for head in heads[stop]:
            loss = _exit_loss(model, head, hidden, batch, rotary, autocast)
            record(head.exit.name, loss.detach())
            losses.append(loss * loss_scales[head.exit.name])
        return attach_loss(hidden, torch.stack(losses).sum())

    def layers(first: int, end: int) -> Callable[[Tensor], Tensor]:
        def run(hidden: Tensor) -> Tensor:
            with _autocast(batch, autocast):  # in here, because a recomputation runs outside the caller's
                for layer in model.decoder.layers[first:end]:
                    hidden, _ = layer._forward_attention(hidden, batch.attention_mask, rotary_pos_emb=rotary)
                    hidden = with_exits(hidden, 2 * layer.layer_number - 1)
                    hidden = with_exits(layer._forward_mlp(hidden), 2 * layer.layer_number)
                return hidden

        return run

    # Under sequence parallelism every rank drops out its own part of the sequence, as in Megatron's own block.
    sequence = tensor_parallel.get_cuda_rng_tracker().fork() if config.sequence_parallel else nullcontext()
    with sequence:
        for first, end, recompute in recomputed_ranges(config, len(model.decoder.layers)):
            run = layers(first, end)
            hidden = tensor_parallel.checkpoint(run, False, hidden) if recompute else run(hidden)
    if model.decoder.final_layernorm is not None:
        with _autocast(batch, autocast):
            hidden = model.decoder.final_layernorm(hidden)
    return make_viewless_tensor(inp=hidden, requires_grad=True, keep_graph=True)


def final_exit_loss(
    model: EarlyExitGPTModel, hidden: Tensor, batch: MicroBatch, *, autocast: torch.dtype | None
) -> Tensor:
    """The final exit's label cross-entropy on the last stage, summed over the counting tokens; differentiable.

    Args:
        hidden: the final norm's output [s, b, h] ([s/tp, b, h] under sequence parallelism).
    """
    labels, mask = batch.flat_labels()
    return differentiable_cross_entropy(
        [spread_over_tensor_parallel(hidden, model.config).flatten(0, 1)],
        [model.backbone_output_weight()],
        labels,
        mask,
        vocabulary=model.vocabulary(),
        dtype=autocast,
    )


def recomputed_ranges(config: TransformerConfig, num_layers: int) -> list[tuple[int, int, bool]]:
    """(first, end, recompute?) of consecutive layers of a stage, as Megatron's `recompute_*` settings ask.

    `full` with `uniform` recomputes pieces of `recompute_num_layers` layers, with `block` the first
    `recompute_num_layers` layers one by one. `selective` is the layers' own affair.
    """
    if config.recompute_granularity != "full":
        return [(0, num_layers, False)]
    size = config.recompute_num_layers
    if config.recompute_method == "uniform":
        return [(first, min(first + size, num_layers), True) for first in range(0, num_layers, size)]
    size = min(size, num_layers)
    rest = [(size, num_layers, False)] if size < num_layers else []
    return [(first, first + 1, True) for first in range(size)] + rest


def _exit_loss(
    model: EarlyExitGPTModel,
    head: ExitHead,
    hidden: Tensor,
    batch: MicroBatch,
    rotary_pos_emb: Tensor | None,
    autocast: torch.dtype | None,
) -> Tensor:
    state = head(hidden, attention_mask=batch.attention_mask, rotary_pos_emb=rotary_pos_emb)
    terms = head.output_terms(state)
    labels, mask = batch.flat_labels()
    return differentiable_cross_entropy(
        [x.flatten(0, 1) for x, _ in terms],
        [weight for _, weight in terms],
        labels,
        mask,
        vocabulary=model.vocabulary(),
        dtype=autocast,
    )


def _autocast(batch: MicroBatch, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(batch.tokens.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
