# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A stand-in, not TensorRT-LLM: the part of its PyTorch backend that the exported model file uses, eager, on the CPU.

Written from TensorRT-LLM's sources (names, arguments, when weights are made, how they are loaded). As there, weights
exist only after `__post_init__`, and `load_weights` goes by module paths. tensorrt_llm_executor_stand_in.py loads and
runs the models, and says which of two APIs is followed.

Attention backends: TRTLLM takes fused query, key and value, rotates them unless the model does, and writes and attends
in one call. FLASHINFER takes them rotated and apart, and has pages. One rank only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

api = "1.2"  # or "1.4"; set by the executor
counts: Counter[str] = Counter()
lines: list[str] = []  # what was logged
MODEL_CLASS_MAPPING: dict[str, type] = {}


def register_auto_model(name: str) -> Any:
    def decorator(cls: type) -> type:
        MODEL_CLASS_MAPPING[name] = cls
        return cls

    return decorator


def get_registered_model_class(name: str) -> type | None:
    """1.4: a stock class fills its slot only if it is empty, so a class from outside wins."""
    if name in stock_classes:
        MODEL_CLASS_MAPPING.setdefault(name, stock_classes[name])
    return MODEL_CLASS_MAPPING.get(name)


# -- _torch.modules ------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.sizes, self.has_bias = (out_features, in_features), bias

    def create_weights(self) -> None:
        self.weight = nn.Parameter(torch.full(self.sizes, math.nan))
        self.bias = nn.Parameter(torch.full(self.sizes[:1], math.nan)) if self.has_bias else None

    def load_weights(self, weights: list[Mapping[str, Tensor]]) -> None:
        self.weight.data.copy_(torch.cat([part["weight"] for part in weights]))
        if self.has_bias:
            self.bias.data.copy_(torch.cat([part["bias"] for part in weights]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LMHead(Linear):
    def __init__(self, num_embeddings, embedding_dim, dtype=None, mapping=None, tensor_parallel_mode=None,
                 gather_output=False) -> None:  # fmt: skip
        assert tensor_parallel_mode == "column" and gather_output
        super().__init__(embedding_dim, num_embeddings)


class Embedding(Linear):
    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class RMSNorm(nn.Module):
    def __init__(self, *, hidden_size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((hidden_size,), math.nan)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GatedMLP(nn.Module):
    def __init__(self, *, hidden_size: int, intermediate_size: int, bias: bool, dtype=None, config=None) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        counts["mlp"] += 1
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class _OutputProjection(Linear):
    def forward(self, x: Tensor) -> Tensor:
        counts["o_proj"] += 1
        return super().forward(x)


class _Backend:
    """An attention backend of 1.2. `attend` writes the new keys and values, then attends."""

    def __init__(self, config: Any, layer_idx: int, head_dim: int, rotates: bool) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.layer_idx, self.head_dim, self.rotates = layer_idx, head_dim, rotates
        self.rotary = LlamaRotaryEmbedding(config)
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads

    def forward(self, q, k, v, metadata, *, attention_mask="causal", attention_window_size=None) -> Tensor:
        return self.attend(q, k, v, metadata)

    def rotated(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """`[tokens, heads * head_dim]`"""
        from transformers.models.llama.modeling_llama import rotate_half

        cos, sin = (table[0, :, None] for table in self.rotary(x, position_ids))
        heads = x.unflatten(-1, (-1, self.head_dim))
        return (heads * cos + rotate_half(heads) * sin).flatten(1)

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, metadata: Any) -> Tensor:
        counts["attention"] += 1
        if k is None:
            kv = self.num_kv_heads * self.head_dim
            q, k, v = q.split([self.num_heads * self.head_dim, kv, kv], -1)
        if self.rotates:
            q, k = (self.rotated(x, metadata.positions[None]) for x in (q, k))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        cache, results, row = metadata.kv_cache_manager, [], 0
        for sequence, first, count in metadata.sequences:
            rows = slice(row, row + count)
            cache.write(self.layer_idx, sequence, first, k[rows], v[rows])
            keys, values = cache.read(self.layer_idx, sequence, first + count)
            keys, values = (x.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for x in (keys, values))
            mask = torch.arange(first + count) <= torch.arange(first, first + count)[:, None]
            attended = F.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (q[rows], keys, values)), mask
            )
            results.append(attended[0].transpose(0, 1).flatten(1))
            row += count
        return torch.cat(results)


class _NewBackend(_Backend):
    """An attention backend of 1.4."""

    def forward(self, q, k, v, metadata, forward_args=None) -> Tensor:
        return self.attend(q, k, v, metadata)


class Attention(nn.Module):
    """`attn_metadata.sequences`: (sequence, first position, number of tokens) of the packed rows."""

    def __init__(self, model_config: Any, index: int, bias: bool, dense_bias: bool) -> None:
        super().__init__()
        config = model_config.pretrained_config
        self.attn_backend, self.quant_config = model_config.attn_backend, model_config.quant_config
        self.d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads, self.kv_size = config.num_attention_heads * self.d, config.num_key_value_heads * self.d
        self.qkv_proj = Linear(config.hidden_size, heads + 2 * self.kv_size, bias)
        self.o_proj = _OutputProjection(heads, config.hidden_size, dense_bias)
        self.fused_norm = config.model_type == "qwen3"  # QKNormRoPEAttention: norms and rotation are one operation
        if self.fused_norm:
            norm = {"hidden_size": self.d, "eps": config.rms_norm_eps, "dtype": config.torch_dtype}
            self.q_norm, self.k_norm = RMSNorm(**norm), RMSNorm(**norm)
        self.fused = self.attn_backend == "TRTLLM"
        backend = _Backend if api == "1.2" else _NewBackend
        self.attn = backend(config, index, self.d, rotates=self.fused and not self.fused_norm)

    def split_qkv(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q.split([q.shape[-1] - 2 * self.kv_size, self.kv_size, self.kv_size], -1)

    def apply_rope(self, q: Tensor, k: Tensor | None, v: Tensor | None, position_ids: Tensor) -> tuple:
        if self.attn.rotates:
            return q, k, v
        q, k, v = self.split_qkv(q) if k is None else (q, k, v)
        if self.fused_norm:
            q, k = (n(x.unflatten(-1, (-1, self.d))).flatten(1) for n, x in ((self.q_norm, q), (self.k_norm, k)))
        q, k = (self.attn.rotated(x, position_ids) for x in (q, k))
        return (torch.cat((q, k, v), -1), None, None) if self.fused_norm else (q, k, v)

    def convert_qkv(self, q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple:
        if k is None and not self.fused:
            return self.split_qkv(q)
        return (torch.cat((q, k, v), -1), None, None) if k is not None and self.fused else (q, k, v)

    def forward(self, position_ids: Tensor, hidden_states: Tensor, attn_metadata: Any, **kwargs: Any) -> Tensor:
        q, k, v = self.convert_qkv(*self.apply_rope(self.qkv_proj(hidden_states), None, None, position_ids))
        options = {"attention_mask": "causal"} if api == "1.2" else {"forward_args": SimpleNamespace()}
        return self.o_proj(self.attn.forward(q, k, v, attn_metadata, **options))


class LogitsProcessor(nn.Module):
    def forward(self, hidden: Tensor, lm_head: nn.Module, attn_metadata: Any, return_context_logits: bool) -> Tensor:
        if attn_metadata.num_contexts and not return_context_logits:
            hidden = hidden[torch.tensor([count for _, _, count in attn_metadata.sequences]).cumsum(0) - 1]
        return lm_head(hidden).float()


# -- _torch.models -------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    def __init__(self, model_config: Any, index: int, bias: bool, dense_bias: bool) -> None:
        super().__init__()
        config = model_config.pretrained_config
        norm = {"hidden_size": config.hidden_size, "eps": config.rms_norm_eps, "dtype": config.torch_dtype}
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(**norm), RMSNorm(**norm)
        self.self_attn = Attention(model_config, index, bias, dense_bias)
        mlp_bias = getattr(config, "mlp_bias", False)
        self.mlp = GatedMLP(hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, bias=mlp_bias)


class _PostInit(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__call__(*args, **kwargs)
        for module in model.modules():
            if callable(getattr(module, "create_weights", None)):
                module.create_weights()
        return model


class Stock(nn.Module, metaclass=_PostInit):
    """What the stock classes have in common; the prompt goes through `forward`."""

    qwen = False

    def __init__(self, model_config: Any) -> None:
        super().__init__()
        self.model_config = model_config
        c = model_config.pretrained_config
        bias = getattr(c, "attention_bias", False) or self.qwen
        self.model = nn.Module()
        self.model.embed_tokens = Embedding(c.hidden_size, c.vocab_size)
        self.model.layers = nn.ModuleList(
            [_Layer(model_config, i, bias, bias and not self.qwen) for i in range(c.num_hidden_layers)]
        )
        self.model.norm = RMSNorm(hidden_size=c.hidden_size, eps=c.rms_norm_eps, dtype=c.torch_dtype)
        self.lm_head = LMHead(c.vocab_size, c.hidden_size, tensor_parallel_mode="column", gather_output=True)
        self.logits_processor = LogitsProcessor()

    @property
    def config(self) -> Any:
        return self.model_config.pretrained_config

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
        for name, module in self.named_modules():
            if not module._parameters or (self.config.tie_word_embeddings and name == "lm_head"):
                continue
            *above, last = name.split(".")
            parts = []
            for each in fused.get(last, [last]):
                prefix = ".".join([*above, each]) + "."
                parts.append({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
            if hasattr(module, "load_weights"):
                module.load_weights(parts)
            else:
                module.weight.data.copy_(parts[0]["weight"])
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, attn_metadata, input_ids=None, position_ids=None, inputs_embeds=None,
                return_context_logits=False, spec_metadata=None, **kwargs) -> Tensor:  # fmt: skip
        counts["stock"] += 1
        hidden = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            hidden = hidden + layer.self_attn(position_ids, layer.input_layernorm(hidden), attn_metadata)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.logits_processor.forward(
            self.model.norm(hidden), self.lm_head, attn_metadata, return_context_logits
        )


class LlamaForCausalLM(Stock):
    pass


class MistralForCausalLM(Stock):
    pass


class Qwen2ForCausalLM(Stock):
    qwen = True


class Qwen3ForCausalLM(Stock):
    pass


# name -> class, of those that this TensorRT-LLM has
stock_classes: dict[str, type] = {
    cls.__name__: cls for cls in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
}
