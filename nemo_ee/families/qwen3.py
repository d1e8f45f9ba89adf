# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Qwen3 (dense): a Llama with an RMSNorm over query and key heads before the rotary positions, and with a separate
head size."""

from __future__ import annotations

from dataclasses import replace

from nemo_ee.families.architecture import Architecture
from nemo_ee.families.config_reader import ConfigReader
from nemo_ee.families.family import EngineClass, Family
from nemo_ee.families.gguf_metadata import GgufForm, has_rope_factors
from nemo_ee.families.llama import LLAMA_GGUF_NAMES, LLAMA_KEYS, LLAMA_NAMES, rotary_engine_fields, rotary_keys
from nemo_ee.families.qwen2 import read_qwen


def _read(reader: ConfigReader) -> Architecture:
    # Megatron has one switch for the biases of attention and MLP, so exits would train biases that the class lacks.
    reader.refuse({"attention_bias": "a Qwen3 with biases is not supported: its exits' MLPs would have some too"})
    return read_qwen(reader, family="qwen3", default_head_size=128, qk_norm=True)


QWEN3 = Family(
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    config_class="Qwen3Config",
    names=replace(LLAMA_NAMES, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    keys=LLAMA_KEYS,
    read=_read,
    other_keys=rotary_keys,
    engine=EngineClass(
        architecture="Qwen3ForCausalLM",  # from TensorRT-LLM 1.0 on
        computes=lambda a: a.qk_norm and not a.biases,
        fields=lambda a: {**rotary_engine_fields(a), "qwen_type": "qwen3"},
        early_exit="EarlyExitQwen3ForCausalLM",
    ),
    pytorch_early_exit=True,
    gguf=GgufForm(
        architecture="qwen3",
        names=replace(LLAMA_GGUF_NAMES, pairs=False, q_norm="attn_q_norm", k_norm="attn_k_norm"),
        fields={"qk_norm": True},
        computes=lambda a: not a.biases and not has_rope_factors(a),
    ),
)
