# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A plain-torch reader of TensorRT-LLM unified checkpoints. It is not TensorRT-LLM.

Written from the format's description alone: which names and shapes a stock class asks for (`stock_tensors`), and what
it computes, rank by rank with the all-reduces as sums (`reference_logits`), so that a wrong shard gives wrong logits.
Uses nothing of nemo_ee.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def read_ranks(folder: Path) -> list[dict[str, Tensor]]:
    """The tensors of every rank's file; there must be exactly as many files as ranks."""
    world = read_config(folder)["mapping"]["world_size"]
    ranks = {f"rank{r}.safetensors" for r in range(world)}
    assert {f.name for f in folder.iterdir()} == {"config.json", "generation_config.json", *ranks}
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(world)]


def _layer_tensors(c: dict[str, Any], tp: int) -> dict[str, tuple[int, ...]]:
    """Names and per-rank shapes of one layer, by the table of the format."""
    h, f, d = c["hidden_size"], c["intermediate_size"] // tp, c["head_size"]
    q, kv = c["num_attention_heads"] // tp, max(c["num_key_value_heads"] // tp, 1)
    llama = c["architecture"] in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
    tensors = {
        "input_layernorm.weight": (h,), "attention.qkv.weight": ((q + 2 * kv) * d, h),
        "attention.dense.weight": (h, q * d), "post_layernorm.weight": (h,),
        "mlp.fc.weight": (f, h), "mlp.proj.weight": (h, f),
    }  # fmt: skip
    if llama:
        tensors["mlp.gate.weight"] = (f, h)
        if c.get("qwen_type") == "qwen3":
            tensors |= {"attention.q_layernorm.weight": (d,), "attention.k_layernorm.weight": (d,)}
        attention, dense, mlp = c["attn_bias"], c["attn_bias"] and "Qwen2" not in c["architecture"], c["mlp_bias"]
    else:
        tensors |= {"input_layernorm.bias": (h,), "post_layernorm.bias": (h,)}
        attention = dense = mlp = c.get("bias", True)
    if attention:
        tensors["attention.qkv.bias"] = ((q + 2 * kv) * d,)
    if dense:
        tensors["attention.dense.bias"] = (h,)
    if mlp:
        tensors |= {"mlp.fc.bias": (f,), "mlp.proj.bias": (h,)} | ({"mlp.gate.bias": (f,)} if llama else {})
    return tensors


