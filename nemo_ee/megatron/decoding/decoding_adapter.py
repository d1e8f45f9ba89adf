# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`EarlyExitGPTModel` as a `DecodingModel`: half-layer ranges on (sequence, position) rows, and logits of exits.

Megatron's own modules compute norms, linear layers, MLPs and exit heads. Attention over the KV cache and the rotary
embedding are computed by `nemo_ee.generation`, because Megatron's inference contexts keep one offset for a whole
batch and cannot hold ragged sequences.

n rows are passed to Megatron's modules as [n, 1, h]: s = n, b = 1. Under tensor parallelism every rank runs the same
rows with its own heads and gets the same gathered logits, so all ranks take the same decisions.

Exactness: the rotation equals Megatron's bitwise; attention equals Megatron's within the tolerance of the dtype.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import MappingProxyType
from weakref import WeakKeyDictionary

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import LongTensor, Tensor
from torch.nn.functional import linear

from nemo_ee.exits.probe import ExitProbe
from nemo_ee.generation.decoding_model import DecodingModel, ExitPoint, TokenPositions, with_probes
from nemo_ee.generation.kv_cache import KVCache, Placement
from nemo_ee.generation.rotary import RotaryTable, cos_sin, rotate
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel


class MegatronDecodingModel(DecodingModel):
    """A `DecodingModel` over a full-depth `EarlyExitGPTModel` on one pipeline stage.

    Args:
        model: the model, its weights loaded and in the dtype to decode in.
        one_of_many: the model is one of several stages, and this object runs that stage's own half layers and exits
            (`pipelined_decoding` joins the stages).
        probes: the exits' probes by name.

    Attributes:
        num_layers, vocab_size, max_positions, exits, device, exits_with_kv: see `DecodingModel`; exits are the
            stage's own.
        dtype: dtype of hidden states.

    Raises:
        ValueError: the model cannot decode; one message with every reason and the way out.
    """

    def __init__(
        self,
        model: EarlyExitGPTModel,
        *,
        one_of_many: bool = False,
        probes: Mapping[str, ExitProbe] = MappingProxyType({}),
    ) -> None:
        problems = _problems(model, one_of_many)
        if problems:
            raise ValueError("the model cannot decode:\n" + "\n".join(f"  {problem}" for problem in problems))
        self.model = model.eval()
        self.num_layers = model.config.num_layers
        self.vocab_size = model.true_vocab_size
        self.max_positions = model.max_sequence_length
        if model.position_embedding_type == "learned_absolute" and model.pre_process:
            self.max_positions = model.embedding.position_embeddings.num_embeddings
        points = (ExitPoint(exit.name, exit.layer, exit.stop) for exit in model.placement.exits)
        self.exits_with_kv = [exit.name for exit in model.placement.exits if exit.architecture == "layer"]
        weight = next(model.decoder.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        # Hidden states are bitwise equal on all tensor-parallel ranks, as all-reduces are, so probes decide alike.
        self.exits = with_probes(sorted(points, key=lambda point: point.stop), probes, self.device)
        self._rotary = None
        if model.position_embedding_type == "rope":
            # Megatron's own angles, so any scaling of the frequencies is honoured.
            self._rotary = RotaryTable(model.rotary_pos_emb.get_freqs_non_repeated, self.device)
        # Every segment of a forward pass needs the same rotations.
        self._rotations: WeakKeyDictionary[TokenPositions, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def new_cache(self, num_sequences: int, max_length: int, active_exits: tuple[str, ...]) -> KVCache:
        """Keys and values of every layer (slots 1..L) and of every active `layer` exit (slot = its name); of a stage
        of several, those that are its own."""
        attention = self.model.decoder.layers[0].self_attention
        placement = self.model.placement
        own = [exit.name for exit in placement.exits if exit.name in active_exits and exit.architecture == "layer"]
        return KVCache(
            [*range(placement.first_layer, placement.last_layer + 1), *own],
            num_sequences,
            max_length,
            num_kv_heads=attention.num_query_groups_per_partition,
            head_dim=attention.hidden_size_per_attention_head,
            dtype=self.dtype,
            device=self.device,
            checked=True,
        )

    @torch.inference_mode()
    def embed(self, tokens: LongTensor, positions: TokenPositions) -> Tensor:
        """Word embeddings, with learned positions where the model has them. Returns `[n, h]`."""
        return self.model.embedding(input_ids=tokens[None], position_ids=positions.position[None])[:, 0]

    @torch.inference_mode()
    def run(self, hidden: Tensor, positions: TokenPositions, start: int, stop: int, cache: KVCache) -> Tensor:
        """Run the half layers (start, stop]; odd ones are attention, even ones MLPs. `hidden`: `[n, h]`."""
        hidden = hidden[:, None]
        placement, rotation = cache.place(positions), self._rotation(positions)
        for half in range(start + 1, stop + 1):
            index, is_mlp = divmod(half - 1, 2)
            layer = self.model.decoder.layers[index + 1 - self.model.placement.first_layer]
            if is_mlp:
                hidden = layer._forward_mlp(hidden)
            else:
                hidden = self._attention_half(layer, hidden, placement, rotation, cache, index + 1)
        return hidden[:, 0]

    @torch.inference_mode()
    def write_exit_kv(self, name: str, hidden: Tensor, positions: TokenPositions, cache: KVCache) -> None:
        """A `layer` exit writes its keys and values for rows that are not evaluated; other exits do nothing."""
        head = self.model.exits[name]
        if head.exit.architecture == "layer":
            self._write(head.layer, hidden[:, None], cache.place(positions), self._rotation(positions), cache, name)

    @torch.inference_mode()
    def exit_logits(self, name: str | None, hidden: Tensor, positions: TokenPositions, cache: KVCache) -> Tensor:
        """Logits of an exit, or of the final exit (None). Returns `[n, vocab_size]`, fp32, on every rank."""
        hidden = hidden[:, None]
        if name is None:
            norm = self.model.decoder.final_layernorm
            terms = [(hidden if norm is None else norm(hidden), self.model.backbone_output_weight())]
        else:
            head = self.model.exits[name]
            if head.exit.architecture == "layer":
                placement, rotation = cache.place(positions), self._rotation(positions)
                hidden = self._attention_half(head.layer, hidden, placement, rotation, cache, name)
                hidden = head.layer._forward_mlp(hidden)
            terms = head.output_terms(head.after_layer(hidden))
        logits = sum(linear(own, weight) for own, weight in terms)[:, 0]
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            logits = gather_from_tensor_model_parallel_region(logits)  # [n, v/tp] -> [n, v]
        return logits[:, : self.vocab_size].float()

    def _rotation(self, positions: TokenPositions) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of each row; None without rotary embedding."""
        if self._rotary is None:
            return None
        found = self._rotations.get(positions)
        if found is None:
            interleaved = self.model.config.rotary_interleaved
            found = cos_sin(self._rotary.at(positions), interleaved=interleaved, dtype=self.dtype)
            self._rotations[positions] = found
        return found

    def _attention_half(
        self,
        layer: TransformerLayer,
        hidden: Tensor,
        placement: Placement,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KVCache,
        slot: Hashable,
    ) -> Tensor:
        """A layer's attention and residual. `hidden`: `[n, 1, h]`, as is the result."""
        query = self._write(layer, hidden, placement, rotation, cache, slot)
        attended = cache.attend(slot, placement, query, self._scale(layer))  # [n, heads/tp * d]
        update, bias = layer.self_attention.linear_proj(attended[:, None])
        return hidden + (update if bias is None else update + bias)

    def _write(
        self,
        layer: TransformerLayer,
        hidden: Tensor,
        placement: Placement,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KVCache,
        slot: Hashable,
    ) -> Tensor:
        """Write a layer's keys and values for `hidden` `[n, 1, h]`. Returns its queries, `[n, heads/tp, d]`."""
        attention = layer.self_attention
        # Under Transformer Engine the norm is fused into the projection and this one is the identity.
        query, key, value = attention.get_query_key_value_tensors(layer.input_layernorm(hidden))
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if rotation is not None:
            # Queries and keys in one go: decoding one token at a time is bound by the number of operations.
            both = rotate(torch.cat((query, key), dim=1), *rotation, interleaved=self.model.config.rotary_interleaved)
            query, key = both.split((query.shape[1], key.shape[1]), dim=1)
        cache.write(slot, placement, torch.cat((key, value), dim=1))
        return query

    def _scale(self, layer: TransformerLayer) -> float:
        own = self.model.config.softmax_scale
        return layer.self_attention.hidden_size_per_attention_head**-0.5 if own is None else own


def _problems(model: EarlyExitGPTModel, one_of_many: bool) -> list[str]:
    """Why this model cannot decode, with the way out."""
    config, problems = model.config, []
    if config.pipeline_model_parallel_size > 1:
        if not one_of_many:
            problems.append(
                f"pipeline_model_parallel_size={config.pipeline_model_parallel_size}: this is one stage of several; "
                "join them with nemo_ee.megatron.decoding.pipelined_decoding.open_decoding_model"
            )
    elif len(model.decoder.layers) < config.num_layers or not model.post_process:
        problems.append(
            f"only {len(model.decoder.layers)} of {config.num_layers} layers and "
            f"{'the' if model.post_process else 'no'} final exit were built; build the model with full_depth=True"
        )
    if config.sequence_parallel:
        problems.append(
            "sequence_parallel=True shards a sequence that decoding sees one token at a time; set it to False "
            "(the checkpoint does not depend on it)"
        )
    if config.context_parallel_size > 1:
        problems.append(f"context_parallel_size={config.context_parallel_size} is not supported; set it to 1")
    if config.window_size is not None:
        problems.append(f"window_size={config.window_size}: sliding-window attention is not supported; set it to null")
    if config.multi_latent_attention:
        problems.append("multi_latent_attention=True is not supported")
    if config.no_rope_freq:
        problems.append(f"no_rope_freq={config.no_rope_freq}: layers without rotary embedding are not supported")
    if model.position_embedding_type not in ("rope", "learned_absolute", "none"):
        problems.append(
            f"position_embedding_type={model.position_embedding_type!r} is not supported; "
            "use rope, learned_absolute or none"
        )
    return problems
