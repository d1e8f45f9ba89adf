# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of single bytes, in the format that `transformers.AutoTokenizer` loads without any code of ours.

Id 0..255 is the byte of that value in the text's UTF-8, id 256 `<|endoftext|>` (begin, end and padding). The file is
a byte-level BPE with no merges, so every byte stays a token of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy

END = 256
NUM_TOKENS = 257
END_TOKEN = "<|endoftext|>"


def byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte value (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    characters, shifted = [], 0
    for value in range(256):
        if value in printable:
            characters.append(chr(value))
        else:
            characters.append(chr(256 + shifted))
            shifted += 1
    return characters


def encode(text: str) -> numpy.ndarray:
    """Token ids of a document with its end token: `[bytes + 1]`, uint16."""
    ids = numpy.frombuffer(text.encode("utf-8"), dtype=numpy.uint8).astype(numpy.uint16)
    return numpy.append(ids, numpy.uint16(END))


def write_byte_tokenizer(directory: str | Path, max_length: int) -> None:
    """Write `tokenizer.json` and its two companions.

    Args:
        directory: existing directory of the model.
        max_length: context of the model in tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: value for value, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_TOKEN, special=True, normalized=False)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(directory))
