# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A `.nemo`'s architecture as the config.json of a stock transformers class.

Where the backbone came from Hugging Face, the `.nemo` carries that model's config.json, and it is taken if it still
describes the model. Otherwise a family is chosen by what it computes:

    RMSNorm, gated SiLU, rotary positions            Llama; with a bias on query, key and value alone Qwen2
    LayerNorm, GELU or ReLU, learned positions       GPT-2; OPT for ReLU, and where the linears have no bias

Either way the values are read back by the importer's own reader, and what it makes of them has to be the `.nemo`'s
architecture again: anything a stock class would compute differently is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_ee.checkpoint.architecture import Architecture, read_architecture
from nemo_ee.checkpoint.huggingface_backbone import HuggingFaceBackbone
from nemo_ee.checkpoint.huggingface_families import backbone_from_config
from nemo_ee.checkpoint.tokenizer_files import read_json_object
from nemo_ee.exits.config import ExitConfig

FORMAT = "huggingface"  # of a directory, in the manifest
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of somebody's config.json that say nothing about the exported model.
_LEFT_OUT = ("_name_or_path", "transformers_version", "auto_map", "torch_dtype", "dtype", "early_exit")


@dataclasses.dataclass(frozen=True)
class StockConfig:
    """The values of a config.json and what the importer's reader makes of them."""

    values: dict[str, Any]
    backbone: HuggingFaceBackbone

    @property
    def family(self) -> str:
        """transformers' `model_type`."""
        return self.backbone.family


def stock_configs(
    config: Mapping[str, Any],
    bundled: Mapping[str, Any] | None,
    special_tokens: Mapping[str, int | None],
    *,
    stored_rows: int,
    position_rows: int | None,
) -> list[StockConfig]:
    """Every config.json that describes a `.nemo`'s backbone, the preferred one first.

    The last one has a stored tensor for every parameter of the `.nemo`; an earlier one may have constants (biases that
    the original model does not have), so that it fits only while those parameters still have their values.

    Args:
        config: the `.nemo`'s model config, plain values.
        bundled: the original model's config.json, if the `.nemo` carries it.
        special_tokens: `bos_token_id` and so on, for a `.nemo` without one; None is written as null, since an absent
            key would be the stock class's own default, some token of this vocabulary.
        stored_rows: rows of the stored word embeddings.
        position_rows: rows of the stored learned positions, if there are any.

    Raises:
        ValueError: no stock class computes this model; with every reason.
    """
    wanted = read_architecture(config, stored_rows=stored_rows, max_positions=position_rows, erf_gelu=True)
    found, faults = [], []
    for values in _candidates(config, wanted, bundled, special_tokens):
        try:
            backbone = backbone_from_config(values, _sequence_length(config, values))
        except ValueError as fault:
            faults = [str(fault)]
            continue
        faults = list(_differences(wanted, backbone))
        if not faults:
            found.append(StockConfig(values, backbone))
    if not found:
        raise ValueError(f"no stock class of transformers computes this model: {'; '.join(faults)}")
    return found


def exit_refusal(family: str, exit: ExitConfig) -> str | None:
    """Why an exit cannot be a stand-alone model of a stock class; None where it can."""
    if exit.architecture == "embedding" and family != "opt":
        return (
            f"an embedding exit has no norm, and {CLASSES[family]} cannot leave its final norm out (only OPT can); "
            "use hf_early_exit, or a norm exit"
        )
    return None


def exit_config(stock: StockConfig, exit: ExitConfig, *, own_output: bool) -> StockConfig:
    """The config of an exit as a model of its own: k layers, k + 1 for a `layer` exit.

    Args:
        own_output: its output projection is another matrix than the backbone's.
    """
    layers = exit.layer + (exit.architecture == "layer")
    values = {**stock.values, "n_layer" if stock.family == "gpt2" else "num_hidden_layers": layers}
    if own_output:
        values["tie_word_embeddings"] = False
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and kinds:  # one entry per layer; the families here have one kind of layer
        values["layer_types"] = [kinds[0]] * layers
    backbone = backbone_from_config(values, stock.backbone.sequence_length)
    if exit.architecture == "embedding":
        values["_remove_final_layer_norm"] = True  # the reader refuses it: a backbone always has its norm
    return StockConfig(values, backbone)


