# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's GPT with exit heads: one pipeline stage of it.

The decoder is Megatron's own, cut to the layers that run; exit heads are a sibling module. Tuning and evaluation use
`forward_to_taps`; `forward` is Megatron's and gives the full model.

A *stop* is a depth in half layers: 2k-1 after layer k's attention and residual, 2k after layer k (see
ExitConfig.stop).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from nemo_ee.exits.placement import StagePlacement
from nemo_ee.megatron.loss.vocab_parallel import VocabularyShard, output_weight_key
from nemo_ee.megatron.model.exit_head import ExitHead, ExitHeads, VocabularyOutput
from nemo_ee.megatron.model.layer_spec import BackboneSpecs
from nemo_ee.megatron.model.low_rank import spread_over_tensor_parallel
from nemo_ee.megatron.model.microbatch import MicroBatch, StageOutput, Taps
from nemo_ee.megatron.versions import sharding_metadata


def set_layer_split(config: TransformerConfig, placements: Iterable[StagePlacement]) -> None:
    """Set the layers of each stage in Megatron's config, from which it numbers layers and names their weights."""
    stages = [["decoder"] * placement.num_layers for placement in placements]
    if len(stages) > 1:
        config.pipeline_model_parallel_layout = PipelineParallelLayerLayout(stages, len(stages))


