# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The JSON of directories that transformers 4 and 5 save; the references are what the installed transformers makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nemo_ee.checkpoint.huggingface import read_backbone
from nemo_ee.runtime.config import read_config
from nemo_ee.runtime.loader import load_tokenizer
from nemo_ee.text.huggingface_json import (
    readable_tokenizer_config,
    rotary_settings,
    with_both_spellings,
    without_code,
)
from nemo_ee.text.tokenizer_directory import readable_tokenizer
from tests.helpers.huggingface_models import as_transformers_5_saves, reference_logits, save_tiny_model

# Controls show what the installed transformers does without the code under test, if it is as old as NeMo's.
IS_OLD = int(transformers.__version__.split(".")[0]) < 5
DEFAULT, LINEAR = {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}
TEXT = "def f(naïve):  # 東京 🙂\n    return '<|tool|>'<|end|>"


@pytest.mark.parametrize(
    ("values", "kind", "base"),
    [
        ({}, DEFAULT, 10000.0),
        ({"rope_theta": 5e5, "rope_scaling": None}, DEFAULT, 5e5),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, LINEAR, 7.0),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, DEFAULT, 5e5),
        ({"rope_parameters": LINEAR, "rope_theta": 7.0}, LINEAR, 7.0),
        ({"rope_scaling": {**LINEAR, "rope_theta": 7.0}}, LINEAR, 7.0),
        ({"rope_parameters": {**LINEAR, "rope_theta": 7}, "rope_scaling": {}, "rope_theta": 7.0}, LINEAR, 7),
        ({"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 2}}, LINEAR, 10000.0),
    ],
)
def test_either_spelling_and_both(values: dict, kind: dict, base: float) -> None:
    expected = {**kind, "rope_theta": base}
    assert rotary_settings(values) == expected
    both = with_both_spellings(values)
    assert rotary_settings({"rope_parameters": both["rope_parameters"]}) == expected
    assert rotary_settings({key: both[key] for key in ("rope_theta", "rope_scaling")}) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "rope_theta 10000.0 and rope_parameters.rope_th",
        ),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 3.0}},
            "rope_scaling .* and rope_parameters",
        ),
        ({"rope_scaling": LINEAR, "rope_parameters": DEFAULT}, "would compute different models; keep the one that"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "type 'linear' and rope_type 'llama3' disagree"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set per kind of layer"),
        ({"rope_parameters": [1]}, r"rope_parameters: \[1\], must be a mapping"),
    ],
)
def test_spellings_that_disagree_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary_settings(values)


@pytest.mark.parametrize("name", ["llama", "llama-linear", "llama-llama3", "mistral", "qwen2", "gpt2", "opt"])
def test_a_config_of_transformers_5_describes_the_same_model(name: str, tmp_path: Path) -> None:
    changes = {"rope_theta": 5e5} if name in ("llama", "mistral") else {}
    model = save_tiny_model(tmp_path, name, **changes)
    importer, runtime = read_backbone(tmp_path), read_config(tmp_path)
    as_transformers_5_saves(tmp_path)
    assert read_backbone(tmp_path) == importer and read_config(tmp_path) == runtime
    values = json.loads((tmp_path / "config.json").read_text())
    tokens = model.dummy_inputs["input_ids"]
    expected = reference_logits(model, tokens)

    def loaded(values: dict[str, Any]) -> Any:
        config = type(AutoConfig.for_model(values["model_type"])).from_dict(values)
        return AutoModelForCausalLM.from_pretrained(tmp_path, config=config, attn_implementation="eager").eval()

    if name in ("gpt2", "opt"):
        assert "rope_parameters" not in values
        return
    assert reference_logits(loaded(with_both_spellings(values)), tokens).equal(expected)
    if IS_OLD:
        assert not reference_logits(loaded(values), tokens).equal(expected), "control: transformers 4 ignores the key"


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
    (tmp_path / "special_tokens_map.json").unlink()
    if IS_OLD:
        with pytest.raises(ValueError, match="TokenizersBackend does not exist"):
            AutoTokenizer.from_pretrained(tmp_path)  # control
    found = load_tokenizer(tmp_path)
    assert found(TEXT).input_ids == expected(TEXT).input_ids
    assert found.decode(found(TEXT).input_ids) == TEXT
    assert found.decode(found(TEXT).input_ids, skip_special_tokens=True) == TEXT.removesuffix("<|end|>")
    assert found.additional_special_tokens == ["<|end|>"] and found.model_input_names == [
        "input_ids",
        "attention_mask",
    ]
    assert found.name_or_path == str(tmp_path)


def test_the_tokenizer_json_of_transformers_5_says_everything(tmp_path: Path) -> None:
    """4.51's class of the same name would put a begin-of-text token in front."""
    expected = tokenizer_of(tmp_path)(TEXT).input_ids
    settings = {"tokenizer_class": "LlamaTokenizer", "unk_token": "</s>", "added_tokens_decoder": None}
    change_tokenizer_config(tmp_path, **settings)
    (tmp_path / "special_tokens_map.json").unlink()
    if IS_OLD:
        assert AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids == [0, *expected], "control"
    change_tokenizer_config(tmp_path, backend="tokenizers", extra_special_tokens=["<|end|>"])
    found = load_tokenizer(tmp_path)
    assert found(TEXT).input_ids == expected and found.padding_side == "left"


def test_other_directories_are_read_where_they_are(tmp_path: Path) -> None:
    tokenizer_of(tmp_path)
    with readable_tokenizer(tmp_path) as folder:
        assert folder == tmp_path
    change_tokenizer_config(tmp_path, auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with readable_tokenizer(tmp_path) as folder:
        assert folder == tmp_path
    for text in ("[1]", "{", "[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(ValueError, match="tokenizer_config.json:1: "), readable_tokenizer(tmp_path):
            pass
    with readable_tokenizer("somebody/model") as folder:
        assert str(folder) == "somebody/model"


def test_named_special_tokens_have_two_spellings_too() -> None:
    old = {"tokenizer_class": "X", "extra_special_tokens": {"image_token": "<i>"}}
    assert readable_tokenizer_config(old) == old
    new = {"tokenizer_class": "X", "model_specific_special_tokens": {"image_token": "<i>"}, "extra_special_tokens": []}
    assert readable_tokenizer_config(new) == {**old, "additional_special_tokens": []}


def test_named_tokens_beside_something_else_than_a_mapping() -> None:
    values = {"model_specific_special_tokens": {"a": "<a>"}, "extra_special_tokens": "x"}
    assert readable_tokenizer_config(values)["extra_special_tokens"] == {"a": "<a>"}
