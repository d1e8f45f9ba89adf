# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a `.nemo` as metadata of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from nemo_ee.export.gguf.vocabulary import vocabulary
from tests.helpers.gguf_tokenizers import KINDS, tokenizer_and_metadata

SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}


def change(folder: Path, **parts: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


@pytest.mark.parametrize("kind", KINDS)
def test_the_keys_are_those_of_the_tokenizer(kind: str, tmp_path: Path) -> None:
    wanted = tokenizer_and_metadata(tmp_path / "tokenizer", kind)
    size, eos = len(wanted["tokenizer.ggml.tokens"]), wanted["tokenizer.ggml.eos_token_id"]
    found = vocabulary(tmp_path / "tokenizer", size, [4, eos])
    if kind == "qwen":
        assert found.pop("tokenizer.ggml.unknown_token_id") == 0, "of the class in transformers"
    scores = found.pop("tokenizer.ggml.scores", None), wanted.pop("tokenizer.ggml.scores", None)
    if kind == "llama2":
        tokens = [list(dict(sorted(enumerate(own), key=lambda one: -one[1])))[:6] for own in scores]
        assert tokens[0] == tokens[1], "the same order of merges"
        assert found.pop("tokenizer.ggml.pre") == "default" and found.pop("tokenizer.ggml.add_space_prefix") is True
    expected = {"tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.eot_token_id": 4}
    assert found == wanted | expected


def test_a_tokenizer_without_merges_gets_one_that_never_applies(tmp_path: Path) -> None:
    metadata = tokenizer_and_metadata(tmp_path / "tokenizer", "gpt2")
    whole = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    bytes_alone = {token: i for token, i in whole["model"]["vocab"].items() if i < 257}
    change(tmp_path / "tokenizer", model={**whole["model"], "vocab": bytes_alone, "merges": []})
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "tokenizer" / name).unlink()
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    found = vocabulary(tmp_path / "tokenizer", 430, [0])
    (merge,) = found["tokenizer.ggml.merges"]
    assert not set(merge.split()) & set(metadata["tokenizer.ggml.tokens"])


SEQUENCES = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
START = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, SEQUENCES[0]],
    "pair": SEQUENCES,
    "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [420], "tokens": ["<|start|>"]}},
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "words": ("llama3", {"pre_tokenizer": SPLIT}, "no name for the way in which it splits text into words"),
    "normalizer": ("llama3", {"normalizer": {"type": "Lowercase"}}, "changes text before .Lowercase."),
    "prefix space": ("prefixed", {}, "no name for the way"),
    "around": ("llama3", {"post_processor": START}, "puts tokens around a text other than"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_refused(problem: str, tmp_path: Path) -> None:
    from tests.stack.small_tokenizers import save_tokenizer

    kind, changes, message = REFUSED[problem]
    save_tokenizer(tmp_path / "tokenizer", kind)
    change(tmp_path / "tokenizer", **changes)
    with pytest.raises(ValueError, match=f"cannot be written for llama.cpp: .*{message}"):
        vocabulary(tmp_path / "tokenizer", 430, [1])


def test_merges_that_no_scores_express_are_refused(tmp_path: Path) -> None:
    tokenizer_and_metadata(tmp_path / "tokenizer", "llama2")
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    model = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert vocabulary(tmp_path / "tokenizer", 420, [2])
    change(tmp_path / "tokenizer", model={**model, "merges": model["merges"][:-1]})
    with pytest.raises(ValueError, match="its merges are not SentencePiece's"):
        vocabulary(tmp_path / "tokenizer", 420, [2])


def test_no_tokenizer_and_no_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no tokenizer, which a GGUF file needs"):
        vocabulary(None, 420, [2])
    tokenizer_and_metadata(tmp_path / "tokenizer", "qwen")
    with pytest.raises(ValueError, match="no token ends a text"):
        vocabulary(tmp_path / "tokenizer", 430, [])
