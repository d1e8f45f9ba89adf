# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of an export as metadata of a GGUF file; the inverse of `nemo_ee.text.gguf_tokenizer`.

Byte-level BPE needs a rule for words that llama.cpp knows by name. SentencePiece's BPE becomes scores: llama.cpp
merges the pair whose result has the largest score, so the merges must be all pairs of tokens that make a token, and
those that make the same one must follow each other.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_ee.export.tokenizer import write_tokenizer
from nemo_ee.text.gguf_tokenizer import (
    BYTE,
    BYTE_LEVEL,
    CHAT_TEMPLATE,
    CONTROL,
    ENDS,
    GGML,
    NORMAL,
    ROLES,
    SENTENCE_PIECE,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    piece_splits,
)
from nemo_ee.text.json_values import read_json_object
from nemo_ee.text.llama_cpp_splits import split_of
from nemo_ee.text.tokenizer_json import TOKENIZER_JSON, JsonTokenizer

logger = logging.getLogger(__name__)

# llama.cpp refuses a byte-level tokenizer without merges, and the format has no empty lists.
_NO_MERGE = f"{SPACE}{SPACE} {SPACE}{SPACE}"


def vocabulary(folder: Path | None, vocab_size: int, ends: Sequence[int]) -> dict[str, Any]:
    """The keys of the tokenizer.

    Args:
        folder: `tokenizer/` of a `.nemo`, which may be untrusted; None = it has none.
        vocab_size: number of rows of the embeddings.
        ends: ids of the tokens that end a text.

    Raises:
        ValueError: there is no tokenizer, or llama.cpp would give other tokens.
    """
    if folder is None:
        raise ValueError("the .nemo has no tokenizer, which a GGUF file needs; convert the model with its tokenizer")
    with tempfile.TemporaryDirectory(prefix="nemo_ee-") as temporary:
        written = Path(temporary)
        if not write_tokenizer(folder, written) or not (written / TOKENIZER_JSON).is_file():
            raise ValueError("the .nemo's tokenizer has no fast form (tokenizer.json), which a GGUF file is made of")
        whole = read_json_object(written / TOKENIZER_JSON, wide_integers=True)
        tokenizer = JsonTokenizer(written)
    try:
        return _keys(whole, tokenizer, vocab_size, ends)
    except ValueError as problem:
        raise ValueError(f"the tokenizer cannot be written for llama.cpp: {problem}") from None


def _keys(whole: Mapping[str, Any], tokenizer: JsonTokenizer, vocab_size: int, ends: Sequence[int]) -> dict[str, Any]:
    model = whole["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"it is a {model.get('type')} model, and only BPE has a counterpart")
    byte_level = "ByteLevel" in json.dumps(whole.get("decoder"))
    if not byte_level and not model.get("byte_fallback"):
        raise ValueError("it is neither byte-level nor SentencePiece's BPE with bytes for unknown characters")
    tokens, types = _tokens(whole, vocab_size, byte_level)
    ids = {token: number for number, token in enumerate(tokens)}
    keys: dict[str, Any] = {f"{GGML}model": BYTE_LEVEL if byte_level else SENTENCE_PIECE}
    keys |= _byte_level(whole) if byte_level else _sentence_piece(whole, tokens, types)
    keys |= {f"{GGML}tokens": tokens, f"{GGML}token_type": types}
    keys |= _special(tokenizer, ids, ends)
    template = tokenizer.chat_template
    if isinstance(template, str):
        keys[CHAT_TEMPLATE] = template
    elif template:
        names = [name for name in template if name != "default"]
        keys |= {f"{CHAT_TEMPLATE}.{name}": template[name] for name in names}
        keys |= {f"{CHAT_TEMPLATE}s": names} if names else {}
        keys |= {CHAT_TEMPLATE: template["default"]} if "default" in template else {}
    return keys


def _tokens(whole: Mapping[str, Any], vocab_size: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """Every token and its type; ids without a token are unused."""
    tokens, types = [f"[PAD{number}]" for number in range(vocab_size)], [UNUSED] * vocab_size
    for token, number in whole["model"]["vocab"].items():
        if number < vocab_size:
            byte = not byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            unknown = not byte_level and token == whole["model"].get("unk_token")
            tokens[number], types[number] = token, UNKNOWN if unknown else BYTE if byte else NORMAL
    around = []
    for added in whole.get("added_tokens") or ():
        if added["id"] < vocab_size:
            number = added["id"]
            tokens[number] = added["content"]
            if types[number] != UNKNOWN:
                types[number] = CONTROL if added.get("special") else USER_DEFINED
            around += [added["content"]] if any(added.get(key) for key in ("lstrip", "rstrip", "single_word")) else []
    if around:
        logger.warning("llama.cpp ignores the rules for spaces around added tokens: %s", ", ".join(around[:8]))
    if len(set(tokens)) != vocab_size:
        raise ValueError("two ids have the same token")
    return tokens, types


def _special(tokenizer: JsonTokenizer, ids: Mapping[str, int], ends: Sequence[int]) -> dict[str, Any]:
    """Ids of special tokens, and whether the begin- and end-of-text token are put around a text."""
    roles = {role: ids[text] for role, text in tokenizer.special_tokens.items() if role in ROLES and text in ids}
    ends = [number for number in ends if number < len(ids)]
    ends.sort(key=lambda number: number != roles.get("eos_token"))  # stable: the tokenizer's own first
    if not ends:
        raise ValueError("no token ends a text (eos_token_id), and llama.cpp would take one of its own choice")
    roles["eos_token"] = ends[0]
    keys = {f"{GGML}{ROLES[role][0]}": number for role, number in roles.items()}
    keys |= {f"{GGML}{key}": number for key, number in zip(ENDS, ends[1:], strict=False)}
    plain, full = (tokenizer("x", add_special_tokens=added)["input_ids"] for added in (False, True))
    start = next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), None)
    front, back = ([], []) if start is None else (full[:start], full[start + len(plain) :])
    if start is None or front not in ([], [roles.get("bos_token")]) or back not in ([], [roles["eos_token"]]):
        raise ValueError(f"it puts tokens around a text other than begin and end of text ({full} for {plain})")
    return keys | {f"{GGML}add_bos_token": bool(front), f"{GGML}add_eos_token": bool(back)}


