# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Conversations through chat templates, against transformers: tools, messages of tools, a last message continued."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from nemo_ee.runtime.loader import load_tokenizer
from nemo_ee.serving.chat_prompt import chat_prompt
from nemo_ee.serving.errors import ApiError
from nemo_ee.serving.messages import Conversation
from nemo_ee.serving.protocol import Limits, read_request
from tests.helpers.served_model import CHAT_TEMPLATE, REFERENCE_MODEL

# Writes all there is, trims texts, and ends each turn with a mark, as the templates of common models do.
FULL = (
    "{% if tools %}<|tools|>{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{% for m in messages %}"
    "<|{{ m.role }}|>{% if m.name %}[{{ m.name }}]{% endif %}{{ m.content | trim }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}("
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}){% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if not thinking | default(true) %}<quick>{% endif %}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
ASKED = [{"role": "user", "content": "warm?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "20 C"}]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(REFERENCE_MODEL)


def conversation(messages: list, **changes) -> Conversation:
    return read_request({"messages": messages, **changes}, chat=True, limits=Limits(8, 8)).conversation


def written(tokenizer, template: str, messages: list, **changes) -> str:
    tokenizer.chat_template = template
    return chat_prompt(tokenizer, conversation(messages, **changes))


def test_tools_and_their_messages_are_what_transformers_writes(tokenizer) -> None:
    text = written(tokenizer, FULL, ANSWERED, tools=[TOOL])
    given = [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [
        {**CALL, "function": {"name": "weather", "arguments": {"city": "Ulm"}}}]}, ANSWERED[2]]  # fmt: skip
    expected = tokenizer.apply_chat_template(given, tools=[TOOL], add_generation_prompt=True, tokenize=False)
    assert text == expected and text.endswith(
        "<|user|>warm?<|end|><|assistant|><call>weather(city=Ulm)<|end|><|tool|>20 C<|end|><|assistant|>"
    )
    assert '"name": "weather"' in text
    assert written(tokenizer, FULL, ASKED, tools=[TOOL], tool_choice="none") == written(tokenizer, FULL, ASKED)


def test_names_and_template_kwargs_reach_the_template(tokenizer) -> None:
    named = [{"role": "user", "name": "Ann", "content": "x"}]
    assert written(tokenizer, FULL, named) == "<|user|>[Ann]x<|end|><|assistant|>"
    assert written(tokenizer, CHAT_TEMPLATE, named) == "# user: x\n# assistant:", "a template may not look at it"
    assert written(tokenizer, FULL, ASKED, chat_template_kwargs={"thinking": False}).endswith("<|assistant|><quick>")
    assert written(tokenizer, FULL, ASKED, add_generation_prompt=False) == "<|user|>warm?<|end|>"
    with pytest.raises(ApiError, match="chat_template_kwargs names chat_template"):
        written(tokenizer, FULL, ASKED, chat_template_kwargs={"chat_template": "x"})


@pytest.mark.parametrize(
    ("messages", "changes", "words"),
    [
        (ASKED, {"tools": [TOOL]}, "does not write tools"),
        (ANSWERED[:2], {}, "does not write tool calls"),
        ([*ASKED, ANSWERED[2]], {}, "does not write messages of tools"),
    ],
)
def test_what_a_template_leaves_out_is_refused(messages, changes, words, tokenizer) -> None:
    silent = "{% for m in messages %}{% if m.role != 'tool' %}# {{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    with pytest.raises(ApiError, match=words):
        written(tokenizer, silent, messages, **changes)
    assert written(tokenizer, FULL, messages, **changes), "control: a template that writes it"


@pytest.mark.parametrize("flags", [{}, {"add_generation_prompt": False}])
@pytest.mark.parametrize("last", ["The answer", "def f(x):\n    return", "a <b>"])
@pytest.mark.parametrize("template", [FULL, CHAT_TEMPLATE])
def test_a_last_message_is_continued_as_by_transformers(template, last, flags, tokenizer) -> None:
    messages = [*ASKED, {"role": "assistant", "content": last}]
    text = written(tokenizer, template, messages, continue_final_message=True, **flags)
    assert text == tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert text.endswith(last)


def test_the_end_of_a_last_message_is_found_whatever_follows_it(tokenizer) -> None:
    """`end` is in the mark behind it too, where a search for the text finds it; and spaces at the end stay."""
    for last in ("end", "x  ", "|"):
        messages = [*ASKED, {"role": "assistant", "content": last}]
        text = written(tokenizer, FULL, messages, continue_final_message=True)
        assert text == f"<|user|>warm?<|end|><|assistant|>{last}"
    changed = "{% for m in messages %}{{ m.content[:3] }}{% endfor %}"
    with pytest.raises(ApiError, match="does not write the last message as it is"):
        written(tokenizer, changed, messages, continue_final_message=True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "are both true"),
        ({"messages": [{"role": "assistant", "content": ""}], "continue_final_message": True}, "needs a last message"),
        ({"chat_template_kwargs": [1]}, "must be a block"),
        ({"tool_choice": "required"}, "tool_choice='required' must be one of auto, none"),
        ({"tool_choice": {"type": "function"}}, "must be one of auto, none"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type='custom' must be function"),
        ({"tools": {}}, "must be a list of 0 to 128"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls=False is not supported"),
        ({"messages": [{"role": "function", "content": "x"}]}, "a role that is system, developer, user,"),
        ({"messages": [{"role": "tool", "content": None}]}, "messages[0].content is needed and not given"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content=None must be a text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "["}}]}]},
         "messages[0].tool_calls[0].function."),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {**CALL, "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]}]},
         "messages[0].tool_calls[0].function."),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "is not supported here"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(body: dict, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        conversation(**{"messages": ASKED, **body})
    assert words in caught.value.message
