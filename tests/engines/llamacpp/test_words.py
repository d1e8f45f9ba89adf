# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Every named rule that splits text into words gives the tokens of llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from nemo_ee.checkpoint.gguf_source import GgufSource
from nemo_ee.text.llama_cpp_splits import SPLITS
from nemo_ee.text.tokenizer_json import JsonTokenizer
from tests.engines.llamacpp.server import serving
from tests.helpers.gguf_files import write_gguf
from tests.helpers.gguf_tokenizers import tokenizer_and_metadata
from tests.helpers.huggingface_models import save_tiny_model
from tests.stack.small_tokenizers import TEXTS

# Composed characters: llama.cpp does not normalise text.
MORE = [
    *TEXTS,
    "It'll, WE'VE 12345 12 1\r\n\r\n  x\t\ty",
    "camelCase HTTPServer/x a/b\n/c ",
    "snake_case__x  ...!?\n\n\n",
    " ",
    "zq zq",
]


def model_with_words(folder: Path, name: str) -> Path:
    """A tiny model whose tokenizer has merges across the borders of words, such as those of digits and spaces."""
    metadata = tokenizer_and_metadata(folder / "hf", "gpt2")
    metadata |= {"tokenizer.ggml.pre": name}
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    pairs = [
        "1 1",
        "1 2",
        "2 3",
        "12 3",
        "\u0120 \u0120",
        "\u010a \u010a",
        "\u010d \u010a",
        "' l",
        "'l l",
        "I T",
        "! ?",
    ]
    pairs += ["/ x", "l C"]
    added = [*("".join(pair.split()) for pair in pairs), "zq"]  # the last without merges
    new = [token for token in added if token not in tokens]
    metadata["tokenizer.ggml.tokens"] = [*tokens, *new]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], *[1] * len(new)]
    metadata["tokenizer.ggml.merges"] = [*merges, *(pair for pair in pairs if pair not in merges)]
    model = save_tiny_model(folder / "hf", "llama", vocab_size=len(tokens) + len(new))
    return write_gguf(folder / "model.gguf", model, tokenizer=metadata)


@pytest.mark.parametrize("name", [split.names[0] for split in SPLITS])
def test_tokens_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    path = model_with_words(tmp_path, name)
    GgufSource(path).write_model_files(tmp_path)
    tokenizer = JsonTokenizer(tmp_path)
    with serving(path) as server:
        for text in MORE:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert server.tokens(text, special=False) == ids, text


def test_control_the_rules_differ(tmp_path: Path) -> None:
    found = set()
    for split in SPLITS:
        folder = tmp_path / split.names[0]
        folder.mkdir()
        path = model_with_words(folder, split.names[0])
        GgufSource(path).write_model_files(folder)
        tokenizer = JsonTokenizer(folder)
        found.add(json.dumps([tokenizer(text, add_special_tokens=False)["input_ids"] for text in MORE]))
    assert len(found) == len(SPLITS) - 1, "all but the two that differ in NFC alone"
