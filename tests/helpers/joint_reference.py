# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients of joint training by `transformers` and plain autograd, one process, all logits at once.

The exits are copies of the transformers model's own modules, which is what `init: copy` means, so an exit's gradients
have a place in a transformers model of the same shape. Gradients are written as the weights of such models and read
back under Megatron's names by the converter, which has tests of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class _Parts:
    """Where a family keeps what exits are copied from."""

    def __init__(self, model: nn.Module) -> None:
        gpt2 = model.config.model_type == "gpt2"
        body = model.transformer if gpt2 else model.model
        self.layers = body.h if gpt2 else body.layers
        self.final_norm = body.ln_f if gpt2 else body.norm
        self.head = model.lm_head

    def mlp_norm(self, layer: int) -> nn.Module:
        block = self.layers[layer - 1]
        return block.ln_2 if hasattr(block, "ln_2") else block.post_attention_layernorm

    def mlp(self, layer: int) -> nn.Module:
        return self.layers[layer - 1].mlp


def _summed_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    losses = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum()


class JointReference:
    """A transformers model with exits.

    Args:
        model: a `...ForCausalLM`; its own parameters train.
        exits: entries of the `exits` block with name, layer, architecture (not `embedding`), init copy, output own or
            shared.
    """

    def __init__(self, model: nn.Module, exits: Sequence[Mapping[str, Any]]) -> None:
        self.model, self.exits = model, [dict(exit) for exit in exits]
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # transformers gives the padding token's row no gradient
        self.copies: dict[str, nn.Module] = {}
        for exit in self.exits:
            whole = copy.deepcopy(model)  # the exit's own parameters sit where they were copied from
            if exit.get("output") == "shared":
                whole.lm_head = model.lm_head
            _Parts(whole).mlp_norm(exit["layer"]).requires_grad_(exit["architecture"] == "layer")
            self.copies[exit["name"]] = whole

    def losses(self, tokens: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Name -> summed loss with graph, `full_model` last."""
        before_mlp: dict[int, Tensor] = {}
        after: dict[int, Tensor] = {}
        inside: dict[int, tuple] = {}
        parts = _Parts(self.model)
        hooks = []
        for index, layer in enumerate(parts.layers, 1):

            def keep_input(_, inputs, index=index):
                before_mlp[index] = inputs[0]

            def keep_output(_, args, kwargs, output, index=index):
                after[index], inside[index] = output[0], (args, kwargs)

            hooks.append(parts.mlp_norm(index).register_forward_pre_hook(keep_input))
            hooks.append(layer.register_forward_hook(keep_output, with_kwargs=True))
        logits = self.model(input_ids=tokens, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        result = {}
        for exit in self.exits:
            own, k = _Parts(self.copies[exit["name"]]), exit["layer"]
            if exit["architecture"] == "mlp":
                hidden = before_mlp[k] + own.mlp(k)(own.mlp_norm(k)(before_mlp[k]))
            elif exit["architecture"] == "layer":
                args, kwargs = inside[len(parts.layers)]  # mask and positions, as the last layer got them
                hidden = own.layers[-1](after[k], *args[1:], **kwargs)[0]
            else:
                hidden = after[k]
            result[exit["name"]] = _summed_loss(own.head(own.final_norm(hidden)), labels, mask)
        result["full_model"] = _summed_loss(logits, labels, mask)
        return result

    def gradients(
        self, batches: Sequence[tuple[Tensor, Tensor, Tensor]], weights: Mapping[str, float], folder: Path
    ) -> dict[str, float]:
        """Write the gradients of the joint objective over all batches; returns each loss per token.

        Args:
            batches: (tokens, labels, mask), each [b, s].
            weights: exit name -> loss weight.
            folder: gets `full_model/` and a directory per exit, transformers models whose weights are gradients.
        """
        tokens = sum(mask.sum() for _, _, mask in batches)
        sums: dict[str, Tensor] = {}
        for batch in batches:
            for name, loss in self.losses(*batch).items():
                sums[name] = sums.get(name, 0.0) + loss / tokens
        sum(weights.get(name, 1.0) * loss for name, loss in sums.items()).backward()
        for name, model in {"full_model": self.model, **self.copies}.items():
            written = copy.deepcopy(model)
            with torch.no_grad():
                for target, source in zip(written.parameters(), model.parameters(), strict=True):
                    target.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
            written.save_pretrained(folder / name)
        return {name: loss.item() for name, loss in sums.items()}
