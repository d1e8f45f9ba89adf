# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Exit heads: the modules at an exit layer (EE-Tuning, arXiv 2402.00518, section 2).

    embedding   output projection of the hidden state after layer k
    norm        norm, output projection
    mlp         an own MLP in place of layer k's, on the same attention output and residual; then norm, projection
    layer       one more transformer layer, norm, projection

A head ends before its output projection: the projection is handed out as a list of (input, weight) terms, because the
loss multiplies them chunk by chunk (`linear_cross_entropy`) and never holds all logits.

Shapes: s sequence, b micro batch, h hidden, v padded vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    make_sharded_tensors_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)
from torch import Tensor
from torch.nn.functional import linear

from nemo_ee.exits.config import ExitConfig
from nemo_ee.megatron.model.layer_spec import BackboneSpecs
from nemo_ee.megatron.model.low_rank import add_low_rank_updates, new_parameter, spread_over_tensor_parallel
from nemo_ee.megatron.versions import build_mlp, sharding_metadata

# Where the norm that Transformer Engine fuses into the MLP's first linear lives in every checkpoint.
_CANONICAL_NORM = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


class VocabularyOutput(MegatronModule):
    """Output projection weight [v/tp, h] of an exit, stored like Megatron's output layer."""

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__(config=config)
        rows = vocab_size // parallel_state.get_tensor_model_parallel_world_size()
        self.weight = new_parameter(rows, config.hidden_size, config=config, sharded_axis=0)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Vocabulary rows are padded differently by every layout, hence `allow_shape_mismatch`."""
        return {f"{prefix}weight": _vocabulary_sharded(self.weight, f"{prefix}weight", sharded_offsets)}


class VocabularyLowRank(MegatronModule):
    """Low-rank update B A of an output projection: A [r, h] replicated, B [v/tp, r] sharded over the vocabulary."""

    def __init__(self, config: TransformerConfig, vocab_size: int, rank: int) -> None:
        super().__init__(config=config)
        rows = vocab_size // parallel_state.get_tensor_model_parallel_world_size()
        self.low_rank_a = new_parameter(rank, config.hidden_size, config=config, sharded_axis=None)
        self.low_rank_b = new_parameter(rows, rank, config=config, sharded_axis=0)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Keys `low_rank_a` (replicated) and `low_rank_b` (vocabulary rows)."""
        key = f"{prefix}low_rank_b"
        return {
            **make_sharded_tensors_for_checkpoint({"low_rank_a": self.low_rank_a}, prefix, {}, sharded_offsets),
            key: _vocabulary_sharded(self.low_rank_b, key, sharded_offsets),
        }


def _vocabulary_sharded(weight: Tensor, key: str, sharded_offsets: tuple) -> ShardedTensor:
    return make_tp_sharded_tensor_for_checkpoint(
        weight, key, prepend_offsets=sharded_offsets, allow_shape_mismatch=True
    )


def _sharded(module: torch.nn.Module, prefix: str, sharded_offsets: tuple, metadata: dict | None) -> dict:
    """The sharded state of a part of a head; a module that is not Megatron's is replicated.

    Megatron's `sharded_state_dict_default` takes the tensor-parallel group as an argument from 0.16 on; without it
    every rank would claim to be the one that saves the parameter.
    """
    if hasattr(module, "sharded_state_dict"):
        return module.sharded_state_dict(prefix, sharded_offsets, sharding_metadata(metadata))
    return make_sharded_tensors_for_checkpoint(module.state_dict(keep_vars=True), prefix, {}, sharded_offsets)