def _normalizers(part: Any) -> list[dict[str, Any]]:
    if not part:
        return []
    return [one for inner in part["normalizers"] for one in _normalizers(inner)] if "normalizers" in part else [part]


def _byte_level(whole: Mapping[str, Any]) -> dict[str, Any]:
    others = [one["type"] for one in _normalizers(whole.get("normalizer")) if one["type"] != "NFC"]
    if others:
        raise ValueError(f"it changes text before ({', '.join(others)}), which llama.cpp does not")
    split = split_of(whole)
    if split is None:
        found = json.dumps(whole.get("pre_tokenizer"), ensure_ascii=False)
        merged = " with ignore_merges" if whole["model"].get("ignore_merges") else ""
        raise ValueError(f"llama.cpp has no name for the way in which it splits text into words{merged}: {found}")
    merges = [one if isinstance(one, str) else " ".join(one) for one in whole["model"]["merges"]]
    return {f"{GGML}pre": split.names[0], f"{GGML}merges": merges or [_NO_MERGE]}


def _sentence_piece(whole: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    front = [one for one in _normalizers(whole.get("normalizer")) if one["type"] != "Replace"]
    splitter = whole.get("pre_tokenizer") or {}
    if splitter.get("type") not in (None, "Metaspace") or any(one["type"] != "Prepend" for one in front):
        raise ValueError("it changes or splits text in another way than SentencePiece's BPE")
    prefixed = bool(front) or splitter.get("prepend_scheme", "never") != "never"
    if splitter.get("prepend_scheme") == "first":
        logger.warning("llama.cpp puts a space in front of text after each special token, this tokenizer only once")
    pieces = dict.fromkeys(token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL)
    merges = [tuple(one.split(" ") if isinstance(one, str) else one) for one in whole["model"]["merges"]]
    made = ["".join(pair) for pair in merges]
    ranked = list(dict.fromkeys(made))
    in_order = sum(one != other for one, other in zip(made, made[1:], strict=False)) + bool(made) == len(ranked)
    known = set(merges)
    if not in_order or any(pair not in known for piece in pieces for pair in piece_splits(piece, pieces)):
        raise ValueError("its merges are not SentencePiece's (every pair of tokens that makes a token, by its score)")
    ranks = {piece: -float(rank) for rank, piece in enumerate(ranked)}
    scores = [ranks.get(token, -float(len(ranked))) for token in tokens]
    return {f"{GGML}pre": "default", f"{GGML}scores": scores, f"{GGML}add_space_prefix": prefixed}
