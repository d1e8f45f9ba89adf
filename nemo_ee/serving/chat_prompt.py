# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The text of a conversation, as the model's chat template writes it, in a Jinja sandbox.

A template may leave out parts that it does not support. That would go unnoticed, so tools, tool calls and messages of
tools are written a second time with a change, and are refused where the text stays the same.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import TemplateError

from nemo_ee.serving.errors import ApiError
from nemo_ee.serving.messages import Conversation

_LOG = logging.getLogger(__name__)
# Marks the end of a text to continue, so that the end is found in the template's text.
_MARK = "\ufffe\ufdd0continued\ufdd1"


def chat_prompt(tokenizer: Any, conversation: Conversation) -> str:
    """The prompt of a conversation.

    Args:
        tokenizer: a `JsonTokenizer` or transformers', with a chat template.

    Raises:
        ApiError: 400, the template refuses it, fails, or leaves a part of it out.
    """
    text = _written(tokenizer, conversation)
    for part, field, changed in _changed(conversation):
        if _written(tokenizer, changed) == text:
            message = f"the model's chat template does not write {part}; leave them out, or put them into a message"
            raise ApiError(400, message, param=field)
    if not conversation.continues:
        return text
    *others, last = conversation.messages
    marked = (*others, {**last, "content": last["content"] + _MARK})
    text, mark, _ = _written(tokenizer, dataclasses.replace(conversation, messages=marked)).rpartition(_MARK)
    if not mark:
        raise ApiError(
            400,
            "the model's chat template does not write the last message as it is, so it cannot be continued; leave "
            "continue_final_message out, or write the prompt yourself for /v1/completions",
            param="continue_final_message",
        )
    return text


def _changed(conversation: Conversation) -> Iterator[tuple[str, str, Conversation]]:
    """The parts of a conversation with tools: name, field, and the conversation with the first such entry changed."""
    if conversation.tools:
        first, *others = conversation.tools
        yield "tools", "tools", dataclasses.replace(conversation, tools=(_renamed(first), *others))
    for part, key, change in (
        ("messages of tools", "tool", lambda message: {**message, "content": _MARK}),
        ("tool calls", "tool_calls", lambda message: {**message, "tool_calls": [_renamed(message["tool_calls"][0])]}),
    ):
        messages = conversation.messages
        found = [index for index, one in enumerate(messages) if key in (one["role"], *one)]
        if found:
            index = found[0]
            messages = (*messages[:index], change(messages[index]), *messages[index + 1 :])
            yield part, "messages", dataclasses.replace(conversation, messages=messages)


def _renamed(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool, or the call of one, of another name."""
    return {**tool, "function": {**tool["function"], "name": f"{tool['function']['name']}{_MARK}"}}


def _written(tokenizer: Any, conversation: Conversation) -> str:
    kwargs = conversation.template_kwargs
    own = [name for name in inspect.signature(tokenizer.apply_chat_template).parameters if name in kwargs]
    if own:
        message = f"chat_template_kwargs names {own[0]}, which is not a variable of templates; leave it out"
        raise ApiError(400, message, param="chat_template_kwargs")
    try:
        return tokenizer.apply_chat_template(
            [dict(one) for one in conversation.messages],
            tools=list(conversation.tools) or None,
            add_generation_prompt=conversation.opens,
            tokenize=False,
            **kwargs,
        )
    except TemplateError as problem:  # the template's own error for messages that it refuses
        raise ApiError(400, f"the model's chat template refuses these messages: {problem}", param="messages") from None
    except Exception:  # any other failure of the template
        _LOG.exception("the chat template failed")
        raise ApiError(400, "the model's chat template fails on these messages", param="messages") from None
