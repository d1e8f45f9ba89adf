# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny Hugging Face models of every supported family, seeded, with awkward shapes: the references of many tests.

Every parameter is drawn at random, norms and biases included, so that a weight in the wrong place shows. Heads, query
groups and MLP sizes are even (two tensor-parallel ranks), vocabularies are not.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ee.families.architecture import ALL_LINEARS, QKV, Architecture
from nemo_ee.families.family import Family
from nemo_ee.families.registry import FAMILIES, read_config

_ROPE = {"vocab_size": 133, "max_position_embeddings": 32, "num_hidden_layers": 3, "tie_word_embeddings": False}
_LLAMA = {
    **_ROPE,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
}

# A model of a family that is not in the table is the first of these that the family describes.
_TINY = {"num_layers": 3, "hidden_size": 40, "ffn_hidden_size": 56, "num_attention_heads": 4}
_TINY |= {"vocab_size": 133, "max_position_embeddings": 32, "norm_epsilon": 1e-6}
_ARCHITECTURES = [
    Architecture(**_TINY, num_query_groups=groups, qk_norm=qk_norm, biases=frozenset(biases), **kind)
    for groups, kind in (
        (2, {"kv_channels": 12, "rotary_base": 5e5}),
        (4, {"kv_channels": 10, "layer_norm": True, "learned_positions": True, "hidden_act": "gelu"}),
    )
    for qk_norm in (False, True)
    for biases in ((), {QKV}, ALL_LINEARS)
]


def _arguments(family: Family) -> dict[str, Any]:
    """Arguments of a family's config class."""
    for architecture in _ARCHITECTURES:
        with contextlib.suppress(ValueError):
            values = family.stock_config(architecture)
            if read_config(values) == architecture:
                return {key: value for key, value in values.items() if key not in ("model_type", "architectures")}
    raise AssertionError(f"{family.model_type} describes none of the tiny architectures; add one")


# name -> (transformers family, arguments of its config class)
TINY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "llama-tied": (
        "llama",
        _LLAMA | {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": None},
    ),
    "llama-bias": ("llama", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-attention-bias": ("llama", _LLAMA | {"attention_bias": True}),
    "llama-mlp-bias": ("llama", _LLAMA | {"mlp_bias": True}),
    "llama-linear": ("llama", _LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    # Five rotary wavelengths, of which the scaling keeps one or two, blends one and stretches the others.
    "llama-llama3": (
        "llama",
        _LLAMA
        | {
            "max_position_embeddings": 128,
            "rope_theta": 5000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 3.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 32, "head_dim": 8, "rms_norm_eps": 1e-3}),
    "qwen2": (
        "qwen2",
        _LLAMA
        | {
            "tie_word_embeddings": True,
            "num_attention_heads": 4,
            "head_dim": 10,
            "rope_theta": 1e6,
            "vocab_size": 150,
        },
    ),
    "gpt2": ("gpt2", {"vocab_size": 131, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 44}),
    "gpt2-untied-erf": (
        "gpt2",
        {
            "vocab_size": 131,
            "n_positions": 32,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 2,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "opt": (
        "opt",
        {
            "vocab_size": 137,
            "max_position_embeddings": 32,
            "hidden_size": 24,
            "word_embed_proj_dim": 24,
            "ffn_dim": 44,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        },
    ),
    "opt-bare": (
        "opt",
        {
            "vocab_size": 137,
            "max_position_embeddings": 32,
            "hidden_size": 24,
            "word_embed_proj_dim": 24,
            "ffn_dim": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
        },
    ),
}

TINY_MODELS |= {name: (name, _arguments(own)) for name, own in FAMILIES.items() if name not in TINY_MODELS}
TINY_MODELS["qwen3-tied"] = ("qwen3", _LLAMA | {"tie_word_embeddings": True, "rms_norm_eps": 1e-3, "rope_theta": 1e6})


def divisible(name: str) -> dict[str, Any]:
    """Changes with which transformers 5 accepts a tiny model: its Llama wants `hidden_size` to be a multiple of the
    number of heads."""
    return {"num_attention_heads": 4} if TINY_MODELS[name][0] == "llama" else {}


def tiny_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A `...ForCausalLM` in eval mode.

    Args:
        name: a key of `TINY_MODELS`.
        seed: seeds every parameter.
        changes: config values other than the table's.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    if name == "opt-bare" and (4, 53) <= version < (5, 0):
        pytest.skip(f"transformers {transformers.__version__} loads an OPT without norm weights, but cannot make one")
    family, arguments = TINY_MODELS[name]
    if version >= (5, 0):
        changes = divisible(name) | changes
    config = AutoConfig.for_model(family, **{k: v for k, v in (arguments | changes).items() if v is not None})
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 1
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm_weight = parameter.ndim == 1 and parameter_name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm_weight else (0.3 if parameter.ndim == 1 else 0.15) * noise)
    return model.to(dtype).eval()


def save_tiny_model(
    directory: str | Path,
    name: str,
    *,
    safetensors: bool = True,
    shard_bytes: int | None = None,
    **arguments: Any,
) -> Any:
    """Saves `tiny_model(name, **arguments)` as transformers does and returns it.

    Args:
        directory: made when absent.
        safetensors: False writes `.bin`.
        shard_bytes: splits the weights into files of about that size, with an index.
    """
    model = tiny_model(name, **arguments)
    model.save_pretrained(directory, safe_serialization=safetensors, max_shard_size=shard_bytes or "5GB")
    return model


def change_config(directory: str | Path, **changes: Any) -> None:
    """Changes values of the config.json in `directory`."""
    path = Path(directory) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_transformers_5_saves(directory: str | Path) -> None:
    """Rewrites config.json and tokenizer_config.json in `directory` as transformers 5.24 writes them.

    A tokenizer becomes one of `TokenizersBackend`, with its additional special tokens under the other name.
    """
    path = Path(directory) / "config.json"
    values = json.loads(path.read_text())
    values |= {"dtype": values.pop("torch_dtype", "float32"), "transformers_version": "5.24.0"}
    if "rope_theta" in values:
        base, scaling = values.pop("rope_theta"), values.pop("rope_scaling", None) or {"rope_type": "default"}
        values["rope_parameters"] = {**scaling, "rope_theta": base}
    path.write_text(json.dumps(values))
    path = Path(directory) / "tokenizer_config.json"
    if path.is_file():
        values = json.loads(path.read_text())
        for name in ("added_tokens_decoder", "extra_special_tokens"):
            values.pop(name, None)
        values |= {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend"}
        values["extra_special_tokens"] = values.pop("additional_special_tokens", [])
        path.write_text(json.dumps(values))


@torch.no_grad()
def reference_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, v] of `tokens` [b, s] in float32."""
    return model(input_ids=tokens, use_cache=False).logits.float()
