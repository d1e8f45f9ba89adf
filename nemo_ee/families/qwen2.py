# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5: a Llama with a bias on query, key and value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_ee.families.architecture import QKV, Architecture
from nemo_ee.families.config_reader import ConfigReader
from nemo_ee.families.family import EngineClass, Family
from nemo_ee.families.gguf_metadata import GgufForm, has_rope_factors
from nemo_ee.families.llama import (
    LLAMA_GGUF_NAMES,
    LLAMA_KEYS,
    LLAMA_NAMES,
    read_llama_like,
    rotary_engine_fields,
    rotary_keys,
)


def read_qwen(reader: ConfigReader, **others: Any) -> Architecture:
    """The architecture of a config.json with the keys that Qwen2 and Qwen3 share; `others` as in `read_llama_like`."""
    layers, first = reader.get("num_hidden_layers"), reader.get("max_window_layers", 28)
    no_layer = isinstance(layers, int) and isinstance(first, int) and first >= layers
    windowed = reader.flag("use_sliding_window") and not no_layer
    return read_llama_like(reader, default_groups=32, windowed=windowed, **others)


QWEN2 = Family(
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    config_class="Qwen2Config",
    names=LLAMA_NAMES,
    keys=LLAMA_KEYS,
    read=lambda reader: read_qwen(reader, family="qwen2", biases=frozenset({QKV})),
    other_keys=rotary_keys,
    engine=EngineClass(
        architecture="Qwen2ForCausalLM",
        computes=lambda a: not (a.layer_norm or a.qk_norm) and a.biases == {QKV},
        fields=lambda a: {**rotary_engine_fields(a), "qwen_type": "qwen2"},
        early_exit="EarlyExitQwen2ForCausalLM",
    ),
    pytorch_early_exit=True,
    gguf=GgufForm(
        architecture="qwen2",
        names=replace(LLAMA_GGUF_NAMES, pairs=False),
        computes=lambda a: a.biases == {QKV} and a.proj_columns == a.hidden_size and not has_rope_factors(a),
    ),
)
