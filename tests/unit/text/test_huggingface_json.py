# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The JSON of directories that transformers 4 and 5 save; the references are what the installed transformers makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is the reference here")

import transformers
from transformers import AutoTokenizer

from nemo_ee.runtime.loader import load_tokenizer
from nemo_ee.text.huggingface_json import readable_tokenizer_config, without_code
from nemo_ee.text.tokenizer_directory import readable_tokenizer
from tests.helpers.huggingface_models import as_transformers_5_saves

# Controls show what the installed transformers does without the code under test, if it is as old as NeMo's.
IS_OLD = int(transformers.__version__.split(".")[0]) < 5
TEXT = "def f(naïve):  # 東京 🙂\n    return '<|tool|>'<|end|>"


def test_keys_that_run_code_are_left_out_at_any_depth() -> None:
    evil = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "attn_implementation": "somebody/kernel"}
    evil |= {"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}, "_attn_implementation_internal": "somebody/kernel"}
    good = {"a": 1, "b": [{"c": None}], "model_max_length": 7}
    assert without_code({**good, **evil, "b": [{"c": None, **evil}]}) == good


# -- tokenizers -----------------------------------------------------------------------------------------------------


def tokenizer_of(directory: Path, **settings: Any) -> Any:
    """Save a tokenizer with added tokens as the installed transformers saves it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, **{letter: 2 + i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}}
    inner = Tokenizer(models.BPE(vocab=words, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    inner.add_tokens([AddedToken("<|tool|>", normalized=False)])
    given = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|end|>"], **settings}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **given)
    tokenizer.save_pretrained(directory)
    return tokenizer


def change_tokenizer_config(directory: Path, **changes: Any) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    values = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
    path.write_text(json.dumps(values))
    return values


def test_a_tokenizer_of_transformers_5_gives_the_same_ids_and_text(tmp_path: Path) -> None:
    expected = tokenizer_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    as_transformers_5_saves(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    if IS_OLD:
        with pytest.raises(ValueError, match="TokenizersBackend does not exist"):
            AutoTokenizer.from_pretrained(tmp_path)  # control
    found = load_tokenizer(tmp_path)
    assert found(TEXT).input_ids == expected(TEXT).input_ids
    assert found.decode(found(TEXT).input_ids) == TEXT
    assert found.decode(found(TEXT).input_ids, skip_special_tokens=True) == TEXT.removesuffix("<|end|>")
    if IS_OLD:  # transformers 5 knows them from tokenizer.json alone
        assert found.additional_special_tokens == ["<|end|>"]
    assert found.model_input_names == ["input_ids", "attention_mask"]
    assert found.name_or_path == str(tmp_path)


def test_the_tokenizer_json_of_transformers_5_says_everything(tmp_path: Path) -> None:
    """4.51's class of the same name would put a begin-of-text token in front."""
    expected = tokenizer_of(tmp_path)(TEXT).input_ids
    settings = {"tokenizer_class": "LlamaTokenizer", "unk_token": "</s>", "added_tokens_decoder": None}
    change_tokenizer_config(tmp_path, **settings)
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    if IS_OLD:
        assert AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids == [0, *expected], "control"
    change_tokenizer_config(tmp_path, backend="tokenizers", extra_special_tokens=["<|end|>"])
    found = load_tokenizer(tmp_path)
    assert found(TEXT).input_ids == expected and found.padding_side == "left"


@pytest.mark.skipif(not IS_OLD, reason="transformers 5 saves directories of the other kind")
def test_other_directories_are_read_where_they_are(tmp_path: Path) -> None:
    tokenizer_of(tmp_path)
    with readable_tokenizer(tmp_path) as folder:
        assert folder == tmp_path
    change_tokenizer_config(tmp_path, auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with readable_tokenizer(tmp_path) as folder:
        assert folder == tmp_path
    with readable_tokenizer("somebody/model") as folder:
        assert str(folder) == "somebody/model"


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000])
def test_a_damaged_tokenizer_config_is_named(text: str, tmp_path: Path) -> None:
    tokenizer_of(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer_config.json:1: .*; fetch or save"), readable_tokenizer(tmp_path):
        pass


def test_named_special_tokens_have_two_spellings_too() -> None:
    old = {"tokenizer_class": "X", "extra_special_tokens": {"image_token": "<i>"}}
    assert readable_tokenizer_config(old) == old
    new = {"tokenizer_class": "X", "model_specific_special_tokens": {"image_token": "<i>"}, "extra_special_tokens": []}
    assert readable_tokenizer_config(new) == {**old, "additional_special_tokens": []}


def test_named_tokens_beside_something_else_than_a_mapping() -> None:
    values = {"model_specific_special_tokens": {"a": "<a>"}, "extra_special_tokens": "x"}
    assert readable_tokenizer_config(values)["extra_special_tokens"] == {"a": "<a>"}
