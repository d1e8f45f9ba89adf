# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's names (`tokenizer.ggml.pre`) for the rules by which byte-level BPE tokenizers split text into words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_NUMBERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}{_AFTER_NUMBERS}"
_QWEN2 = rf"{_WORDS}|\p{{N}}{_AFTER_NUMBERS}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class Split:
    """A rule.

    Attributes:
        names: llama.cpp's names of it; the first is written.
        regex: what the words are, in tokenizer.json's `Split`; None = those of GPT-2, in its `ByteLevel`.
        single_digits: whether every digit is a word, in tokenizer.json's `Digits`.
        nfc: whether text is normalised before; llama.cpp does not, and its tokens differ for text that is not.
        ignore_merges: whether a word that is a token is not merged from its parts.
        add_bos: whether llama.cpp puts the begin-of-text token in front by default.
    """

    names: tuple[str, ...]
    regex: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> dict[str, Any]:
        """`pre_tokenizer` of tokenizer.json."""
        parts: list[dict[str, Any]] = []
        if self.single_digits:
            parts.append({"type": "Digits", "individual_digits": True})
        if self.regex is not None:
            parts.append({"type": "Split", "pattern": {"Regex": self.regex}, "behavior": "Isolated", "invert": False})
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.regex is None}
        return {"type": "Sequence", "pretokenizers": [*parts, level]} if parts else level


SPLITS = (
    Split(names=("gpt-2", "phi-2", "mpt", "olmo", "jais")),
    Split(names=("smollm", "starcoder", "refact", "command-r", "codeshell"), single_digits=True),
    Split(
        names=("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"),
        regex=_LLAMA3, ignore_merges=True, add_bos=True,
    ),
    Split(names=("dbrx", "smaug-bpe"), regex=_LLAMA3),
    Split(names=("qwen2", "hunyuan"), regex=_QWEN2, nfc=True),
    Split(names=("deepseek-r1-qwen", "stablelm2", "megrez"), regex=_QWEN2),
    Split(names=("tekken",), regex=_TEKKEN, ignore_merges=True, add_bos=True),
)  # fmt: skip


def split_named(name: Any) -> Split | None:
    """The rule with a name of llama.cpp; None for an unknown one."""
    return next((split for split in SPLITS if name in split.names), None)


def split_of(tokenizer: Mapping[str, Any]) -> Split | None:
    """The rule of a byte-level tokenizer.json; None if llama.cpp has no name for it.

    A rule differs from another in NFC alone only if text is not normalised, so NFC decides last.
    """
    found = _parts(tokenizer.get("pre_tokenizer"))
    merges = bool(tokenizer["model"].get("ignore_merges"))
    same = [one for one in SPLITS if _parts(one.pre_tokenizer()) == found and one.ignore_merges == merges]
    nfc = "NFC" in str(tokenizer.get("normalizer"))
    return next((one for one in same if one.nfc == nfc), next(iter(same), None))


def _parts(part: Any) -> list[dict[str, Any]]:
    """The pre-tokenizers of tokenizer.json one after the other, without keys that change no word."""
    if not isinstance(part, Mapping):
        return []
    if part.get("type") == "Sequence":
        return [one for inner in part.get("pretokenizers", []) for one in _parts(inner)]
    defaults = {"ByteLevel": {"use_regex": True}}.get(str(part.get("type")), {})
    return [{**defaults, **{key: value for key, value in part.items() if key != "trim_offsets"}}]
