# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""scripts/data/preprocess_chat.py, against transformers' own apply_chat_template."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "data" / "preprocess_chat.py"
TOKENIZER = ROOT / "assets" / "reference-model"
CONFIG = ROOT / "conf" / "preprocess_chat.yaml"
EOD = 0

# A header and a line's end around every message, as in ChatML; the marked one says itself what it generates.
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</{{ m.role }}>\n{% endgeneration %}"
    "{% else %}{{ m.content }}</{{ m.role }}>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
# Everything of one exchange on one line and no prompt for generation: tokens may reach over the answer's start.
TIGHT = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}] {% else %}{{ m.content }}<|endoftext|>"
    "{% endif %}{% endfor %}"
)
FORGETFUL = (  # earlier answers are dropped, as some reasoning models' templates do with their thoughts
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<{{ m.role }}>{{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}" + PLAIN


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """Turns of user and assistant by turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


CHATS = [
    chat("Write a loop.", "for i in range(3):\n    print(i)\n"),
    chat("Hi", "hello naïve café", "and now?", "import os\n" * 20, system="Be brief."),
    chat("add", "def add(a, b):\n    return a + b", "again", "same"),
]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))  # as Python does for a script that is run
    try:
        spec = importlib.util.spec_from_file_location("preprocess_chat", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True)


def run(script: ModuleType, folder: Path, records: list[Any], template: str | None, **settings: Any) -> Any:
    """Preprocess records; the output's prefix is `<folder>/chat`."""
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if template is not None:
        (folder / "template.jinja").write_text(template)
        settings = {"chat_template": str(folder / "template.jinja"), **settings}
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIG))
    mapping = {key: value for key, value in defaults.items() if key not in ("hydra", "defaults")}
    given = {"input": str(folder / "in.jsonl"), "output": str(folder / "chat"), "tokenizer": str(TOKENIZER)}
    return script.preprocess(script.ChatConfig.from_config({**mapping, **given, **settings}))


