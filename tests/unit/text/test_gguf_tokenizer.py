# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a GGUF file gives the tokens and texts of the tokenizer that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_ee.text.gguf_tokenizer import special_ids, tokenizer_files
from nemo_ee.text.llama_cpp_splits import SPLITS, split_named, split_of
from nemo_ee.text.tokenizer_json import JsonTokenizer
from tests.helpers.gguf_tokenizers import KINDS, tokenizer_and_metadata
from tests.stack.small_tokenizers import CHAT, TEXTS

MORE = [*TEXTS, "<|start|>user\n x<|end|>", "retan to\u2581x", "é\u0301 1a22b333\r\n\r\n  x"]


def written(folder: Path, metadata: dict[str, Any]) -> Path:
    folder.mkdir()
    for name, values in tokenizer_files(metadata, len(metadata["tokenizer.ggml.tokens"])).items():
        (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_same_tokens_and_texts(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = written(tmp_path / "made", tokenizer_and_metadata(tmp_path / "original", kind))
    # Not AutoTokenizer: transformers 5 makes its own tokenizer of the vocabulary of a LlamaTokenizer.
    original = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "original")
    assert JsonTokenizer.reads(folder)
    for tokenizer in (JsonTokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)):
        for text in MORE:
            for added in (True, False):
                ids = original(text, add_special_tokens=added)["input_ids"]
                assert tokenizer(text, add_special_tokens=added)["input_ids"] == ids, text
            for skip in (True, False):
                call = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
                assert tokenizer.decode(ids, **call) == original.decode(ids, **call)
        chat = {"tokenize": False, "add_generation_prompt": True}
        assert tokenizer.apply_chat_template(CHAT, **chat) == original.apply_chat_template(CHAT, **chat)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (original.bos_token_id, original.eos_token_id)


def test_control_another_rule_for_words_gives_other_tokens(tmp_path: Path) -> None:
    metadata = tokenizer_and_metadata(tmp_path / "original", "qwen")
    one = JsonTokenizer(written(tmp_path / "one", metadata))
    other = JsonTokenizer(written(tmp_path / "other", metadata | {"tokenizer.ggml.pre": "gpt-2"}))
    assert any(one(text) != other(text) for text in MORE)


def test_a_small_score_merges_late(tmp_path: Path) -> None:
    """SentencePiece merges the pair with the largest score first, wherever it is."""
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "c", "ab", "bc"]
    keys = {"model": "llama", "tokens": tokens, "token_type": [2, 3, 3] + [1] * 6, "add_bos_token": False}
    for scores, expected in (((-1.0, -2.0), ["\u2581", "ab", "c"]), ((-2.0, -1.0), ["\u2581", "a", "bc"])):
        metadata = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
        metadata["tokenizer.ggml.scores"] = [0.0] * 7 + [*scores]
        tokenizer = JsonTokenizer(written(tmp_path / str(scores), metadata))
        assert [tokens[number] for number in tokenizer("abc")["input_ids"]] == expected


def test_several_chat_templates(tmp_path: Path) -> None:
    metadata = tokenizer_and_metadata(tmp_path / "original", "gpt2")
    metadata |= {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "{{ tools }}"}
    template = JsonTokenizer(written(tmp_path / "made", metadata)).chat_template
    assert template == {"tool_use": "{{ tools }}", "default": metadata["tokenizer.chat_template"]}


def test_special_tokens(tmp_path: Path) -> None:
    keys = {"model": "llama", "tokens": ["a", "b", "c", "d"], "eot_token_id": 3, "eom_token_id": 2}
    ids, ends = special_ids({f"tokenizer.ggml.{name}": value for name, value in keys.items()})
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}, "llama.cpp's defaults for this model"
    assert ends == [2, 3]
    ids, ends = special_ids({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"]})
    assert set(ids.values()) == {None} and ends == []


def test_every_rule_for_words_is_found_again() -> None:
    for split in SPLITS:
        normalizer = {"type": "NFC"} if split.nfc else None
        whole = {"pre_tokenizer": split.pre_tokenizer(), "normalizer": normalizer}
        assert split_of({**whole, "model": {"ignore_merges": split.ignore_merges}}) is split
        assert all(split_named(name) is split for name in split.names)
    names = [name for split in SPLITS for name in split.names]
    assert len(set(names)) == len(names)
    assert split_of({"pre_tokenizer": {"type": "Whitespace"}, "model": {}}) is None
    assert split_of({"pre_tokenizer": None, "model": {}}) is None


REFUSED = {
    "unigram": ({"model": "t5"}, "supported are gpt2"),
    "words": ({"pre": "superbpe"}, "so how it splits text into words is not known"),
    "no tokens": ({"tokens": None}, "not a list of texts"),
    "twice": ({"tokens": ["a", "a"]}, "has a token twice"),
    "types": ({"token_type": [1]}, "token_type has 1 entries"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_refused(problem: str, tmp_path: Path) -> None:
    changes, message = REFUSED[problem]
    metadata = tokenizer_and_metadata(tmp_path / "original", "gpt2")
    size = len(metadata["tokenizer.ggml.tokens"])
    with pytest.raises(ValueError, match=message):
        tokenizer_files(metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}, size)
