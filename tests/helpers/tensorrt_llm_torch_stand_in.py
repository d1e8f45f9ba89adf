# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A stand-in, not TensorRT-LLM: the part of its PyTorch backend that the exported model file uses, eager, on the CPU.

Written from TensorRT-LLM's sources of 1.0 to 1.2 (names, arguments, when weights are made, how they are loaded). As
there, weights exist only after `__post_init__`, `load_weights` goes by module paths, and the cache manager has one
length for all layers: `Session.step` fails when a layer did not get keys and values for a new token.

One rank only. `installed()` puts it into `sys.modules`.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

counts: Counter[str] = Counter()
lines: list[str] = []  # what was logged
MODEL_CLASS_MAPPING: dict[str, type] = {}


def register_auto_model(name: str) -> Any:
    def decorator(cls: type) -> type:
        MODEL_CLASS_MAPPING[name] = cls
        return cls

    return decorator


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


class Attention(nn.Module):
    """`attn_metadata.sequences`: (sequence, first position, number of tokens) of the packed rows."""

    def __init__(self, config: Any, index: int, bias: bool, dense_bias: bool) -> None:
        super().__init__()
        self.index, self.config = index, config
        self.d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads * self.d
        self.qkv_proj = Linear(config.hidden_size, heads + 2 * config.num_key_value_heads * self.d, bias)
        self.o_proj = Linear(heads, config.hidden_size, dense_bias)
        self.q_norm = self.k_norm = None
        if config.model_type == "qwen3":
            norm = {"hidden_size": self.d, "eps": config.rms_norm_eps, "dtype": config.torch_dtype}
            self.q_norm, self.k_norm = RMSNorm(**norm), RMSNorm(**norm)

    def forward(self, position_ids: Tensor, hidden_states: Tensor, attn_metadata: Any, **kwargs: Any) -> Tensor:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

        counts["attention"] += 1
        c, results, row = self.config, [], 0
        groups = c.num_attention_heads // c.num_key_value_heads
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.d)).transpose(0, 1)  # [H + 2K, tokens, d]
        q, k, v = heads.split([c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads])
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = LlamaRotaryEmbedding(c)(hidden_states, position_ids)
        q, k = (part[0] for part in apply_rotary_pos_emb(q[None], k[None], cos, sin))
        for sequence, first, count in attn_metadata.sequences:
            rows = slice(row, row + count)
            own = attn_metadata.kv_cache_manager[self.index].setdefault(sequence, [k[:, :0], v[:, :0]])
            assert own[0].shape[1] == first
            own[:] = torch.cat((own[0], k[:, rows]), 1), torch.cat((own[1], v[:, rows]), 1)
            keys, values = (side.repeat_interleave(groups, 0) for side in own)
            mask = torch.arange(first + count) <= torch.arange(first, first + count)[:, None]
            attended = F.scaled_dot_product_attention(q[None, :, rows], keys[None], values[None], mask)
            results.append(attended[0].transpose(0, 1).flatten(1))
            row += count
        return self.o_proj(torch.cat(results))


class LogitsProcessor(nn.Module):
    def forward(self, hidden: Tensor, lm_head: nn.Module, attn_metadata: Any, return_context_logits: bool) -> Tensor:
        if attn_metadata.num_contexts and not return_context_logits:
            hidden = hidden[torch.tensor([count for _, _, count in attn_metadata.sequences]).cumsum(0) - 1]
        return lm_head(hidden).float()


# -- _torch.models -------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    def __init__(self, config: Any, index: int, bias: bool, dense_bias: bool) -> None:
        super().__init__()
        norm = {"hidden_size": config.hidden_size, "eps": config.rms_norm_eps, "dtype": config.torch_dtype}
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(**norm), RMSNorm(**norm)
        self.self_attn = Attention(config, index, bias, dense_bias)
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
            [_Layer(c, i, bias, bias and not self.qwen) for i in range(c.num_hidden_layers)]
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


# -- the executor --------------------------------------------------------------------------------------------------


class Session:
    """Load a directory with whatever class is registered for it; run steps of packed tokens, prompts first.

    Args:
        trust_remote_code: the backend's loader passes True, so that the config's class comes out of the directory.
        mapping: of TensorRT-LLM's `Mapping`.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = True, **mapping: Any) -> None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        assert (type(config).__name__ == "EarlyExitConfig") == trust_remote_code
        sizes = SimpleNamespace(**{"tp_size": 1, "pp_size": 1, "enable_attention_dp": False, **mapping})
        cls = MODEL_CLASS_MAPPING[config.architectures[0]]
        self.model = cls(SimpleNamespace(pretrained_config=config, mapping=sizes))
        weights: dict[str, Tensor] = {}
        for file in folder.glob("*.safetensors"):
            weights |= load_file(file)
        self.model.load_weights(weights)
        assert not any(p.isnan().any() for p in self.model.parameters()), "a parameter that nothing was loaded into"
        self.caches: list[dict] = [{} for _ in range(config.num_hidden_layers)]

    @torch.no_grad()
    def step(self, tokens: Mapping[int, tuple[int, Sequence[int]]], **metadata: Any) -> Tensor:
        """Sequence -> (first position, tokens). Returns logits `[sequences, v]`."""
        sequences = [(sequence, first, len(own)) for sequence, (first, own) in tokens.items()]
        contexts = sum(first == 0 for _, first, _ in sequences)
        attn_metadata = SimpleNamespace(
            sequences=sequences, num_contexts=contexts, kv_cache_manager=self.caches, is_cuda_graph=False
        )
        vars(attn_metadata).update(metadata)
        logits = self.model(
            attn_metadata=attn_metadata,
            input_ids=torch.tensor([t for _, own in tokens.values() for t in own]),
            position_ids=torch.cat([torch.arange(first, first + n) for _, first, n in sequences])[None],
        )
        for sequence, first, count in sequences:
            lengths = {cache[sequence][0].shape[1] for cache in self.caches}
            assert lengths == {first + count}, "all layers have the same length"
        return logits


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """`import tensorrt_llm` finds the stand-in inside this context, with the stock classes registered."""
    parts = {
        "": {},
        ".logger": {"logger": SimpleNamespace(info=lines.append)},
        "._torch": {},
        "._torch.models": {},
        "._torch.models.modeling_utils": {
            "MODEL_CLASS_MAPPING": MODEL_CLASS_MAPPING, "register_auto_model": register_auto_model,
        },
        "._torch.modules": {},
        "._torch.modules.embedding": {"LMHead": LMHead},
        "._torch.modules.gated_mlp": {"GatedMLP": GatedMLP},
        "._torch.modules.linear": {"TensorParallelMode": SimpleNamespace(COLUMN="column")},
        "._torch.modules.rms_norm": {"RMSNorm": RMSNorm},
    }  # fmt: skip
    names = [f"tensorrt_llm{part}" for part in parts]
    assert not any(name in sys.modules for name in names), "a real tensorrt_llm is here"
    try:
        for part, contents in parts.items():
            module = ModuleType(f"tensorrt_llm{part}")
            module.__spec__, module.__path__ = ModuleSpec(module.__name__, None), []
            vars(module).update(contents)
            sys.modules[module.__name__] = module
        for stock in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM):
            register_auto_model(stock.__name__)(stock)
        yield
    finally:
        MODEL_CLASS_MAPPING.clear()
        for name in names:
            sys.modules.pop(name, None)
