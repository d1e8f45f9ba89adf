# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of an export without transformers, against transformers on the same directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is the reference here")

from jinja2 import TemplateError
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from nemo_ee.text.tokenizer_json import JsonTokenizer
from tests.unit.text.test_huggingface_json import (
    IS_OLD,
    TEXT,
    as_transformers_5_saves,
    change_tokenizer_config,
    tokenizer_of,
)

ROOT = Path(__file__).parents[3]
REFERENCE_MODELS = (ROOT / "assets" / "reference-model", ROOT / "assets" / "reference-model-bytes")
TEXTS = (TEXT, "", " a", "x</s>y<|end|> <|tool|>z", "def f(x):\n\treturn 'ü€😀' \r\n\x00 end", "e\u0301 \u200b日本")
# These directories have two descriptions that differ. Exports have one (tests/stack/transformers).
reading_of_transformers_4 = pytest.mark.skipif(not IS_OLD, reason="transformers 5 reads another file first")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}<{{ m.role }}>"
    "{% generation %}{{ m.content | trim }}{% endgeneration %}{{ eos_token }}\n"
    "{% endfor %}{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}"
    "    {% if add_generation_prompt %}<assistant>{% if deep %}{{ deep }}{% endif %}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": " <é> "}]
TOOLS = [{"type": "function", "function": {"name": "wetter", "description": "Größe <b>"}}]


def same(directory: Path, texts: tuple[str, ...] = TEXTS) -> JsonTokenizer:
    """Compare with transformers on these texts; returns the tokenizer."""
    assert JsonTokenizer.reads(directory)
    ours, theirs = JsonTokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in texts:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours(text, add_special_tokens=special)["input_ids"] == ids
            kind = {"skip_special_tokens": special, "clean_up_tokenization_spaces": False}
            assert ours.decode(ids, **kind) == theirs.decode(ids, **kind)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    return ours


@pytest.mark.parametrize("directory", REFERENCE_MODELS, ids=lambda path: path.name)
def test_the_reference_models(directory: Path) -> None:
    same(directory)


@reading_of_transformers_4
def test_tokens_of_tokenizer_config_are_added(tmp_path: Path) -> None:
    tokenizer_of(tmp_path)
    added = {"content": "<|new|>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    known = len(JsonTokenizer(tmp_path)._backend.get_vocab())
    change_tokenizer_config(
        tmp_path,
        added_tokens_decoder={**stored, str(known): {**added, "special": True}},
        additional_special_tokens=["<|end|>", "<|other|>"],
        pad_token="<|pad|>",
    )
    ours = same(tmp_path, (*TEXTS, "a <|new|> b<|other|>c<|pad|>"))
    assert ours("<|new|>", add_special_tokens=False)["input_ids"] == [known]


@reading_of_transformers_4
@pytest.mark.parametrize("prefix", [True, False])
def test_a_prefix_space_is_added_as_the_config_says(prefix: bool, tmp_path: Path) -> None:
    saved = tokenizer_of(tmp_path)
    saved.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not prefix)
    saved.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    change_tokenizer_config(tmp_path, add_prefix_space=prefix)
    ours = same(tmp_path)
    assert len(ours("a")["input_ids"]) == 1 + prefix


def test_a_directory_of_transformers_5(tmp_path: Path) -> None:
    expected = tokenizer_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    as_transformers_5_saves(tmp_path)
    assert JsonTokenizer.reads(tmp_path)
    assert [JsonTokenizer(tmp_path)(text)["input_ids"] for text in TEXTS] == [expected(t)["input_ids"] for t in TEXTS]


def test_settings_for_training_have_no_effect(tmp_path: Path) -> None:
    """Truncation and padding in tokenizer.json: transformers switches them off for every call without them."""
    saved = tokenizer_of(tmp_path)
    saved.backend_tokenizer.enable_truncation(2)
    saved.backend_tokenizer.enable_padding(length=9)
    saved.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    same(tmp_path)


@pytest.mark.parametrize(
    "variables",
    [{}, {"tools": TOOLS}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "deep": "<think>"}],
    ids=str,
)
def test_conversations_are_written_alike(variables: dict[str, Any], tmp_path: Path) -> None:
    tokenizer_of(tmp_path)
    change_tokenizer_config(tmp_path, chat_template=TEMPLATE)
    ours, theirs = JsonTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, **variables)
    assert ours.apply_chat_template(MESSAGES, **variables) == text and "<é>" in text


def test_named_templates_and_the_template_file(tmp_path: Path) -> None:
    tokenizer_of(tmp_path)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    change_tokenizer_config(tmp_path, chat_template=named)
    ours = JsonTokenizer(tmp_path)
    assert ours.apply_chat_template(MESSAGES) == "plain"
    assert ours.apply_chat_template(MESSAGES, tools=TOOLS) == "with tools"
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no ' + messages[0].role) }}")
    with pytest.raises(TemplateError, match="no system"):
        JsonTokenizer(tmp_path).apply_chat_template(MESSAGES)


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    tokenizer_of(tmp_path)
    for template in ("{{ messages.__class__.__mro__ }}", "{% set _ = messages.append(1) %}"):
        change_tokenizer_config(tmp_path, chat_template=template)
        with pytest.raises(Exception, match="unsafe|immutable|not safely callable"):
            JsonTokenizer(tmp_path).apply_chat_template(MESSAGES)


@reading_of_transformers_4
def test_other_classes_are_not_read_and_damaged_files_refused(tmp_path: Path) -> None:
    tokenizer_of(tmp_path)
    change_tokenizer_config(tmp_path, tokenizer_class="LlamaTokenizerFast")
    assert not JsonTokenizer.reads(tmp_path)
    change_tokenizer_config(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    change_tokenizer_config(tmp_path, added_tokens_decoder=[1])
    with pytest.raises(ValueError, match="the tokenizer is damaged .*; write it again"):
        JsonTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="the tokenizer is damaged .*; write it again"):
        JsonTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert not JsonTokenizer.reads(tmp_path)