class EarlyExitGPTModel(GPTModel):
    """One pipeline stage: embedding (first stage), layers, exit heads, final exit (last stage of a full-depth model).

    Args:
        config: Megatron's transformer config, the layer split set by `set_layer_split`.
        specs: building blocks of layers and heads.
        placement: this stage's layers and exits.
        full_depth: the layers past the deepest exit and the final exit are built too.
        vocab_size: true vocabulary size.
        padded_vocab_size: divisible by the tensor-parallel size.
        max_sequence_length: positions a learned position embedding has.
        pre_process, post_process: first and last stage of the pipeline.
        keep_output_weight: this stage needs the backbone's output weight even if none of its exits projects with it.
        gpt_options: further options of `GPTModel` (positions, rotary settings, tied embeddings).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        specs: BackboneSpecs,
        placement: StagePlacement,
        full_depth: bool,
        vocab_size: int,
        padded_vocab_size: int,
        max_sequence_length: int,
        pre_process: bool,
        post_process: bool,
        keep_output_weight: bool = False,
        **gpt_options,
    ) -> None:
        super().__init__(
            config,
            transformer_layer_spec=TransformerBlockSubmodules([specs.layer] * placement.num_layers, specs.norm),
            vocab_size=padded_vocab_size,
            max_sequence_length=max_sequence_length,
            pre_process=pre_process,
            post_process=post_process and full_depth,
            parallel_output=True,
            **gpt_options,
        )
        self.placement, self.full_depth = placement, full_depth
        self.true_vocab_size = vocab_size
        if placement.skip_last_mlp:
            # The deepest exit replaces this layer's MLP and nothing runs after it.
            self.decoder.layers[-1].pre_mlp_layernorm = IdentityOp()
            self.decoder.layers[-1].mlp = IdentityOp()
        # A plain list hides the weight from `parameters()` twice over: where this stage has the backbone's output
        # weight anyway, shared exits use that very tensor.
        self.backbone_output = None
        keep_output_weight = keep_output_weight or any(exit.output != "own" for exit in placement.exits)
        if keep_output_weight and self._own_output_weight() is None:
            self.backbone_output = VocabularyOutput(config, padded_vocab_size)
        self.exits = ExitHeads(
            config,
            [
                ExitHead(config, exit, specs, vocab_size=padded_vocab_size, shared_weight=self.backbone_output_weight)
                for exit in placement.exits
            ],
        )
        self.trains_backbone = False
        self.freeze_backbone()
        self.eval()

    def setup_embeddings_and_output_layer(self) -> None:
        """Does nothing: every stage reads its weights from the checkpoint, tied ones too, so no stage sends any."""

    def _own_output_weight(self) -> Tensor | None:
        """The backbone's output weight [v/tp, h] where this stage has it."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight if self.post_process else None

    def backbone_output_weight(self) -> Tensor:
        """The backbone's output weight [v/tp, h], from this stage's output layer or its frozen copy."""
        own = self._own_output_weight()
        return self.backbone_output.weight if own is None else own

    def backbone_named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(name, parameter) of everything but the exits."""
        return ((name, value) for name, value in self.named_parameters() if not name.startswith("exits."))

    def freeze_backbone(self) -> None:
        """Freeze all parameters except those of the exits, which stay as they are."""
        for _, parameter in self.backbone_named_parameters():
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> EarlyExitGPTModel:
        """Evaluation mode unless the backbone trains: dropout in a frozen one would only add noise to what the exits
        learn. Exits always run as they serve."""
        super().train(mode and self.trains_backbone)
        self.exits.eval()
        return self

    def vocabulary(self) -> VocabularyShard:
        """This rank's part of the vocabulary."""
        return VocabularyShard.of(
            vocab_size=self.true_vocab_size,
            padded_vocab_size=self.vocab_size,
            rank=parallel_state.get_tensor_model_parallel_rank(),
            size=parallel_state.get_tensor_model_parallel_world_size(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )

    def hidden_shape(self, batch: MicroBatch) -> tuple[int, int, int]:
        """Shape of the hidden states of a microbatch on this rank: (s, b, h), (s/tp, b, h) under sequence
        parallelism."""
        micro_batch, sequence = batch.tokens.shape
        if self.config.sequence_parallel:
            sequence //= parallel_state.get_tensor_model_parallel_world_size()
        return sequence, micro_batch, self.config.hidden_size

    def final_hidden(self, hidden: Tensor) -> Tensor:
        """Input [s * b, h] of the final output projection, the same on every tensor-parallel rank.

        Args:
            hidden: the final norm's output [s, b, h] ([s/tp, b, h] under sequence parallelism).
        """
        return spread_over_tensor_parallel(hidden, self.config).flatten(0, 1)

    @torch.no_grad()
    def forward_to_taps(self, batch: MicroBatch, received: Tensor | None = None) -> StageOutput:
        """Run this stage's layers and keep the hidden state at every exit's tap.

        Args:
            batch: the microbatch; tokens and positions are read on the first stage only.
            received: [s, b, h] from the stage before ([s/tp, b, h] under sequence parallelism), None on the first.
        """
        if received is not None:
            self.set_input_tensor(received)
        hidden, rotary, *_ = self._preprocess(batch.tokens, batch.position_ids)
        if received is not None:
            hidden = received
        taps = Taps({exit.stop for exit in self.placement.exits}, hidden)
        for layer in self.decoder.layers:
            hidden, _ = layer._forward_attention(hidden, batch.attention_mask, rotary_pos_emb=rotary)
            taps.keep(2 * layer.layer_number - 1, hidden)
            if self.placement.skip_last_mlp and layer is self.decoder.layers[-1]:
                break
            hidden = layer._forward_mlp(hidden)
            taps.keep(2 * layer.layer_number, hidden)
        if self.decoder.final_layernorm is not None:
            hidden = self.decoder.final_layernorm(hidden)
        return StageOutput(hidden, taps.kept, rotary)

    def backbone_sharded_state_dict(self) -> dict:
        """Sharded tensors of the backbone under canonical keys, without exits, low-rank updates and TE's extra states.

        A stage that only keeps a copy of the output weight lists it under the key it is stored at.
        """
        sharded = super().sharded_state_dict(metadata=sharding_metadata())
        sharded = {key: value for key, value in sharded.items() if not key.startswith(("exits.", "backbone_output."))}
        if self.backbone_output is not None:
            stored = output_weight_key(self.share_embeddings_and_output_weights)
            copy = self.backbone_output.sharded_state_dict("backbone_output.", metadata=sharding_metadata())
            for key, shard in copy.items():
                sharded[key] = replace(shard, key=stored)
        own = ("_extra_state", "low_rank_a", "low_rank_b")  # not read when a backbone is loaded
        return {key: value for key, value in sharded.items() if not key.endswith(own)}

    def sharded_backbone_to_save(self, prefix: str) -> dict:
        """Sharded state of the whole backbone as Megatron's own GPT stores it, for a checkpoint of its own.

        Args:
            prefix: in front of every key, NeMo's is `model.`.
        """
        assert self.placement.num_layers and not self.placement.skip_last_mlp, "only a full-depth model is complete"
        sharded = super().sharded_state_dict(prefix, metadata=sharding_metadata())
        own = (f"{prefix}exits.", f"{prefix}backbone_output.")
        return {key: value for key, value in sharded.items() if not key.startswith(own)}

    def exit_sharded_state_dict(self, prefix: str = "exits.") -> dict:
        """Sharded tensors of the exit heads, keys `<prefix><exit name>.<parameter>`."""
        sharded = self.exits.sharded_state_dict(prefix)
        return {key: value for key, value in sharded.items() if not key.endswith("_extra_state")}
