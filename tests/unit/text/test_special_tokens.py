# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What ends a text, against transformers' `generate` on the same files; what a prompt begins with, against lm-eval's
`hf` on the same tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is the reference here")

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from nemo_ee.families.registry import FAMILIES
from nemo_ee.text.special_tokens import end_of_text, end_of_text_of, prompt_ids, token_of

TOKENIZER_ID = 7
NO_FILE, NO_KEY = type("NoFile", (), {}), type("NoKey", (), {})  # their names are those of the tests


def write(folder: Path, name: str, value: Any, **others: Any) -> None:
    """A JSON file with this `eos_token_id`."""
    if value is not NO_FILE:
        values = others | ({} if value is NO_KEY else {"eos_token_id": value})
        (folder / name).write_text(json.dumps(values))


def transformers_ends(folder: Path) -> list[int]:
    """The end tokens of a directory's model in transformers, as `from_pretrained` sets them."""
    try:
        config = GenerationConfig.from_pretrained(folder)
    except OSError:
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))
    ends = config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [NO_KEY, None, 5, [5, 6], 0], ids=str)
@pytest.mark.parametrize("generation", [NO_FILE, NO_KEY, None, 3, [0, 12], [12]], ids=str)
def test_a_text_ends_where_transformers_ends_it(family: str, config: Any, generation: Any, tmp_path: Path) -> None:
    """Where transformers knows no end, config.json's and then the tokenizer's counts."""
    write(tmp_path, "config.json", config, model_type=family)
    write(tmp_path, "generation_config.json", generation)
    expected = transformers_ends(tmp_path)
    if not expected:
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        expected = transformers_ends(tmp_path) or [TOKENIZER_ID]
    found = end_of_text_of(tmp_path, TOKENIZER_ID)
    assert list(found.ids) == expected
    assert (found.differs is None) == (TOKENIZER_ID in expected)


def test_without_files_the_tokenizer_s_token_ends_a_text(tmp_path: Path) -> None:
    assert end_of_text_of(tmp_path, TOKENIZER_ID).ids == (TOKENIZER_ID,)
    assert end_of_text_of(tmp_path, None).ids == () and end_of_text_of(tmp_path, None).differs is None


def test_tokens_outside_of_the_vocabulary_end_nothing() -> None:
    """GPT-2's default, 50256, is in no small vocabulary."""
    assert end_of_text({"eos_token_id": [40, 3, 3, -1]}, None, 7, vocab_size=32).ids == (3,)
    assert end_of_text(None, {"model_type": "gpt2"}, 7, vocab_size=32).ids == (7,)
    assert end_of_text(None, {"model_type": "gpt2"}, 7).ids == (50256,)
    nothing = end_of_text(None, None, 50256, vocab_size=32)
    assert nothing.ids == () and "nothing ends a text: the tokenizer's end-of-text token" in nothing.differs


@pytest.mark.parametrize("value", ["2", True, [0, "12"], {"id": 2}, 2.0])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_token_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    write(tmp_path, name, value)
    with pytest.raises(ValueError, match=rf"{name}: eos_token_id=.* must be a token id, a list of token ids, or null"):
        end_of_text_of(tmp_path, None)


@pytest.mark.parametrize("text", ["", "[1]", '{"eos_token_id": 3', "[" * 100_000])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="generation_config.json:1: .*; fetch or write the file again"):
        end_of_text_of(tmp_path, 3)


@pytest.mark.parametrize("role", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_key_is_the_class_s_default(family: str, role: str) -> None:
    assert token_of({"model_type": family}, role) == getattr(AutoConfig.for_model(family), role)
    assert token_of({"model_type": family, role: None}, role) is None


# -- begin-of-text --------------------------------------------------------------------------------------------------


def tokenizer(*, adds_bos: bool, adds_eos: bool = False, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """A tokenizer of words; `adds_bos`: as Llama's, else as GPT-2's."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "hello", "world", "s"])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    template = " ".join(["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos)
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="</s>", unk_token="<unk>")


TEXTS = ["hello world", "<s>hello", "<s> hello", "<s>", "<s><s>hello", "hello <s> world", "</s>hello", " hello", ""]


@pytest.mark.parametrize("adds_eos", [False, True], ids=["", "adds_eos"])
@pytest.mark.parametrize("adds_bos", [False, True], ids=["plain", "adds_bos"])
@pytest.mark.parametrize("add_bos", [None, False, True])
def test_a_prompt_s_tokens_are_those_of_lm_eval_s_hf(adds_bos: bool, adds_eos: bool, add_bos: bool | None) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    from types import SimpleNamespace

    from tests.helpers.lm_eval_hf import hugging_face_module

    own = tokenizer(adds_bos=adds_bos, adds_eos=adds_eos)
    whom = SimpleNamespace(tokenizer=own, add_bos_token=add_bos, prefix_token_id=own.bos_token_id)
    for text in TEXTS:
        expected = hugging_face_module().HFLM.tok_encode(whom, text)
        if add_bos and not adds_bos and expected[:1] != [1]:
            expected = [1, *own.encode(text, add_special_tokens=False)]  # lm-eval cannot make a tokenizer add one
        elif add_bos:
            expected = expected[: len(expected) - (adds_eos and expected[-1] == 2)]
        assert prompt_ids(own, text, add_bos) == expected, text


def test_a_begin_of_text_token_that_is_typed_is_the_only_one() -> None:
    """The same ids, typed or added."""
    for own in (tokenizer(adds_bos=True), tokenizer(adds_bos=False)):
        for add_bos in (None, True):
            assert prompt_ids(own, "<s>hello", add_bos) == [1, 3]
    assert prompt_ids(tokenizer(adds_bos=True), "hello") == [1, 3], "as Llama's"
    assert prompt_ids(tokenizer(adds_bos=False), "hello") == [3], "as GPT-2's"
    assert prompt_ids(tokenizer(adds_bos=False, bos=None), "hello") == [3]
