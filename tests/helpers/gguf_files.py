# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""GGUF files of tiny models, written with the `gguf` package: its names of tensors and keys, and naive loops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gpt2": "GPT2"}
FAMILIES_OF_LLAMA_CPP = tuple(ARCHITECTURES)


def plain_tokenizer(count: int) -> dict[str, Any]:
    """The keys of a tokenizer without merges."""
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": [f"t{i}" for i in range(count)], "token_type": [1] * count}
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | {"eos_token_id": 1}).items()}


def neighbours_paired(rows: Tensor, head_size: int) -> Tensor:
    """Rows 0, d/2, 1, d/2 + 1, ... of every head, as llama.cpp's Llama stores queries and keys."""
    order = [
        head + index // 2 + (index % 2) * head_size // 2
        for head in range(0, len(rows), head_size)
        for index in range(head_size)
    ]
    return rows[order]


def write_gguf(
    path: Path, model: Any, *, kind: str = "F32", tokenizer: Mapping[str, Any] | None = None, **changes: Any
) -> Path:
    """Write a model of transformers.

    Args:
        kind: type of the matrices.
        tokenizer: its keys; None = `plain_tokenizer`.
        changes: keys other than those that describe the model, with `__` for a dot; None leaves a key out.
    """
    config = model.config
    arch = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    name = gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(path, changes.pop("general__architecture", name))
    keys = _keys(config, name)
    keys |= dict(plain_tokenizer(config.vocab_size) if tokenizer is None else tokenizer)
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in keys.items():
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    for name, tensor in _tensors(model, arch).items():
        wanted = "F32" if tensor.ndim == 1 or name.startswith("position") else kind
        quantised = gguf.quantize(tensor.contiguous().numpy(), gguf.GGMLQuantizationType[wanted])
        writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType[wanted])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _keys(config: Any, arch: str) -> dict[str, Any]:
    if config.model_type == "gpt2":
        sizes = (config.n_positions, config.n_embd, config.n_inner or 4 * config.n_embd, config.n_layer, config.n_head)
        others = {"attention.layer_norm_epsilon": config.layer_norm_epsilon}
    else:
        sizes = (config.max_position_embeddings, config.hidden_size, config.intermediate_size)
        sizes = (*sizes, config.num_hidden_layers, config.num_attention_heads)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        others = {
            "attention.head_count_kv": config.num_key_value_heads, "attention.key_length": size,
            "attention.value_length": size, "rope.dimension_count": size, "rope.freq_base": float(_rope(config)[0]),
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        }  # fmt: skip
        if _rope(config)[1].get("rope_type") == "linear":
            others |= {"rope.scaling.type": "linear", "rope.scaling.factor": _rope(config)[1]["factor"]}
    names = ("context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count")
    return {f"{arch}.{key}": value for key, value in (dict(zip(names, sizes, strict=True)) | others).items()}


def _rope(config: Any) -> tuple[float, dict[str, Any]]:
    """Base and scaling, of transformers 4 or 5."""
    new = getattr(config, "rope_parameters", None) or {}
    scaling = new or getattr(config, "rope_scaling", None) or {}
    return new.get("rope_theta") or getattr(config, "rope_theta", 10000.0), scaling


def _tensors(model: Any, arch: Any) -> dict[str, Tensor]:
    config = model.config
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.t()
        if ARCHITECTURES[config.model_type] == "LLAMA" and ("q_proj" in name or "k_proj" in name):
            tensor = neighbours_paired(tensor, model.model.layers[0].self_attn.head_dim)
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    if _rope(config)[1].get("rope_type") == "llama3" if config.model_type != "gpt2" else False:
        base, size = _rope(config)[0], model.model.layers[0].self_attn.head_dim
        plain = 1 / base ** (torch.arange(0, size, 2).double() / size)
        found["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq.double()).float()
    return found