class ExitHead(MegatronModule):
    """One exit head on this pipeline stage.

    Args:
        config: Megatron's transformer config.
        exit: the exit's own settings.
        specs: building blocks of the backbone.
        vocab_size: padded vocabulary size v, divisible by the tensor-parallel size.
        shared_weight: returns the backbone's output weight [v/tp, h]; called at use, for `output: shared | low_rank`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        exit: ExitConfig,
        specs: BackboneSpecs,
        *,
        vocab_size: int,
        shared_weight: Callable[[], Tensor],
    ) -> None:
        super().__init__(config=config)
        self.exit = exit
        self._shared_weight = shared_weight
        lora = exit.init == "lora"
        layer_spec, norm = (specs.local_layer, specs.local_norm) if lora else (specs.layer, specs.norm)
        mlp_spec = specs.local_layer.submodules.mlp if lora else specs.exit_mlp
        if exit.architecture == "layer":
            self.layer = build_module(layer_spec, config=config, layer_number=1)
        if exit.architecture == "mlp":
            parts = layer_spec.submodules
            self.pre_mlp_layernorm = build_module(
                parts.pre_mlp_layernorm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
            self.mlp = build_mlp(mlp_spec, config)
        if exit.architecture != "embedding":
            self.norm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)
        if exit.output == "own":
            self.output = VocabularyOutput(config, vocab_size)
        if exit.output == "low_rank" or (exit.output == "own" and lora):
            self.output_update = VocabularyLowRank(config, vocab_size, exit.rank)
        if lora:
            for name in ("layer", "mlp"):
                if hasattr(self, name):
                    add_low_rank_updates(getattr(self, name), rank=exit.rank, config=config)
        self._freeze()
        # Dropout would make a tuned exit differ from the one that serves: heads run as they serve.
        self.eval()

    def _freeze(self) -> None:
        """Freeze what is a copy by definition: an MLP's own norm, and with `init: lora` all but the updates.

        The norm in front of the exit's MLP stays frozen in every spec, because Transformer Engine fuses it with the
        MLP's first linear and the two specs must train the same function.
        """
        for name, parameter in self.named_parameters():
            if "q_layernorm." in name or "k_layernorm." in name:
                # Replicated, but each rank applies it to its own heads: gradients are summed over tensor parallelism.
                parameter.sees_part_of_heads = True
            own_mlp_norm = self.exit.architecture == "mlp" and (
                name.startswith("pre_mlp_layernorm.") or ".layer_norm_" in name
            )
            lora_base = self.exit.init == "lora" and "low_rank_" not in name
            if own_mlp_norm or lora_base:
                parameter.requires_grad_(False)

    def forward(
        self, hidden: Tensor, *, attention_mask: Tensor | None = None, rotary_pos_emb: Tensor | None = None
    ) -> Tensor:
        """From the tap to the input of the output projection.

        Args:
            hidden: [s, b, h] ([s/tp, b, h] under sequence parallelism) at the exit's tap: before layer k's MLP for
                `mlp`, after layer k otherwise.
            attention_mask, rotary_pos_emb: as for a transformer layer; only `layer` exits read them.

        Returns:
            Tensor of the same shape.
        """
        if self.exit.architecture == "layer":
            hidden, _ = self.layer(hidden, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb)
        return self.after_layer(hidden)

    def after_layer(self, hidden: Tensor) -> Tensor:
        """The part of the head that works on each position alone: own MLP if any, norm if any."""
        if self.exit.architecture == "mlp":
            update, bias = self.mlp(self.pre_mlp_layernorm(hidden))
            hidden = hidden + (update if bias is None else update + bias)
        return hidden if self.exit.architecture == "embedding" else self.norm(hidden)

    def output_terms(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The output projection as a sum of products: logits = sum of input @ weight^T over the terms.

        Args:
            hidden: result of `forward`.

        Returns:
            [([s, b, n], [v/tp, n])]; inputs hold the whole sequence on every tensor-parallel rank.
        """
        weight = self.output.weight if self.exit.output == "own" else self._shared_weight()
        terms = [(spread_over_tensor_parallel(hidden, self.config), weight)]
        if hasattr(self, "output_update"):
            down = linear(hidden, self.output_update.low_rank_a)
            terms.append((spread_over_tensor_parallel(down, self.config), self.output_update.low_rank_b))
        return terms

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Canonical keys: a separate norm before the exit's MLP is stored as the MLP's first linear's
        `layer_norm_*`."""
        sharded = {}
        for name, module in self.named_children():
            if not isinstance(module, IdentityOp):
                sharded.update(_sharded(module, f"{prefix}{name}.", sharded_offsets, metadata))
        apply_prefix_mapping(sharded, {f"{prefix}{_CANONICAL_NORM[0]}": f"{prefix}{_CANONICAL_NORM[1]}"})
        return sharded


class ExitHeads(MegatronModule):
    """The exit heads of this pipeline stage, in the order of the config, keyed by their global names.

    A sibling of the decoder, not part of its layers: keys inside some layers would stop Megatron from stacking the
    layers' weights, and the base model would no longer load.
    """

    def __init__(self, config: TransformerConfig, heads: Sequence[ExitHead]) -> None:
        super().__init__(config=config)
        self._names = {head.exit.name: index for index, head in enumerate(heads)}
        self.heads = torch.nn.ModuleList(heads)

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self):
        return iter(self.heads)

    def __getitem__(self, name: str) -> ExitHead:
        return self.heads[self._names[name]]

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Keys `<prefix><exit name>.<parameter>`."""
        sharded = {}
        for head in self.heads:
            sharded.update(head.sharded_state_dict(f"{prefix}{head.exit.name}.", sharded_offsets, metadata))
        return sharded
