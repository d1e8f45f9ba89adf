# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of an export gives the ids and texts of the source's own class in 4.51."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nemo_ee.runtime.loader import load_tokenizer
from tests.stack.small_tokenizers import CHAT, KINDS, TEXTS, save_tokenizer


def assert_same(tokenizer: Any, expected: dict[str, Any]) -> None:
    ids = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert ids == expected["ids"]
    assert [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS] == expected["plain_ids"]
    assert [tokenizer.decode(own) for own in ids] == expected["texts"]
    texts = [tokenizer.decode(own, skip_special_tokens=True) for own in ids]
    assert texts == expected["texts_without_special"]
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == expected["chat_text"]
    chat = tokenizer.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True)
    assert list(chat if isinstance(chat, list) else chat["input_ids"]) == expected["chat"]
    assert {role: getattr(tokenizer, f"{role}_token_id") for role in expected["special"]} == expected["special"]
    assert set(tokenizer("x")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("load", [AutoTokenizer.from_pretrained, load_tokenizer], ids=["transformers", "nemo_ee"])
def test_ids_and_texts_of_an_export(kind: str, load: Any, exports: Path, tmp_path: Path) -> None:
    folder = exports / "tokenizers" / kind
    expected = json.loads((folder / "reference.json").read_text())
    assert_same(load(folder), expected)
    load(folder).save_pretrained(tmp_path / "saved")  # by the installed version, and read again
    shutil.copy(folder / "config.json", tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), expected)


def test_control_another_tokenizer_is_noticed(exports: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "other", "gpt2")
    expected = json.loads((exports / "tokenizers" / "llama3" / "reference.json").read_text())
    with pytest.raises(AssertionError):
        assert_same(AutoTokenizer.from_pretrained(tmp_path / "other"), expected)


def test_nemo_ee_reads_any_tokenizer_beside_a_qwen2(exports: Path, tmp_path: Path) -> None:
    """`AutoTokenizer` of transformers 5 would take Qwen2's own class."""
    shutil.copytree(exports / "tokenizers" / "llama3", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    assert_same(load_tokenizer(tmp_path / "model"), json.loads((tmp_path / "model" / "reference.json").read_text()))
