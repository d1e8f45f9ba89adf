# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer in the metadata of a GGUF file as tokenizer.json and tokenizer_config.json.

    tokenizer.ggml.model   gpt2    byte-level BPE: merges, and a named rule that splits text into words (`pre`)
                           llama   SentencePiece's BPE: two tokens are merged into the one with the largest score

The result is a `PreTrainedTokenizerFast` for both, which transformers 4.51 to 5 load unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_ee.text.llama_cpp_splits import SPLITS, split_named

GGML, CHAT_TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
BYTE_LEVEL, SENTENCE_PIECE = "gpt2", "llama"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
SPACE = "\u2581"
# Role in tokenizer_config.json -> key of its id, and the id that llama.cpp assumes for `llama` without the key.
ROLES = {
    "bos_token": ("bos_token_id", 1),
    "eos_token": ("eos_token_id", 2),
    "unk_token": ("unknown_token_id", 0),
    "pad_token": ("padding_token_id", None),
    "sep_token": ("seperator_token_id", None),  # spelled like this in the format
    "cls_token": ("cls_token_id", None),
    "mask_token": ("mask_token_id", None),
}
# Ends of a turn and of a message, which end a text besides the end-of-text token.
ENDS = ("eot_token_id", "eom_token_id")


def tokenizer_files(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json.

    Args:
        metadata: the file's keys.
        vocab_size: number of rows of the model's embeddings.

    Raises:
        ValueError: no tokenizer, one of another kind, or damaged metadata.
    """
    tokens = metadata.get(f"{GGML}tokens")
    types = metadata.get(f"{GGML}token_type") or [NORMAL] * len(tokens or ())
    problem = _problem(metadata, tokens, types, vocab_size)
    if problem:
        raise ValueError(f"its tokenizer is not supported: {problem}")
    special = {role: tokens[number] for role, number in _role_ids(metadata).items()}
    added = [
        {
            "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind in (CONTROL, UNKNOWN) or token in special.values(),
        }
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) or token in special.values()
    ]  # fmt: skip
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    kind = metadata[f"{GGML}model"]
    whole |= (_byte_level if kind == BYTE_LEVEL else _sentence_piece)(metadata, tokens, types, special)
    return {"tokenizer.json": whole, "tokenizer_config.json": _config(metadata, added, special)}


def special_ids(metadata: Mapping[str, Any]) -> tuple[dict[str, int | None], list[int]]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, None if not given; and all tokens that end a text."""
    roles = _role_ids(metadata)
    ids = {f"{role}_id": roles.get(role) for role in ("bos_token", "eos_token", "pad_token")}
    ends = [ids["eos_token_id"], *(metadata.get(f"{GGML}{key}") for key in ENDS)]
    return ids, [one for one in dict.fromkeys(ends) if one is not None]


def _role_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    assumed = metadata.get(f"{GGML}model") == SENTENCE_PIECE
    ids = {role: metadata.get(f"{GGML}{key}", default if assumed else None) for role, (key, default) in ROLES.items()}
    count = len(metadata.get(f"{GGML}tokens") or ())
    return {role: number for role, number in ids.items() if isinstance(number, int) and 0 <= number < count}


def _problem(metadata: Mapping[str, Any], tokens: Any, types: Sequence[int], vocab_size: int) -> str | None:
    kind, pre = metadata.get(f"{GGML}model"), metadata.get(f"{GGML}pre")
    if kind not in (BYTE_LEVEL, SENTENCE_PIECE):
        supported = f"{BYTE_LEVEL} (byte-level BPE) and {SENTENCE_PIECE} (SentencePiece's BPE)"
        return f"{GGML}model is {kind!r}, supported are {supported}"
    if kind == BYTE_LEVEL and split_named(pre) is None:
        known = ", ".join(name for split in SPLITS for name in split.names)
        return f"{GGML}pre is {pre!r}, so how it splits text into words is not known; supported are {known}"
    if not isinstance(tokens, list) or not tokens or not all(isinstance(one, str) for one in tokens):
        return f"{GGML}tokens is not a list of texts"
    if len(set(tokens)) != len(tokens):
        return f"{GGML}tokens has a token twice; fetch the file again"
    counts = {"tokens": len(tokens), "token_type": len(types)}
    if kind == SENTENCE_PIECE:
        counts["scores"] = len(metadata.get(f"{GGML}scores") or ())
    wrong = [f"{GGML}{name} has {count} entries" for name, count in counts.items() if count != vocab_size]
    return f"{', '.join(wrong)}, the embeddings have {vocab_size} rows; fetch the file again" if wrong else None


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Token -> id; unused ids (padding of the embeddings) have no token."""
    return {token: n for n, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}


def _model(vocabulary: dict[str, int], merges: list[tuple[str, str]], **changes: Any) -> dict[str, Any]:
    fixed = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    fixed |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {**fixed, **changes, "vocab": vocabulary, "merges": merges}


def _around(metadata: Mapping[str, Any], special: Mapping[str, str], add_bos: bool) -> dict[str, Any] | None:
    """The post-processor that puts begin- and end-of-text tokens around a text; None if there are none to put."""
    ids = _role_ids(metadata)
    front = ["bos_token"] if metadata.get(f"{GGML}add_bos_token", add_bos) and "bos_token" in special else []
    back = ["eos_token"] if metadata.get(f"{GGML}add_eos_token", False) and "eos_token" in special else []

    def around(name: str, kind: int) -> list[dict[str, Any]]:
        def put(role: str) -> dict[str, Any]:
            return {"SpecialToken": {"id": special[role], "type_id": kind}}

        return [*map(put, front), {"Sequence": {"id": name, "type_id": kind}}, *map(put, back)]

    if not front and not back:
        return None
    used = {
        special[role]: {"id": special[role], "ids": [ids[role]], "tokens": [special[role]]} for role in front + back
    }
    single, pair = around("A", 0), [*around("A", 0), *around("B", 1)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": used}


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], special: Mapping[str, str]
) -> dict[str, Any]:
    split, vocabulary = split_named(metadata[f"{GGML}pre"]), _vocabulary(tokens, types)
    merges = []
    for text in metadata.get(f"{GGML}merges") or ():
        left, _, right = text.partition(" ")
        if left in vocabulary and right in vocabulary and left + right in vocabulary:
            merges.append((left, right))  # llama.cpp cannot apply any other
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    around = _around(metadata, special, split.add_bos)
    return {
        "normalizer": {"type": "NFC"} if split.nfc else None,
        "pre_tokenizer": split.pre_tokenizer(),
        "post_processor": level if around is None else {"type": "Sequence", "processors": [level, around]},
        "decoder": level,
        "model": _model(vocabulary, merges, ignore_merges=split.ignore_merges),
    }


def _sentence_piece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], special: Mapping[str, str]
) -> dict[str, Any]:
    scores = metadata[f"{GGML}scores"]
    pieces = {token: scores[n] for n, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    ranked = sorted(pieces, key=lambda piece: -pieces[piece])  # stable
    merges = [pair for piece in ranked for pair in piece_splits(piece, pieces)]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    prefixed = metadata.get(f"{GGML}add_space_prefix", True)
    if prefixed:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    front = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
    unknown = {"unk_token": special.get("unk_token"), "fuse_unk": True, "byte_fallback": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*front, replaced]},
        "pre_tokenizer": None,
        "post_processor": _around(metadata, special, add_bos=True),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _model(_vocabulary(tokens, types), merges, **unknown),
    }


def piece_splits(piece: str, pieces: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of pieces that are merged into a piece."""
    pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
    return [(left, right) for left, right in pairs if left in pieces and right in pieces]


def _config(
    metadata: Mapping[str, Any], added: Sequence[dict[str, Any]], special: Mapping[str, str]
) -> dict[str, Any]:
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    template = metadata.get(CHAT_TEMPLATE)
    named = {name: metadata.get(f"{CHAT_TEMPLATE}.{name}") for name in metadata.get(f"{CHAT_TEMPLATE}s") or ()}
    named = {name: text for name, text in named.items() if text}
    if named:
        named |= {"default": template} if template else {}
        values["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    elif template:
        values["chat_template"] = template
    values["added_tokens_decoder"] = {
        str(one["id"]): {key: value for key, value in one.items() if key != "id"} for one in added
    }
    values |= {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}
    length = next((value for key, value in metadata.items() if key.endswith(".context_length")), None)
    return values | ({"model_max_length": length} if isinstance(length, int) else {})
