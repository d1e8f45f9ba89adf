# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The table of all families, and look-ups in it.

The order matters if several classes compute the same model: the first of them is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ee.families.architecture import Architecture
from nemo_ee.families.config_reader import ConfigReader
from nemo_ee.families.family import Family
from nemo_ee.families.gguf_metadata import ARCHITECTURE
from nemo_ee.families.gpt2 import GPT2
from nemo_ee.families.llama import LLAMA, MISTRAL
from nemo_ee.families.opt import OPT
from nemo_ee.families.qwen2 import QWEN2
from nemo_ee.families.qwen3 import QWEN3
from nemo_ee.families.tensors import TensorTable, tensor_table

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, OPT, GPT2)}


def read_config(
    values: Mapping[str, Any], sequence_length: int | None = None, *, problems: Sequence[str] = ()
) -> Architecture:
    """The model that a config.json describes. Absent optional keys have the defaults of the transformers library.

    Args:
        values: the parsed file.
        sequence_length: the length for which the model will be used, by default its maximum. A model whose attention
            window is shorter is refused.
        problems: problems that the caller has found already, for the same message.

    Raises:
        ValueError: the model is not supported, or the config is inconsistent; the message lists every reason.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type: {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    reader = ConfigReader(values, sequence_length)
    reader.problems += problems
    _refuse_what_no_family_has(reader)
    architecture = FAMILIES[family].read(reader)
    if reader.problems:
        raise ValueError("; ".join(dict.fromkeys(reader.problems)))
    return architecture


def read_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    rope_factors: Sequence[float] | None = None,
    sequence_length: int | None = None,
) -> tuple[Architecture, dict[str, Any]]:
    """The model that a GGUF file describes, and the values of its config.json.

    Args:
        metadata: the file's keys.
        tensors: name of each stored tensor -> its shape.
        rope_factors: the tensor `ROPE_FACTORS`, `[d/2]`; None without one.
        sequence_length: see `read_config`.

    Raises:
        ValueError: as `read_config`.
    """
    name = metadata.get(ARCHITECTURE)
    family = next((one for one in FAMILIES.values() if one.gguf is not None and one.gguf.architecture == name), None)
    if family is None:
        known = dict.fromkeys(one.gguf.architecture for one in FAMILIES.values() if one.gguf is not None)
        raise ValueError(f"{ARCHITECTURE}: {name!r} is not supported; supported are {', '.join(known)}")
    reader = ConfigReader(metadata)
    found = family.gguf.read(reader, tensors, rope_factors, family=family.model_type)
    values = family.stock_config(found)
    architecture = read_config(values, sequence_length, problems=reader.problems)
    lost = [f"{field} {ours!r} is not supported (it is {theirs!r} in the family)"
            for field, ours, theirs in found.differences(architecture)]  # fmt: skip
    if lost:
        raise ValueError("; ".join(lost))
    return architecture, values


def gguf_tensors_of(architecture: Architecture) -> TensorTable:
    """Names of the tensors of a family's model in a GGUF file."""
    return tensor_table(FAMILIES[architecture.family].gguf.names, architecture)


def _refuse_what_no_family_has(reader: ConfigReader) -> None:
    quantised = reader.get("quantization_config") or reader.get("compression_config")
    reader.refuse_if(quantised, "quantization_config: quantised weights are not read; use the unquantised model")
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        value = reader.get(name)
        reader.refuse_if(
            isinstance(value, int) and value > 0, f"{name}: {value}, mixtures of experts are not supported"
        )
    parallel = "attention and MLP in parallel are not supported"
    reader.refuse(dict.fromkeys(("use_parallel_residual", "parallel_residual", "parallel_attn"), parallel))
    reader.refuse(
        {
            "is_encoder_decoder": "only decoders are supported",
            "add_cross_attention": "only plain decoders are supported",
        }
    )
    reader.refuse_if(reader.get("pruned_heads"), "pruned_heads: pruned attention heads are not supported")


def tensors_of(architecture: Architecture) -> TensorTable:
    """Names of the stored tensors of a family's model."""
    return tensor_table(FAMILIES[architecture.family].names, architecture)


def engine_family(architecture: Architecture) -> Family | None:
    """The family whose class in TensorRT-LLM's engine backend computes an architecture; None if no class does."""
    able = (family for family in FAMILIES.values() if family.engine is not None)
    return next((family for family in able if family.engine.computes(architecture)), None)
