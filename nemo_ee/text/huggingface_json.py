# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The JSON files of a Hugging Face directory: the spellings of transformers 4.51 and 5, and the keys that run code.

    file                   4.51                                      5
    tokenizer_config.json  tokenizer_class PreTrainedTokenizerFast   TokenizersBackend
                           additional_special_tokens, a list         extra_special_tokens, a list
                           extra_special_tokens, a mapping           model_specific_special_tokens

Each version ignores the other's key of a pair or fails on it. transformers 5 reads 4.51's keys, so those are written.
The rotary settings of config.json are `nemo_ee.families.rotary_settings`.
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


def without_code(values: Any) -> Any:
    """JSON values without the keys that make transformers run code, at any depth."""
    if isinstance(values, Mapping):
        return {key: without_code(value) for key, value in values.items() if key not in _CODE_KEYS}
    return [without_code(value) for value in values] if isinstance(values, list) else values


def readable_tokenizer_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4.51 and 5 read alike, without keys that run code.

    transformers 5 writes a complete tokenizer.json, and reads it with the class of that name; the class of
    that name in 4.51 may add a begin-of-text token of its own.

    Args:
        values: content of the file; those of transformers 4 come back without keys that run code.
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
