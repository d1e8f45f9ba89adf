# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""scripts/data/collect_own_chats.py, with a random model of twelve words, which ends a turn now and then."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.helpers.huggingface_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["[end]", "[user]", "[assistant]", *"what is a b c d e f g".split()]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end] {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts" / "data"))
    try:
        import collect_own_chats

        yield collect_own_chats
    finally:
        sys.path.remove(str(ROOT / "scripts" / "data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "llama", vocab_size=len(WORDS))
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[end]")
    own.chat_template = TEMPLATE
    own.save_pretrained(folder)
    return folder


def settings(script: ModuleType, model: Path, output: Path, **changed: Any) -> Any:
    defaults = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "collect_own_chats.yaml"))
    mapping = {key: value for key, value in defaults.items() if key not in ("hydra", "defaults")}
    small = {"conversations": 30, "max_question_tokens": 14, "max_answer_tokens": 12, "min_question_characters": 3}
    small["held_out_share"] = 0.3
    return script.OwnChatSettings.from_config(
        {**mapping, **small, "model": str(model), "output": str(output), **changed}
    )


def chats(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


def test_questions_and_answers(script: ModuleType, model: Path, tmp_path: Path) -> None:
    *counts, cut = script.collect(settings(script, model, tmp_path / "chats.jsonl.gz"))
    training, held_out = (chats(tmp_path / name) for name in ("chats.jsonl.gz", "chats.held-out.jsonl.gz"))
    assert counts == [len(training), len(held_out)] and sum(counts) == 30 and all(counts)
    long = sum(len(chat["messages"][1]["content"].split()) == 12 for chat in training + held_out)
    assert 0 < cut <= long < 30
    questions = [chat["messages"][0]["content"] for chat in training + held_out]
    assert len(set(questions)) == 30 and min(map(len, questions)) >= 3
    for chat in training + held_out:
        assert [message["role"] for message in chat["messages"]] == ["user", "assistant"]
        assert not any("[end]" in message["content"] for message in chat["messages"])
        assert len(chat["messages"][1]["content"].split()) <= 12


def test_the_texts_do_not_depend_on_the_batches(script: ModuleType, model: Path, tmp_path: Path) -> None:
    one = settings(script, model, tmp_path / "one.jsonl.gz", batch_size=7)
    other = settings(script, model, tmp_path / "other.jsonl.gz")
    third = settings(script, model, tmp_path / "third.jsonl.gz", seed=99)
    for own in (one, other, third):
        script.collect(own)
    found = [chats(own.output) for own in (one, other, third)]
    assert found[0] == found[1] != found[2]


def test_models_that_cannot_write_chats(script: ModuleType, model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    own = settings(script, model, tmp_path / "short.jsonl.gz", min_question_characters=500, conversations=3)
    with pytest.raises(ValueError, match="only 0 of 133 questions can be used; .*raise the limits"):
        script.collect(own)
    with pytest.raises(ValueError, match=r"a conversation of \d+ tokens .* the model's 32 positions; lower one"):
        script.collect(settings(script, model, tmp_path / "long.jsonl.gz", max_answer_tokens=64))
    assert not list(tmp_path.iterdir())
    tokenizer = AutoTokenizer.from_pretrained(model)
    for template, problem in ((TEMPLATE.replace("[end]", "a"), "no special token behind"), (None, "no chat template")):
        tokenizer.chat_template = template
        folder = tmp_path / str(template is None)
        save_tiny_model(folder, "llama", vocab_size=len(WORDS))
        tokenizer.save_pretrained(folder)
        with pytest.raises(ValueError, match=problem):
            script.collect(settings(script, folder, tmp_path / "out.jsonl.gz"))