def read_back(prefix: Path) -> tuple[list[list[int]], list[list[int]]]:
    """(tokens, mask) of every document, by Megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    opened = [IndexedDataset(str(name)) for name in (prefix, f"{prefix}.mask")]
    return tuple([dataset[index].tolist() for index in range(len(dataset))] for dataset in opened)


def test_marked_answers_are_transformers_own(script: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    counts = run(script, tmp_path, CHATS, MARKED)
    tokens, masks = read_back(tmp_path / "chat")
    assert counts.conversations == len(tokens) == len(CHATS)
    for record, ids, mask in zip(CHATS, tokens, masks, strict=True):
        expected = tokenizer.apply_chat_template(
            record["messages"], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == [*expected["input_ids"], EOD]
        assert mask == [*expected["assistant_masks"], 0], "the end of the text does not count"
        assert 0 < sum(mask) < len(mask)
    assert counts.answer_tokens == sum(map(sum, masks)) and counts.tokens == sum(map(len, tokens))


def test_conversations_that_end_with_another_token_than_answers_are_warned_of(
    script: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(TOKENIZER, tmp_path / "model", ignore=shutil.ignore_patterns("corpus", "*.safetensors"))
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 12}')
    run(script, tmp_path, CHATS, MARKED, tokenizer=str(tmp_path / "model"))
    assert sum("stops at 12" in one.getMessage() for one in caplog.records) == 1


def test_the_prefix_method_finds_what_marks_would_say(script: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    """The plain template writes the marked one's text; its answers end with the turn's end, as the marks do."""
    run(script, tmp_path, CHATS, PLAIN)
    tokens, masks = read_back(tmp_path / "chat")
    for record, ids, mask in zip(CHATS, tokens, masks, strict=True):
        assert ids[:-1] == tokenizer.apply_chat_template(record["messages"], chat_template=PLAIN)
        expected = tokenizer.apply_chat_template(
            record["messages"], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        assert mask[:-1] == expected["assistant_masks"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_an_empty_answer_the_end_of_the_turn_counts(
    script: ModuleType, tokenizer: Any, tmp_path: Path, template: str
) -> None:
    """It is what the template writes for the answer; what an answer with text has beyond its text."""
    silent = [chat("Hi", ""), chat("Hi", "", "and now?", "same")]
    counts = run(script, tmp_path, silent, template)
    tokens, masks = read_back(tmp_path / "chat")
    end = tokenizer.encode("</assistant>\n", add_special_tokens=False)
    for record, ids, mask in zip(silent, tokens, masks, strict=True):
        marked = {"chat_template": MARKED, "return_dict": True, "return_assistant_tokens_mask": True}
        expected = tokenizer.apply_chat_template(record["messages"], **marked)
        assert ids[:-1] == expected["input_ids"] and mask[:-1] == expected["assistant_masks"]
    counted = [token for token, counts in zip(tokens[0], masks[0], strict=True) if counts]
    assert tokenizer.decode(counted) == tokenizer.decode(end)
    assert (counts.conversations, counts.empty_answers) == (2, 2)


def test_an_empty_answer_that_leaves_no_token_is_named(script: ModuleType, tmp_path: Path) -> None:
    """This template writes nothing behind an answer."""
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    run(script, tmp_path, [chat("Hi", "there")], bare)
    with pytest.raises(
        script.PreprocessError, match=r"in\.jsonl:2: the template writes no token of an answer; .*leave a conversation"
    ):
        run(script, tmp_path, [chat("Hi", "there"), chat("Hi", "")], bare, overwrite=True)


def test_a_conversation_may_begin_with_the_assistant(script: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    """transformers looks at the first message of what stands before the answer, and there is none."""
    record = {"messages": [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "who?"},
                           {"role": "assistant", "content": "me"}]}  # fmt: skip
    run(script, tmp_path, [record], PLAIN)
    ids, masks = read_back(tmp_path / "chat")
    assert ids[0][:-1] == tokenizer.apply_chat_template(record["messages"], chat_template=PLAIN)
    assert sum(masks[0]) > 0 and not all(masks[0])


def test_the_tokens_that_count_spell_the_answers(script: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    run(script, tmp_path, CHATS, TIGHT)
    tokens, masks = read_back(tmp_path / "chat")
    for record, ids, mask in zip(CHATS[::2], tokens[::2], masks[::2], strict=True):
        assert ids[-1] == EOD and ids[-2] != EOD, "the template's own end of text is not doubled"
        assert mask[-1] == 1, "here the end belongs to the answer"
        counted = tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if counts])
        answers = "".join(m["content"] + "<|endoftext|>" for m in record["messages"] if m["role"] == "assistant")
        assert counted.replace(" ", "") == answers.replace(" ", ""), "a space before the answer may be part of a token"


def test_gzip_and_directories(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in CHATS)
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps(CHATS[2]) + "\n\n")
    (tmp_path / "in" / "notes.txt").write_text("left out")
    assert run(script, tmp_path, [], PLAIN, input=str(tmp_path / "in")).conversations == 4
    tokens, _ = read_back(tmp_path / "chat")
    assert tokens[0] == tokens[3], "directories are read in order"


def test_padding_makes_every_document_one_sample(script: ModuleType, tmp_path: Path) -> None:
    run(script, tmp_path, CHATS, PLAIN)
    whole, answers = read_back(tmp_path / "chat")
    length = len(whole[0]) + 3
    assert len(whole[1]) > length
    question = chat("why " * 100, "because")
    counts = run(script, tmp_path, [*CHATS, question], PLAIN, pad_to=length, overwrite=True)
    tokens, masks = read_back(tmp_path / "chat")
    assert {len(document) for document in tokens + masks} == {length}
    assert tokens[0] == whole[0] + [EOD] * 3 and masks[0] == answers[0] + [0] * 3
    assert tokens[1] == whole[1][:length] and masks[1] == answers[1][:length]
    assert (counts.conversations, counts.cut, counts.left_out) == (3, 2, 1)


MANY_FAULTS = [
    ("not json", "in.jsonl:1: not JSON"),
    ([1], "in.jsonl:2: a JSON list, not an object with the field 'messages'"),
    ({"text": "x"}, "in.jsonl:3: no field 'messages' (it has 'text'); name the field with messages_key"),
    ({"messages": "x"}, "in.jsonl:4: field 'messages' is a JSON str, not a list"),
    ({"messages": []}, "in.jsonl:5: no messages"),
    ({"messages": ["x"]}, "in.jsonl:6: messages[0] is a JSON str"),
    ({"messages": [{"role": "user"}]}, "in.jsonl:7: messages[0] has no content"),
    (
        {"messages": [{"role": "human", "content": "x"}]},
        "in.jsonl:8: messages[0].role = 'human' is not one of system, user, assistant, tool",
    ),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "in.jsonl:9: messages[0].content is a JSON list"),
    (chat("only a question"), "in.jsonl:10: no message of the assistant, so nothing would count"),
    (chat("a", "b", system="s"), "in.jsonl:11: the chat template refuses it: the user speaks first"),
]


def test_all_problems_in_the_data_come_in_one_message(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [problem if isinstance(problem, str) else json.dumps(problem) for problem, _ in MANY_FAULTS]
    with pytest.raises(script.PreprocessError) as raised:
        run(script, tmp_path, [], STRICT, output=str(tmp_path / "out"), input=[str(write(path, lines))])
    assert len(raised.value.problems) == len(MANY_FAULTS)
    for problem, (_, expected) in zip(raised.value.problems, MANY_FAULTS, strict=True):
        assert expected in problem
    assert not list(tmp_path.glob("out*")), "nothing is left behind"


def write(path: Path, lines: list[str]) -> Path:
    path = path.with_name("bad") / path.name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_template_whose_prefixes_are_not_prefixes_is_refused(script: ModuleType, tmp_path: Path) -> None:
    run(script, tmp_path, CHATS[:1], FORGETFUL)
    with pytest.raises(
        script.PreprocessError, match=r"in.jsonl:2: the chat template writes the text before messages\[2\] differently"
    ):
        run(script, tmp_path, CHATS[:2], FORGETFUL, overwrite=True)


@pytest.mark.parametrize(
    ("records", "template", "settings", "expected"),
    [
        (CHATS, None, {}, "has no chat template; give a file with one"),
        (CHATS, None, {"chat_template": "nowhere.jinja"}, "chat_template: nowhere.jinja is not a file"),
        ([], PLAIN, {}, "in.jsonl: holds no conversation"),
        (CHATS, PLAIN, {"pad_to": 1}, "pad_to=1 must be a whole number of tokens from 2"),
        (CHATS, PLAIN, {"pad_to": 2}, "none of the 3 conversations has an answer within pad_to; raise it"),
        (CHATS, "{{ 'x' }}", {}, "the template writes no token of an answer"),
        (CHATS, PLAIN, {"input": "chats.txt"}, "chats.txt does not exist"),
    ],
)
def test_bad_settings_and_empty_input_are_named(
    script: ModuleType, tmp_path: Path, records: list, template: str | None, settings: dict, expected: str
) -> None:
    with pytest.raises(ValueError) as raised:
        run(script, tmp_path, records, template, **settings)
    assert expected in str(raised.value)
    assert not list(tmp_path.glob("chat*"))


def test_text_is_not_written_beside_a_chat_s_mask(script: ModuleType, tmp_path: Path, monkeypatch) -> None:
    run(script, tmp_path, CHATS, PLAIN)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    text = importlib.import_module("preprocess_text")
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIG.with_name("preprocess_text.yaml")))
    mapping = {key: value for key, value in defaults.items() if key not in ("hydra", "defaults")}
    given = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "chat"), "tokenizer": str(TOKENIZER)}
    with pytest.raises(text.PreprocessError, match=r"chat\.mask\.idx belongs to chat data"):
        text.preprocess(text.PreprocessConfig.from_config({**mapping, **given, "overwrite": True}))


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in CHATS))
    (tmp_path / "template.jinja").write_text(PLAIN)
    command = [
        sys.executable, str(SCRIPT), f"input={tmp_path / 'in.jsonl'}", f"output={tmp_path / 'out' / 'chat'}",
        f"tokenizer={TOKENIZER}", f"chat_template={tmp_path / 'template.jinja'}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "3 conversations" in done.stdout and "of them in answers" in done.stdout
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["chat.bin", "chat.idx", "chat.mask.bin", "chat.mask.idx"]
