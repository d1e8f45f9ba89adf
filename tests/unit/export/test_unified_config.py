# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""config.json of unified checkpoints against a table written down from TensorRT-LLM's config classes, 0.20 to 1.2.1.

The table is of `PretrainedConfig` (tensorrt_llm/models/modeling_utils.py) and of the config classes of Llama, Qwen,
GPT and OPT; nothing in it is derived from the code that writes. What it is for: a field that a class does not know
is kept and ignored without a word, and a field that is left out has a default that computes another model.
"""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_ee.checkpoint.nemo_config import read_architecture
from nemo_ee.export.tensorrt_llm import unified_config
from nemo_ee.export.tensorrt_llm.unified_config import architecture_of, checkpoint_config, stock_family
from nemo_ee.families.registry import FAMILIES

# Arguments without a default, and `vocab_size`, without which no embedding can be made.
REQUIRED = {
    "architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
}  # fmt: skip
BASE = REQUIRED | {
    "hidden_act", "logits_dtype", "norm_epsilon", "position_embedding_type", "max_position_embeddings",
    "num_key_value_heads", "intermediate_size", "head_size", "rotary_embedding_dim", "mapping", "quantization",
    "use_parallel_embedding", "embedding_sharding_dim", "qk_layernorm", "runtime_defaults",
}  # fmt: skip
# Kept by every class as an attribute that stock code does not read; the readers here do.
OURS = {"tie_word_embeddings", "early_exit"}
ALLOWED = {
    "LlamaForCausalLM": {"mlp_bias", "attn_bias", "rotary_base", "rotary_scaling"},
    "Qwen2ForCausalLM": {"mlp_bias", "attn_bias", "rotary_base", "rotary_scaling", "qwen_type"},
    "Qwen3ForCausalLM": {"mlp_bias", "attn_bias", "rotary_base", "rotary_scaling", "qwen_type"},  # from 1.0 on
    "GPTForCausalLM": {"gpt_variant", "bias", "rotary_pct", "rotary_base", "rotary_scaling"},
    "OPTForCausalLM": {"do_layer_norm_before"},
}
# Others raise: they are passed on as keyword arguments.
QUANTIZATION = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val", "use_meta_recipe",
    "has_zero_point", "pre_quant_scale", "exclude_modules",
}  # fmt: skip

SIZES = {"num_layers": 4, "hidden_size": 40, "ffn_hidden_size": 56, "num_attention_heads": 8, "vocab_size": 133}
LLAMA = {
    **SIZES, "num_query_groups": 2, "kv_channels": 10, "normalization": "rmsnorm", "activation": "fast-swiglu",
    "position_embedding_type": "rope", "bias": False, "layernorm_epsilon": 1e-6, "encoder_seq_length": 32,
    "max_position_embeddings": 64, "rotary_base": 5e5, "share_embeddings_and_output_weights": False,
}  # fmt: skip
GPT = {**SIZES, "encoder_seq_length": 32, "max_position_embeddings": 32}
COMMON = {
    "dtype": "bfloat16", "logits_dtype": "float32", "vocab_size": 133, "hidden_size": 40, "num_hidden_layers": 4,
    "num_attention_heads": 8, "intermediate_size": 56, "use_parallel_embedding": False, "embedding_sharding_dim": 0,
    "mapping": {"world_size": 6, "tp_size": 2, "pp_size": 3},
    "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
}  # fmt: skip
LLAMA_COMMON = {
    **COMMON, "num_key_value_heads": 2, "head_size": 10, "hidden_act": "silu", "norm_epsilon": 1e-6,
    "position_embedding_type": "rope_gpt_neox", "max_position_embeddings": 64, "rotary_base": 5e5,
    "rotary_scaling": None, "tie_word_embeddings": False, "mlp_bias": False,
}  # fmt: skip
GPT_COMMON = {
    **COMMON, "num_key_value_heads": 8, "head_size": 5, "norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "position_embedding_type": "learned_absolute", "max_position_embeddings": 32,
}  # fmt: skip
LLAMA3 = {
    "type": "llama3", "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

# what the .nemo says -> the whole file
EXPECTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (LLAMA, {**LLAMA_COMMON, "architecture": "LlamaForCausalLM", "attn_bias": False}),
    "llama with biases": (
        {**LLAMA, "bias": True},
        {**LLAMA_COMMON, "architecture": "LlamaForCausalLM", "attn_bias": True, "mlp_bias": True},
    ),
    "llama 3": (
        {**LLAMA, "scale_positional_embedding": True},
        {**LLAMA_COMMON, "architecture": "LlamaForCausalLM", "attn_bias": False, "rotary_scaling": LLAMA3},
    ),
    "qwen2": (
        {**LLAMA, "qkv_bias": True},
        {**LLAMA_COMMON, "architecture": "Qwen2ForCausalLM", "attn_bias": True, "qwen_type": "qwen2"},
    ),
    "qwen3": (
        {**LLAMA, "qk_layernorm": True},
        {**LLAMA_COMMON, "architecture": "Qwen3ForCausalLM", "attn_bias": False, "qwen_type": "qwen3"},
    ),
    "gpt2": (
        {**GPT, "activation": "gelu"},
        {**GPT_COMMON, "architecture": "GPTForCausalLM", "hidden_act": "gelu", "gpt_variant": "gpt2", "bias": True},
    ),
    "opt": (
        {**GPT, "activation": "relu"},
        {**GPT_COMMON, "architecture": "OPTForCausalLM", "hidden_act": "relu", "do_layer_norm_before": True},
    ),
    "opt without biases": (
        {**GPT, "activation": "relu", "bias": False},
        {**GPT_COMMON, "architecture": "GPTForCausalLM", "hidden_act": "relu", "gpt_variant": "gpt2", "bias": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_whole_file(name: str) -> None:
    """Values exactly, and fields of the class alone."""
    nemo, expected = EXPECTED[name]
    architecture = read_architecture(nemo, stored_rows=136, max_positions=None)
    table = {"exits": [], "thresholds": {"a": 0.5}}
    config = checkpoint_config(
        architecture, tensor_parallel=2, pipeline_parallel=3, dtype="bfloat16", early_exit=table
    )
    assert config == {**expected, "early_exit": table}
    assert config.keys() >= REQUIRED
    assert config.keys() <= BASE | OURS | ALLOWED[config["architecture"]]
    assert config["quantization"].keys() <= QUANTIZATION
    assert architecture_of(config) == architecture


def test_norms_and_biases_that_no_class_has_are_refused() -> None:
    for changes, words in (
        ({"qk_layernorm": True, "qkv_bias": True}, "biases in qkv, qk_layernorm=True"),
        ({"qk_layernorm": True, "bias": True}, "biases in fc1, fc2, proj, qkv, qk_layernorm=True"),
    ):
        with pytest.raises(ValueError, match=f"no class of TensorRT-LLM computes this: {words}"):
            stock_family(read_architecture({**LLAMA, **changes}, stored_rows=136, max_positions=None))


def test_the_model_files_have_a_class_for_every_family_that_says_so() -> None:
    files = Path(unified_config.__file__).with_name("files")
    engine, pytorch = (runpy.run_path(str(files / f"tensorrt_llm_{name}.py")) for name in ("model", "pytorch_model"))
    engines = [family.engine for family in FAMILIES.values() if family.engine is not None]
    named = {own.early_exit: own.architecture for own in engines if own.early_exit is not None}
    assert {name: architecture for name, (_, architecture) in engine["CLASSES"].items()} == named
    able = {family.model_class for family in FAMILIES.values() if family.pytorch_early_exit}
    assert set(pytorch["ARCHITECTURES"]) == able


def test_a_draft_says_nothing_of_exits() -> None:
    architecture = replace(read_architecture(LLAMA, stored_rows=136, max_positions=16), num_layers=2, tied=False)
    config = checkpoint_config(architecture, tensor_parallel=2, pipeline_parallel=3, dtype="bfloat16")
    changes = {"num_hidden_layers": 2, "max_position_embeddings": 16}
    assert config == {**EXPECTED["llama"][1], **changes}


def test_control_the_tables_of_the_classes_differ() -> None:
    """A field of one class in the file of another is noticed."""
    fields = [expected.keys() - BASE - OURS for _, expected in EXPECTED.values()]
    assert not fields[0] <= ALLOWED["GPTForCausalLM"] and not fields[5] <= ALLOWED["LlamaForCausalLM"]
