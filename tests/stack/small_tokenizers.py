# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of the kinds that the supported families have, and texts for them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "  two spaces,\ttab\n\n\nand lines  ",
    "naïve café, Straße, Ωμέγα, привет, 東京タワー, 🙂👩‍🚀",
    "1234567890 3.14 don't I'LL we've",
    "<|tool|> between <|end|> added<|end|>tokens </s>",
    "",
]
CHAT = [
    {"role": "system", "content": "Answer in French."},
    {"role": "user", "content": "What is 東京?"},
    {"role": "assistant", "content": "Une ville.\n"},
]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_ADDED = ["<|start|>", "<|end|>"]
_SPLIT = (  # as Qwen2 and Llama 3 split text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def save_tokenizer(directory: Path, kind: str) -> None:
    """Write a tokenizer as a model's directory has it. `kind`: a key of `KINDS`."""
    directory.mkdir(parents=True)
    tokenizer, settings = KINDS[kind]()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in _ADDED])
    tokenizer.add_tokens([AddedToken("<|tool|>", normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    decoder = {str(i): _described(token) for i, token in tokenizer.get_added_tokens_decoder().items()}
    settings |= {"added_tokens_decoder": decoder, "additional_special_tokens": _ADDED, "chat_template": TEMPLATE}
    settings["clean_up_tokenization_spaces"] = False
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    family = {"qwen": "qwen2", "gpt2": "gpt2"}.get(kind, "llama")
    (directory / "config.json").write_text(json.dumps({"model_type": family}))
    if kind in ("qwen", "gpt2"):
        inner = json.loads((directory / "tokenizer.json").read_text())["model"]
        (directory / "vocab.json").write_text(json.dumps(inner["vocab"]))
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in inner["merges"]]
        (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")


def _described(token: AddedToken) -> dict:
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {key: getattr(token, key) for key in keys}


def _bytes(split: str | None, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = (
        level if split is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    )
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer


def _prefixed() -> tuple[Tokenizer, dict]:
    """A space before the first word; transformers 4 reads that from the config alone, transformers 5 from here."""
    tokenizer = _bytes(None, ["</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True, "eos_token": "</s>"}


def _gpt2() -> tuple[Tokenizer, dict]:
    end = "<|endoftext|>"
    tokens = {"bos_token": end, "eos_token": end, "unk_token": end}
    return _bytes(None, [end]), {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **tokens}


def _qwen() -> tuple[Tokenizer, dict]:
    tokenizer, end = _bytes(_SPLIT, ["<|endoftext|>"]), "<|endoftext|>"
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer, {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": end, "pad_token": end}


def _llama3() -> tuple[Tokenizer, dict]:
    tokenizer = _bytes(_SPLIT, ["<s>", "</s>"])
    front = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), front])
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


def _llama2() -> tuple[Tokenizer, dict]:
    """SentencePiece's: a space is ▁, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({"▁", *"".join(TEXTS).replace(" ", "")} - set("東京タワー🙂👩🚀\t\n\u200d"))
    merges = [("▁", "a"), ("▁a", "n"), ("▁an", "d"), ("r", "e"), ("re", "t"), ("t", "o"), ("▁", "▁")]
    words = [*pieces, *letters, *("".join(pair) for pair in merges)]
    model = models.BPE(
        vocab={word: index for index, word in enumerate(dict.fromkeys(words))},
        merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True,
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    front = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = front
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tokenizer, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True, **tokens}


KINDS = {"gpt2": _gpt2, "qwen": _qwen, "llama3": _llama3, "llama2": _llama2, "prefixed": _prefixed}
