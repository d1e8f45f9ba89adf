# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The JSON files of a Hugging Face directory: the spellings of transformers 4.51 and 5, and the keys that run code.

    file                   4.51                                      5
    config.json            rope_theta, rope_scaling                  rope_parameters, rope_theta in it
    tokenizer_config.json  tokenizer_class PreTrainedTokenizerFast   TokenizersBackend
                           additional_special_tokens, a list         extra_special_tokens, a list
                           extra_special_tokens, a mapping           model_specific_special_tokens

Each version ignores the other's key of a pair or fails on it. transformers 5 reads 4.51's tokenizer keys, so those are
written; of the rotary settings both are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keys that make transformers import a file of the directory or of a hub, or load a kernel from a hub.
_CODE_KEYS = frozenset(
    {"auto_map", "custom_pipelines"}
    | {f"{prefix}_implementation{end}" for prefix in ("attn", "_attn") for end in ("", "_internal", "_autoset")}
    | {f"{prefix}_implementation{end}" for prefix in ("experts", "_experts") for end in ("", "_internal")}
)
_ROPE_DEFAULT_BASE = 10000.0


def without_code(values: Any) -> Any:
    """JSON values without the keys that make transformers run code, at any depth."""
    if isinstance(values, Mapping):
        return {key: without_code(value) for key, value in values.items() if key not in _CODE_KEYS}
    return [without_code(value) for value in values] if isinstance(values, list) else values


def rotary_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json, in either spelling or in both.

    Args:
        values: of the file.

    Returns:
        `rope_theta`, `rope_type` and the type's numbers, as stored: their values are not checked.

    Raises:
        ValueError: not a mapping, one per kind of layer, or two spellings with different values.
    """
    old, new = (_one_spelling(name, values.get(name)) for name in ("rope_scaling", "rope_parameters"))
    bases = {
        "rope_theta": values.get("rope_theta"),
        "rope_scaling.rope_theta": old.pop("rope_theta", None),
        "rope_parameters.rope_theta": new.pop("rope_theta", None),
    }
    bases = {name: base for name, base in bases.items() if base is not None}
    names = list(bases)
    for name in names[1:]:
        if bases[name] != bases[names[0]]:
            raise ValueError(_disagreement(names[0], bases[names[0]], name, bases[name]))
    if old and new and old != new:
        raise ValueError(_disagreement("rope_scaling", old, "rope_parameters", new))
    base = bases[names[0]] if names else _ROPE_DEFAULT_BASE
    return {"rope_type": "default", **(new or old), "rope_theta": base}


def _one_spelling(name: str, found: Any) -> dict[str, Any]:
    """The settings under a key with `rope_type` alone as the name of the type; null values are absent ones."""
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}: {found!r}, must be a mapping")
    if any(isinstance(value, Mapping) for value in found.values()):
        raise ValueError(f"{name}: one set per kind of layer is not supported")
    settings = {key: value for key, value in found.items() if value is not None}
    old, new = settings.pop("type", None), settings.get("rope_type")
    if None not in (old, new) and old != new:
        raise ValueError(f"{name}: type {old!r} and rope_type {new!r} disagree")
    if old is not None:
        settings["rope_type"] = old
    return settings


def _disagreement(one: str, first: Any, other: str, second: Any) -> str:
    return (
        f"{one} {first!r} and {other} {second!r} disagree: transformers 4 and 5 would compute different models; "
        "keep the one that the model was trained with"
    )


def with_both_spellings(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of a model with rotary positions, whose rotary settings transformers 4.51 and 5 read alike.

    Raises:
        ValueError: see `rotary_settings`.
    """
    settings = rotary_settings(values)
    base = settings.pop("rope_theta")
    scaling = None if settings["rope_type"] == "default" else settings
    return {
        **values,
        "rope_theta": base,
        "rope_scaling": values.get("rope_scaling") or scaling,
        "rope_parameters": {"rope_theta": base, **settings},
    }


def readable_tokenizer_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4.51 and 5 read alike, without keys that run code.

    transformers 5 writes a tokenizer.json that says everything, and reads it with the class of that name; the class of
    that name in 4.51 may add a begin-of-text token of its own.

    Args:
        values: of the file; those of transformers 4 come back without keys that run code.
    """
    values = without_code(values)
    stored = values.get("tokenizer_class")
    if stored == "TokenizersBackend" or values.pop("backend", None) == "tokenizers":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Defaults of transformers 5, whose class in 4.51 has other ones.
        values.setdefault("model_input_names", ["input_ids", "attention_mask"])
        if stored == "LlamaTokenizer":
            values.setdefault("padding_side", "left")
    if isinstance(values.get("extra_special_tokens"), list):
        listed = values.pop("extra_special_tokens")
        values["additional_special_tokens"] = values.get("additional_special_tokens") or listed
    named = values.pop("model_specific_special_tokens", None)
    if isinstance(named, Mapping):
        extra = values.get("extra_special_tokens")
        values["extra_special_tokens"] = {**named, **(extra if isinstance(extra, Mapping) else {})}
    return values