def read_bundled(folder: Path | None, name: str) -> dict[str, Any] | None:
    """A JSON file of the original model that the `.nemo` carries beside its tokenizer; None without one."""
    return None if folder is None else read_json_object(folder / name)


def _candidates(
    config: Mapping[str, Any],
    wanted: Architecture,
    bundled: Mapping[str, Any] | None,
    special_tokens: Mapping[str, int | None],
) -> Iterator[dict[str, Any]]:
    carried: dict[str, Any] = {
        name: None if token is None or token >= wanted.vocab_size else token for name, token in special_tokens.items()
    }
    family = None if bundled is None else bundled.get("model_type")
    if family in CLASSES:
        values = {key: value for key, value in bundled.items() if key not in _LEFT_OUT}
        if wanted.learned_positions:
            positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
            values[positions] = wanted.max_position_embeddings
        yield {**values, "vocab_size": wanted.vocab_size, "architectures": [CLASSES[family]]}
        carried = {key: bundled[key] for key in _TOKEN_IDS if key in bundled}
    yield {**carried, **_derived(wanted, family), "initializer_range": float(config.get("init_method_std") or 0.02)}


def _derived(a: Architecture, family: str | None) -> dict[str, Any]:
    """A config with a tensor for every parameter; `family`: the original model's, kept where it can be."""
    if not a.layer_norm:
        return _derived_llama_like(a)
    act = {"relu": "relu", "gelu": "gelu_new", "gelu_erf": "gelu"}[a.hidden_act]
    shared = {"vocab_size": a.vocab_size, "activation_function": act, "tie_word_embeddings": a.tied}
    if not a.bias or (a.norm_epsilon == 1e-5 and (family == "opt" or (family is None and a.hidden_act == "relu"))):
        return _named("opt") | shared | {
            "hidden_size": a.hidden_size, "word_embed_proj_dim": a.hidden_size, "ffn_dim": a.ffn_hidden_size,
            "num_hidden_layers": a.num_layers, "num_attention_heads": a.num_attention_heads,
            "max_position_embeddings": a.max_position_embeddings, "do_layer_norm_before": True, "enable_bias": a.bias,
        }  # fmt: skip
    return _named("gpt2") | shared | {
        "n_embd": a.hidden_size, "n_inner": a.ffn_hidden_size, "n_layer": a.num_layers,
        "n_head": a.num_attention_heads, "n_positions": a.max_position_embeddings,
        "layer_norm_epsilon": a.norm_epsilon,
    }  # fmt: skip


def _derived_llama_like(a: Architecture) -> dict[str, Any]:
    family = "qwen2" if a.qkv_bias and not a.bias else "llama"
    biases = {} if family == "qwen2" else {"attention_bias": a.bias, "mlp_bias": a.bias}
    return _named(family) | biases | {
        "vocab_size": a.vocab_size, "hidden_size": a.hidden_size, "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers, "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups, "head_dim": a.kv_channels, "hidden_act": "silu",
        "max_position_embeddings": a.max_position_embeddings, "rms_norm_eps": a.norm_epsilon,
        "rope_theta": a.rotary_base, "rope_scaling": _rope_scaling(a), "tie_word_embeddings": a.tied,
    }  # fmt: skip


def _named(family: str) -> dict[str, Any]:
    return {"model_type": family, "architectures": [CLASSES[family]]}


def _rope_scaling(a: Architecture) -> dict[str, Any] | None:
    if a.rotary_scaling is None:
        return None
    return {key: value for key, value in a.rotary_scaling.items() if key != "type"}


def _sequence_length(config: Mapping[str, Any], values: Mapping[str, Any]) -> int | None:
    """The length the `.nemo` is used with, where an attention window depends on it; None = the model's own."""
    length = config.get("encoder_seq_length")
    longest = values.get("max_position_embeddings")
    if values["model_type"] in ("gpt2", "opt") or not isinstance(length, int) or not isinstance(longest, int):
        return None
    return min(length, longest)


def _differences(wanted: Architecture, made: Architecture) -> Iterator[str]:
    for field in dataclasses.fields(Architecture):
        ours, theirs = getattr(wanted, field.name), getattr(made, field.name)
        # A rotary model may be used at another length than it was trained with.
        if field.name == "max_position_embeddings" and not wanted.learned_positions:
            continue
        if ours != theirs:
            yield f"{field.name} is {ours!r}, the nearest class has {theirs!r}"