def stock_tensors(c: dict[str, Any], rank: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything the stock class of a config asks for on one rank."""
    tp, pp = c["mapping"]["tp_size"], c["mapping"]["pp_size"]
    stage, h, v = rank // tp, c["hidden_size"], c["vocab_size"]
    tensors: dict[str, tuple[int, ...]] = {}
    for local in range(c["num_hidden_layers"] // pp):
        tensors |= {f"transformer.layers.{local}.{name}": s for name, s in _layer_tensors(c, tp).items()}
    if stage == 0:
        tensors["transformer.vocab_embedding.weight"] = (v, h)
        if c["position_embedding_type"] == "learned_absolute":
            tensors["transformer.position_embedding.weight"] = (c["max_position_embeddings"], h)
    if stage == pp - 1:
        tensors["transformer.ln_f.weight"] = (h,)
        if c["architecture"] in ("GPTForCausalLM", "OPTForCausalLM"):
            tensors["transformer.ln_f.bias"] = (h,)
        # A loader may point a missing output at the embedding, if that is on the same rank.
        if not (c["tie_word_embeddings"] and tp * pp == 1):
            tensors["lm_head.weight"] = (math.ceil(v / tp), h)
    return tensors


def _norm(c: dict[str, Any], weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if bias is not None:
        return functional.layer_norm(x, x.shape[-1:], weight, bias, c["norm_epsilon"])
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + c["norm_epsilon"]) * weight


def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _all_reduce(ranks: list[dict[str, Tensor]], name: str, inputs: list[Tensor]) -> Tensor:
    """A row-parallel linear: partial products summed, the bias once."""
    result = sum(x @ weights[f"{name}.weight"].t() for weights, x in zip(ranks, inputs, strict=True))
    bias = ranks[0].get(f"{name}.bias")
    return result if bias is None else result + bias


def _inverse_frequencies(c: dict[str, Any]) -> Tensor:
    d = c["head_size"]
    frequencies = 1.0 / c["rotary_base"] ** (torch.arange(0, d, 2).float() / d)
    scaling = c["rotary_scaling"]
    if scaling is None:
        return frequencies
    if scaling["type"] == "linear":
        return frequencies / scaling["factor"]
    assert scaling["type"] == "llama3"
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


def _rotated(c: dict[str, Any], x: Tensor) -> Tensor:
    """[b, heads, s, d], positions 0..s-1, the two halves of a head paired (neox)."""
    angles = torch.arange(x.shape[2]).float()[:, None] * _inverse_frequencies(c)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention(c: dict[str, Any], ranks: list[dict[str, Tensor]], prefix: str, x: Tensor) -> Tensor:
    """Attention with its norm and residual. `[b, s, h]` -> `[b, s, h]`; `ranks`: one stage's tensor-parallel ranks."""
    d, tp, outputs = c["head_size"], len(ranks), []
    heads, groups = c["num_attention_heads"] // tp, max(c["num_key_value_heads"] // tp, 1)
    for weights in ranks:
        qkv = _linear(weights, f"{prefix}attention.qkv", _norm(c, weights, f"{prefix}input_layernorm", x))
        q, k, v = (part.unflatten(-1, (-1, d)).transpose(1, 2) for part in qkv.split(
            [heads * d, groups * d, groups * d], dim=-1))  # fmt: skip
        if c.get("qwen_type") == "qwen3":
            q, k = (_norm(c, weights, f"{prefix}attention.{n}_layernorm", x) for n, x in (("q", q), ("k", k)))
        if c["position_embedding_type"] == "rope_gpt_neox":
            q, k = _rotated(c, q), _rotated(c, k)
        k, v = (part.repeat_interleave(heads // groups, dim=1) for part in (k, v))
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return x + _all_reduce(ranks, f"{prefix}attention.dense", outputs)


def mlp(c: dict[str, Any], ranks: list[dict[str, Tensor]], prefix: str, x: Tensor) -> Tensor:
    """MLP with its norm and residual."""
    act = {"silu": functional.silu, "relu": functional.relu}.get(
        c["hidden_act"], lambda y: functional.gelu(y, approximate="tanh")
    )
    inner = []
    for weights in ranks:
        source = _norm(c, weights, f"{prefix}post_layernorm", x)
        hidden = act(_linear(weights, f"{prefix}mlp.fc", source))
        gated = f"{prefix}mlp.gate.weight" in weights
        inner.append(hidden * _linear(weights, f"{prefix}mlp.gate", source) if gated else hidden)
    return x + _all_reduce(ranks, f"{prefix}mlp.proj", inner)


def project(c: dict[str, Any], ranks: list[dict[str, Tensor]], name: str, x: Tensor) -> Tensor:
    """A vocabulary-parallel projection, gathered and cut to the vocabulary."""
    parts = [x @ weights[f"{name}.weight"].t() for weights in ranks]
    padding = torch.cat([weights[f"{name}.weight"] for weights in ranks])[c["vocab_size"] :]
    assert not padding.any()
    return torch.cat(parts, dim=-1)[..., : c["vocab_size"]]


def hidden_states(folder: Path, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states after every layer (entry 0: embeddings), and after every layer's attention."""
    c, ranks = read_config(folder), _float_ranks(folder)
    tp, pp = c["mapping"]["tp_size"], c["mapping"]["pp_size"]
    first = ranks[0]
    x = first["transformer.vocab_embedding.weight"][tokens]
    if "transformer.position_embedding.weight" in first:
        x = x + first["transformer.position_embedding.weight"][: tokens.shape[1]]
    after_layer, after_attention = [x], []
    for stage in range(pp):
        local = ranks[stage * tp : (stage + 1) * tp]
        for layer in range(c["num_hidden_layers"] // pp):
            prefix = f"transformer.layers.{layer}."
            after_attention.append(attention(c, local, prefix, after_layer[-1]))
            after_layer.append(mlp(c, local, prefix, after_attention[-1]))
    return after_layer, after_attention


def _float_ranks(folder: Path) -> list[dict[str, Tensor]]:
    return [{name: tensor.float() for name, tensor in rank.items()} for rank in read_ranks(folder)]


@torch.no_grad()
def reference_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits [b, s, v] of tokens [b, s], as the stock class of the directory's config computes them, in fp32."""
    c, ranks = read_config(folder), _float_ranks(folder)
    last = ranks[-c["mapping"]["tp_size"] :]
    x = _norm(c, last[0], "transformer.ln_f", hidden_states(folder, tokens)[0][-1])
    if "lm_head.weight" not in last[0]:
        return x @ ranks[0]["transformer.vocab_embedding.weight"].t()
    return project(c, last, "lm_head", x)


@torch.no_grad()
def reference_exit_logits(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """Exit name -> logits, from the exit tensors that are carried along and the table in config.json."""
    c, ranks = read_config(folder), _float_ranks(folder)
    tp, result = c["mapping"]["tp_size"], {}
    after_layer, after_attention = hidden_states(folder, tokens)
    for exit in c["early_exit"]["exits"]:
        local = ranks[exit["pipeline_rank"] * tp : (exit["pipeline_rank"] + 1) * tp]
        prefix, x = exit["tensors"], after_layer[exit["layer"]]
        if exit["architecture"] == "mlp":
            x = mlp(c, local, prefix, after_attention[exit["layer"] - 1])
        if exit["architecture"] == "layer":
            x = mlp(c, local, f"{prefix}layer.", attention(c, local, f"{prefix}layer.", x))
        if exit["architecture"] != "embedding":
            x = _norm(c, local[0], f"{prefix}norm", x)
        if exit["output"] == "own":
            result[exit["name"]] = project(c, local, f"{prefix}unembed", x)
        elif "lm_head.weight" in ranks[-1]:
            result[exit["name"]] = project(c, ranks[-tp:], "lm_head", x)
        else:
            result[exit["name"]] = x @ ranks[0]["transformer.vocab_embedding.weight"].t()
    return result
