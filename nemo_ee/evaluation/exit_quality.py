# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Quality of each exit on a text: loss, perplexity, and agreement with the full model.

loss        mean over the predicted tokens of -log p(token), in nats
perplexity  exp(loss)
agreement   share of positions at which the exit and the full model have the same most likely token
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from tqdm import tqdm

from nemo_ee.commands.console import messages
from nemo_ee.megatron.loss.exit_metrics import FULL_MODEL, ExitSums
from nemo_ee.megatron.model.exit_head import ExitHead
from nemo_ee.megatron.model.microbatch import MicroBatch
from nemo_ee.megatron.pipeline.tuning_step import evaluate_global_batch
from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel


@dataclass(frozen=True)
class ExitResult:
    """Measurements of one exit.

    Attributes:
        name, layer, architecture: name, layer and architecture of the exit.
        loss: nats per token.
        perplexity: exp(loss).
        agreement: share of positions that agree with the full model, 0..1.
        confidence: mean largest probability.
        entropy: mean entropy in nats.
        trainable_parameters: number of trainable elements over all ranks, without vocabulary padding.
    """

    name: str
    layer: int
    architecture: str
    loss: float
    perplexity: float
    agreement: float
    confidence: float
    entropy: float
    trainable_parameters: int


@dataclass(frozen=True)
class ExitQuality:
    """Measurements of every exit and of the full model on the same tokens.

    Attributes:
        exits: measurements of the exits, in the order of the config.
        loss, perplexity: loss and perplexity of the full model.
        tokens: number of predicted tokens.
    """

    exits: tuple[ExitResult, ...]
    loss: float
    perplexity: float
    tokens: int

    def to_mapping(self) -> dict[str, Any]:
        """For JSON: {exits: [{name, layer, architecture, loss, ...}], full_model: {loss, perplexity}, tokens}."""
        return {
            "exits": [asdict(exit) for exit in self.exits],
            "full_model": {"loss": self.loss, "perplexity": self.perplexity},
            "tokens": self.tokens,
        }


def evaluate_exits(
    model: MegatronEarlyExitGPTModel,
    batches: Iterable[Sequence[MicroBatch]],
    *,
    num_batches: int | None = None,
    progress: bool = False,
) -> ExitQuality:
    """Measure every exit and the full model in one pass. Every rank must call it with equally many batches.

    Args:
        model: a full-depth model.
        batches: this data-parallel rank's microbatches of each global batch; see `token_windows.microbatches`.
        num_batches: length of `batches`, for the progress bar.
        progress: whether a progress bar is shown (on global rank 0 only).

    Raises:
        ValueError: the model is cut at its deepest exit, or no position counts.
    """
    if not model.full_depth:
        raise ValueError("the model ends at its deepest exit; restore it with full_depth=True to measure agreement")
    sums = ExitSums(model.early_exit.names, model.device)
    tokens = torch.zeros((), dtype=torch.float64, device=model.device)
    shown = progress and torch.distributed.get_rank() == 0
    for microbatches in tqdm(
        batches, "evaluate", num_batches, unit="batch", disable=not shown, mininterval=0.5, file=messages()
    ):
        evaluate_global_batch(model.context, microbatches, sums=sums, agreement=True)
        tokens += sum(batch.loss_mask.sum() for batch in microbatches)
    results = sums.reduce()
    if parallel_state.get_data_parallel_world_size() > 1:
        torch.distributed.all_reduce(tokens, group=parallel_state.get_data_parallel_group())
    if not tokens:
        raise ValueError("no token counts in the data to evaluate on; give a text of at least two tokens")
    trainable = trainable_parameters(model)
    exits = tuple(
        ExitResult(
            exit.name,
            exit.layer,
            exit.architecture,
            **{key: value for key, value in results[exit.name].items() if key != "cross_entropy"},  # it is the loss
            trainable_parameters=trainable[exit.name],
        )
        for exit in model.early_exit.exits
    )
    full = results[FULL_MODEL]
    return ExitQuality(exits, full["loss"], full["perplexity"], tokens=int(tokens))


def trainable_parameters(model: MegatronEarlyExitGPTModel) -> dict[str, int]:
    """Trainable elements of every exit of the whole model. Every rank of a pipeline must call it.

    The number does not depend on the layout: tensor-parallel shards are added up, vocabulary padding is left out.
    """
    here = {head.exit.name: _trainable(head, model) for head in model.model.exits}
    stages = [here]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        stages = [{}] * parallel_state.get_pipeline_model_parallel_world_size()
        torch.distributed.all_gather_object(stages, here, group=parallel_state.get_pipeline_model_parallel_group())
    return {name: count for stage in stages for name, count in stage.items()}


def _trainable(head: ExitHead, model: MegatronEarlyExitGPTModel) -> int:
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    total = 0
    for name, parameter in head.named_parameters():
        if not parameter.requires_grad:
            continue
        if not getattr(parameter, "tensor_model_parallel", False):
            total += parameter.numel()
        elif name.startswith(("output.", "output_update.")):  # rows are the padded vocabulary
            total += model.vocab_size * parameter.shape[1]
        else:
            total += parameter.numel() * tensor_parallel
    return total
