# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The baseline of decoding: the reference model in a bare PyTorch loop, greedy, one sequence.

Only the work that a token needs: fused projections, rotary embedding (Su et al., arXiv 2104.09864), a preallocated
key/value cache, attention, SwiGLU, argmax. No exits, no options, fp32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

REFERENCE_MODEL = Path(__file__).resolve().parents[1] / "assets" / "reference-model"


class PlainDecoder:
    """A Llama directory of one safetensors file with as many key/value heads as heads, as the reference model is.

    Args:
        directory: a model directory in Hugging Face format.
        max_length: largest number of positions.
    """

    def __init__(self, directory: Path = REFERENCE_MODEL, max_length: int = 1024) -> None:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        weights = {name: own.float() for name, own in load_file(directory / "model.safetensors").items()}
        assert config["num_attention_heads"] == config["num_key_value_heads"], "one key/value head for each head"
        self.heads, self.dim, self.eps = config["num_attention_heads"], config["head_dim"], config["rms_norm_eps"]
        self.embedding, self.output = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
        self.norm = weights["model.norm.weight"]
        self.layers = [self._layer(weights, f"model.layers.{i}.") for i in range(config["num_hidden_layers"])]
        self.cache = torch.zeros(len(self.layers), 2, self.heads, max_length, self.dim)
        frequencies = config["rope_theta"] ** (-torch.arange(0, self.dim, 2) / self.dim)
        angles = torch.outer(torch.arange(max_length), frequencies).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()  # [max_length, d]

    @staticmethod
    def _layer(weights: dict[str, Tensor], prefix: str) -> tuple[Tensor, ...]:
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return (
            weights[prefix + "input_layernorm.weight"],
            torch.cat([weights[f"{attention}{name}_proj.weight"] for name in "qkv"]),
            weights[attention + "o_proj.weight"],
            weights[prefix + "post_attention_layernorm.weight"],
            torch.cat([weights[f"{mlp}{name}_proj.weight"] for name in ("gate", "up")]),
            weights[mlp + "down_proj.weight"],
        )

    @torch.inference_mode()
    def next_token(self, tokens: Sequence[int], position: int) -> int:
        """Run tokens at `position` and the positions after it; returns the most likely next token."""
        end = position + len(tokens)
        hidden = self.embedding[torch.tensor(tokens)]  # [n, h]
        cos, sin = self.cos[position:end], self.sin[position:end]
        for (norm, qkv, out, mlp_norm, gate_up, down), cache in zip(self.layers, self.cache, strict=True):
            mixed = F.rms_norm(hidden, norm.shape, norm, self.eps) @ qkv.T
            query, key, value = mixed.view(len(tokens), 3, self.heads, self.dim).permute(1, 2, 0, 3)  # [heads, n, d]
            query, key = (own * cos + _half_turned(own) * sin for own in (query, key))
            cache[0, :, position:end], cache[1, :, position:end] = key, value
            keys, values = cache[:, :, :end]
            # A prompt begins at position 0, so torch's causal mask is the right one.
            attended = F.scaled_dot_product_attention(query, keys, values, is_causal=len(tokens) > 1)
            hidden = hidden + attended.transpose(0, 1).flatten(1) @ out.T
            gate, up = (F.rms_norm(hidden, mlp_norm.shape, mlp_norm, self.eps) @ gate_up.T).chunk(2, dim=1)
            hidden = hidden + (F.silu(gate) * up) @ down.T
        return int((F.rms_norm(hidden[-1], self.norm.shape, self.norm, self.eps) @ self.output.T).argmax())


def _half_turned(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
