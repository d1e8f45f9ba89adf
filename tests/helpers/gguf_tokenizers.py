# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The metadata of a GGUF file for the small tokenizers, made from their tokenizer.json by naive code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.stack.small_tokenizers import save_tokenizer

# kind of small tokenizer -> llama.cpp's name for its words, and whether it puts a begin-of-text token in front
KINDS = {
    "gpt2": ("gpt-2", False),
    "qwen": ("qwen2", False),
    "llama3": ("deepseek-r1-qwen", True),
    "llama2": ("", True),
}
_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_and_metadata(folder: Path, kind: str, spare: int = 3) -> dict[str, Any]:
    """Write a small tokenizer and return its metadata.

    Args:
        folder: absent.
        kind: a key of `KINDS`.
        spare: number of rows of the embeddings that have no token.
    """
    save_tokenizer(folder, kind)
    whole, config = (json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    tokens = {number: token for token, number in whole["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, 1)
    for added in whole["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = 3 if added["special"] else 4
    count = max(tokens) + 1
    assert sorted(tokens) == list(range(count))
    (pre, bos), merges = (
        KINDS[kind],
        [pair.split() if isinstance(pair, str) else pair for pair in whole["model"]["merges"]],
    )
    keys: dict[str, Any] = {"model": "llama" if kind == "llama2" else "gpt2", "add_bos_token": bos}
    if kind == "llama2":
        scores = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(merges)))}
        keys["scores"] = [scores.get(tokens[i], -1000.0) for i in range(count)] + [-1000.0] * spare
        types |= {number: 6 for number, token in tokens.items() if token.startswith("<0x")} | {0: 2}
    else:
        keys |= {"pre": pre, "merges": [" ".join(pair) for pair in merges]}
    keys["tokens"] = [tokens[number] for number in range(count)] + [f"[PAD{count + one}]" for one in range(spare)]
    keys["token_type"] = [types[number] for number in range(count)] + [5] * spare
    ids = {token: number for number, token in tokens.items()}
    keys |= {f"{key}_token_id": ids[config[role]] for role, key in _KEYS.items() if config.get(role)}
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()} | {
        "tokenizer.chat_template": config["chat_template"]
    }
