# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of an export: the same ids and text in every version of transformers, without code.

The class in the source's tokenizer_config.json adds to tokenizer.json, and its additions depend on the version:
transformers 5 builds `LlamaTokenizer` from the vocabulary alone, 4.51 gives it a begin-of-text token. An export
therefore has the tokenizer that the class builds here, as the tokenizer.json of a `PreTrainedTokenizerFast`, which
both versions use unchanged.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from nemo_ee.checkpoint.tokenizer_files import copy_tokenizer_files, plain_json_object
from nemo_ee.runtime.loader import load_tokenizer

logger = logging.getLogger(__name__)

_CONFIG = "tokenizer_config.json"
# Settings of the source that are copied, if present. Others are not copied: the source may be untrusted.
_KEPT = ("chat_template", "extra_special_tokens", "model_max_length", "add_bos_token", "add_eos_token")
_MADE = ("clean_up_tokenization_spaces", "padding_side", "truncation_side")


def write_tokenizer(folder: Path, to: Path) -> bool:
    """Copy a tokenizer's files, and no others, and write the tokenizer in a form that every version reads.

    Args:
        folder: `tokenizer/` of a `.nemo`, which may be untrusted.
        to: an existing directory; a config.json in it is the export's.

    Returns:
        Whether there is a tokenizer. Files without a fast tokenizer in transformers are copied unchanged.
    """
    names = copy_tokenizer_files(folder, to)
    if _CONFIG not in names:
        return bool(names)
    try:
        tokenizer = load_tokenizer(to)
    except Exception as problem:  # a damaged or incomplete tokenizer may cause any exception
        logger.warning(
            "%s: transformers does not read the tokenizer (%s); its files are only copied", to.name, problem
        )
        return True
    if tokenizer.is_fast:
        values = _settings(tokenizer, plain_json_object(to / _CONFIG) or {})
        tokenizer.backend_tokenizer.save(str(to / "tokenizer.json"))
        (to / _CONFIG).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return True


def _settings(tokenizer: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json of a `PreTrainedTokenizerFast` that is equivalent to the tokenizer."""
    values = {name: stored[name] for name in _KEPT if name in stored}
    ids = tokenizer("x")["input_ids"]
    # llama.cpp reads these two; transformers 4.51 ignores them in this class, transformers 5 beside a tokenizer.json.
    for name, token, end in (
        ("add_bos_token", tokenizer.bos_token_id, 0),
        ("add_eos_token", tokenizer.eos_token_id, -1),
    ):
        if name in values:
            values[name] = token is not None and ids[end:][:1] == [token]
    values |= {name: getattr(tokenizer, name) for name in _MADE}
    # transformers 4 reads this from here, and takes False where it is absent; transformers 5 reads tokenizer.json.
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    prefix = None if splitter is None else json.loads(splitter.__getstate__()).get("add_prefix_space")
    values |= {} if prefix is None else {"add_prefix_space": prefix}
    values["model_input_names"] = ["input_ids", "attention_mask"]  # the class's default in 4.51 has token types too
    listed = getattr(tokenizer, "additional_special_tokens", None) or getattr(tokenizer, "extra_special_tokens", None)
    values |= {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    values["additional_special_tokens"] = [str(token) for token in listed or ()]
    values["added_tokens_decoder"] = {
        str(number): {
            "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized, "rstrip": token.rstrip,
            "single_word": token.single_word, "special": token.special,
        }
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
    }  # fmt: skip
    return values | {"tokenizer_class": "PreTrainedTokenizerFast"}
