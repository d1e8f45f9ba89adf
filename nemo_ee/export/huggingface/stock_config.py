# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A `.nemo`'s architecture as the config.json of a stock transformers class.

If the backbone came from Hugging Face, the `.nemo` has that model's config.json, which is used if it still describes
the model. Otherwise the families' configs are tried, the original model's family first.

In both cases the importer's reader reads the values back, and the result must equal the `.nemo`'s architecture: a
model that a stock class would compute differently is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_ee.checkpoint.nemo_config import read_architecture
from nemo_ee.exits.config import ExitConfig
from nemo_ee.families.architecture import Architecture
from nemo_ee.families.family import Family
from nemo_ee.families.registry import FAMILIES, read_config
from nemo_ee.families.rotary_settings import with_both_spellings

FORMAT = "huggingface"  # format of a directory, in the manifest
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of a config.json that do not describe the exported model.
_LEFT_OUT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "early_exit")


@dataclasses.dataclass(frozen=True)
class StockConfig:
    """The values of a config.json, and the architecture that the importer's reader finds in them."""

    values: dict[str, Any]
    architecture: Architecture

    @property
    def family(self) -> Family:
        """The family of the config's class."""
        return FAMILIES[self.architecture.family]

    @property
    def has_final_norm(self) -> bool:
        """Whether the model has a final norm; False for an OPT config that leaves it out."""
        return not self.values.get(self.family.droppable_final_norm)


def stock_configs(
    config: Mapping[str, Any],
    bundled: Mapping[str, Any] | None,
    special_tokens: Mapping[str, int | None],
    *,
    stored_rows: int,
    position_rows: int | None,
) -> list[StockConfig]:
    """All configs that describe a `.nemo`'s backbone: the original model's, and that of the first family.

    Both may have constants for parameters of the `.nemo` (biases that the class does not have). Such a config fits
    only while those parameters have the constants' values.

    Args:
        config: the `.nemo`'s model config as plain values.
        bundled: the original model's config.json, if the `.nemo` has it.
        special_tokens: `bos_token_id` and so on, for a `.nemo` without one; None is written as null, since an absent
            key would mean the stock class's default, an arbitrary token of this vocabulary.
        stored_rows: rows of the stored word embeddings.
        position_rows: rows of the stored learned positions, if there are any.

    Raises:
        ValueError: no stock class computes this model; the message has the reasons of the nearest class.
    """
    wanted = read_architecture(config, stored_rows=stored_rows, max_positions=position_rows, erf_gelu=True)
    found, nearest = [], []
    for values, is_original in _candidates(wanted, bundled, special_tokens):
        try:
            made = read_config(values, _sequence_length(config, values))
            problems = [
                f"{name} is {ours!r}, {values['architectures'][0]} has {theirs!r}"
                for name, ours, theirs in wanted.differences(made.completed())
            ]
        except ValueError as problem:
            problems = [str(problem)]
        if not problems:
            found.append(StockConfig(values if made.learned_positions else with_both_spellings(values), made))
            if not is_original:
                break
        elif not is_original:  # the original differs if the `.nemo` was changed: no reason against the class
            nearest = min(nearest or problems, problems, key=len)
    if not found:
        raise ValueError(f"no stock class of transformers computes this model: {'; '.join(nearest)}")
    return found


def exit_refusal(family: Family, exit: ExitConfig) -> str | None:
    """Reason why an exit cannot be a stand-alone model of a stock class; None if it can."""
    if exit.architecture == "embedding" and family.droppable_final_norm is None:
        able = ", ".join(other.model_class for other in FAMILIES.values() if other.droppable_final_norm)
        return (
            f"an embedding exit has no norm, and {family.model_class} cannot leave its final norm out (only {able} "
            "can); use hf_early_exit, or a norm exit"
        )
    return None


def exit_config(stock: StockConfig, exit: ExitConfig, *, own_output: bool) -> StockConfig:
    """The config of an exit as a stand-alone model: k layers, k + 1 for a `layer` exit.

    Args:
        own_output: whether its output projection is another matrix than the backbone's.
    """
    layers = exit.layer + (exit.architecture == "layer")
    values = {**stock.values, stock.family.keys["num_layers"]: layers}
    if own_output:
        values["tie_word_embeddings"] = False
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and kinds:  # one entry per layer; the families here have one kind of layer
        values["layer_types"] = [kinds[0]] * layers
    architecture = read_config(values, stock.architecture.sequence_length)
    if exit.architecture == "embedding":
        values[stock.family.droppable_final_norm] = True  # the reader refuses it: a backbone always has its norm
    return StockConfig(values, architecture)


def read_stock_config(values: Mapping[str, Any]) -> Architecture:
    """The architecture of an exported config.json, with or without a final norm.

    Raises:
        ValueError: the config belongs to no family, or is inconsistent.
    """
    droppable = {family.droppable_final_norm for family in FAMILIES.values()}
    # The length is arbitrary: it matters only for attention windows, and they change no tensor.
    return read_config({key: value for key, value in values.items() if key not in droppable}, 1)


def _candidates(
    wanted: Architecture, bundled: Mapping[str, Any] | None, special_tokens: Mapping[str, int | None]
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Pairs (values, whether they are the original model's), the best first."""
    carried: dict[str, Any] = {
        name: None if token is None or token >= wanted.vocab_size else token for name, token in special_tokens.items()
    }
    original = None if bundled is None else FAMILIES.get(bundled.get("model_type"))
    if original is not None:
        values = {key: value for key, value in bundled.items() if key not in _LEFT_OUT}
        if wanted.learned_positions:
            values[original.keys["max_position_embeddings"]] = wanted.max_position_embeddings
        yield {**values, "vocab_size": wanted.vocab_size, "architectures": [original.model_class]}, True
        carried |= {key: bundled[key] for key in _TOKEN_IDS if key in bundled}
        yield {**carried, **original.stock_config(wanted)}, False
    for family in FAMILIES.values():
        if family is not original and family.chosen_for(wanted):
            yield {**carried, **family.stock_config(wanted)}, False


def _sequence_length(config: Mapping[str, Any], values: Mapping[str, Any]) -> int | None:
    """The `.nemo`'s sequence length if an attention window depends on it; None = the model's maximum."""
    length, longest = config.get("encoder_seq_length"), values.get("max_position_embeddings")
    if "sliding_window" not in values or not isinstance(length, int) or not isinstance(longest, int):
        return None
    return min(length, longest)
