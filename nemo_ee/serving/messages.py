# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Messages and tools of a chat completion, checked, in the form that chat templates take.

Tool calls of the model are not parsed out of its text: clients send earlier ones back, and the template writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_ee.serving.errors import ApiError, shown
from nemo_ee.serving.json_body import parse
from nemo_ee.serving.request_fields import Fields

MAX_MESSAGES, MAX_PARTS, MAX_TOOLS = 1024, 64, 128
ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields of a message that come back with answers, OpenAI's and others'; refused unless they are empty.
NEUTRAL_IN_MESSAGE = frozenset("refusal function_call audio annotations reasoning reasoning_content".split())
KNOWN_IN_MESSAGE = {
    "assistant": ("role", "content", "name", "tool_calls"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
KNOWN_IN_PART = ("type", "text", "prompt_cache_breakpoint")


@dataclass(frozen=True)
class Conversation:
    """What a chat template writes.

    Attributes:
        messages: `role`, `content` (text) and, where given, `name`, `tool_call_id` and `tool_calls`, whose arguments
            are objects, as templates expect them. The role `developer` has become `system`.
        tools: as they came; empty = none.
        continues: the answer goes on with the last message's text.
        opens: the beginning of the answer's turn is written behind the messages.
        template_kwargs: further names the template sees.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    continues: bool = False
    opens: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def read_conversation(fields: Fields) -> Conversation:
    """The conversation of a request; what is wrong with it is noted."""
    messages = _messages(fields)
    continues = fields.switch("continue_final_message")
    opens = fields.switch("add_generation_prompt", default=not continues)
    if continues and opens:
        fields.fault(
            "continue_final_message",
            "continue_final_message and add_generation_prompt are both true; set one of them to false",
        )
    if continues and messages and not messages[-1]["content"]:
        fields.fault("messages", "the last message has no text to continue; leave continue_final_message out")
    kwargs = fields.body.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        fields.fault("chat_template_kwargs", f"chat_template_kwargs = {shown(kwargs)} must be an object")
    return Conversation(messages, _tools(fields), continues, opens, kwargs or {})


def _messages(fields: Fields) -> tuple[dict[str, Any], ...]:
    given = fields.body.get("messages")
    if not isinstance(given, list) or not given:
        fields.fault("messages", f"messages = {shown(given)} must be a list of at least one message")
        return ()
    if len(given) > MAX_MESSAGES:
        fields.fault("messages", f"messages has {len(given)} entries; {MAX_MESSAGES} are allowed")
        return ()
    return tuple(_message(fields, f"messages[{index}]", one) for index, one in enumerate(given))


def _message(fields: Fields, where: str, given: object) -> dict[str, Any]:
    if not isinstance(given, dict):
        fields.fault(where, f"{where} = {shown(given)} must be an object with role and content")
        return {"role": None, "content": None}
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        *others, last = ROLES
        fields.fault(where, f"{where}.role = {shown(role)} must be {', '.join(others)} or {last}")
        role = None
    known = KNOWN_IN_MESSAGE.get(role, ("role", "content", "name"))
    fields.refuse_others(where, given, known, (*NEUTRAL_IN_MESSAGE, "tool_calls", "tool_call_id"))
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = _tool_calls(fields, where, given.get("tool_calls")) if role == "assistant" else []
    if isinstance(content, list):  # OpenAI's parts
        content = _joined_parts(fields, f"{where}.content", content)
    elif content is None and calls:
        content = ""
    if not isinstance(content, str):
        fields.fault(where, f"{where}.content must be a text, or parts of type text; nothing else is read")
    message["content"] = content
    for key in ("name", "tool_call_id"):
        value = given.get(key)
        if value is not None and key in known:
            if not isinstance(value, str):
                fields.fault(where, f"{where}.{key} = {shown(value)} must be a text")
            message[key] = value
    if calls:
        message["tool_calls"] = calls
    return message


def _joined_parts(fields: Fields, where: str, parts: list[Any]) -> str | None:
    """Text of OpenAI's content parts; None = they are not all text."""
    if len(parts) > MAX_PARTS:
        fields.fault(where, f"{where} has {len(parts)} parts; {MAX_PARTS} are allowed")
        return None
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            return None
        fields.refuse_others(f"{where}[{index}]", part, KNOWN_IN_PART)
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(fields: Fields, where: str, given: object) -> list[dict[str, Any]]:
    """Tool calls of an assistant's message, with the arguments read: templates expect objects."""
    if given is None or given == []:
        return []
    where = f"{where}.tool_calls"
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        fields.fault(where, f"{where} = {shown(given)} must be a list of at most {MAX_TOOLS} tool calls")
        return []
    calls = []
    for index, one in enumerate(given):
        function = one.get("function") if isinstance(one, dict) and one.get("type", "function") == "function" else None
        arguments = None if not isinstance(function, dict) else _arguments(function.get("arguments"))
        if arguments is None or not isinstance(function.get("name"), str):
            rule = (
                'must be {"id": ..., "type": "function", "function": {"name": ..., "arguments": <JSON of an object>}}'
            )
            fields.fault(where, f"{where}[{index}] = {shown(one)} {rule}")
            return []
        fields.refuse_others(f"{where}[{index}]", one, ("id", "type", "function", "index"))
        fields.refuse_others(f"{where}[{index}].function", function, ("name", "arguments"))
        calls.append({**one, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _arguments(given: object) -> dict[str, Any] | None:
    """The arguments of a tool call, which OpenAI writes as JSON in a text; None = they are no object."""
    if isinstance(given, str):
        try:
            return parse(given.encode() or b"{}")
        except ApiError:
            return None
    return given if isinstance(given, dict) else None


def _tools(fields: Fields) -> tuple[dict[str, Any], ...]:
    """Tools for the template; none where `tool_choice` is `none`, so that the model does not see any."""
    given, choice = fields.body.get("tools"), fields.body.get("tool_choice")
    parallel = fields.switch("parallel_tool_calls", default=True)
    if choice not in (None, "none", "auto"):
        fields.fault("tool_choice", f"tool_choice = {shown(choice)} is not supported here; use auto or none")
    if given is None or given == []:
        return ()
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        fields.fault("tools", f"tools = {shown(given)} must be a list of at most {MAX_TOOLS} tools")
        return ()
    for index, one in enumerate(given):
        function = one.get("function") if isinstance(one, dict) and one.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            rule = 'must be {"type": "function", "function": {"name": ..., ...}}'
            fields.fault("tools", f"tools[{index}] = {shown(one)} {rule}")
            return ()
    if not parallel and choice != "none":
        way_out = "tool calls are not read out of the answer; leave it out"
        fields.fault("parallel_tool_calls", f"parallel_tool_calls = false is not supported here; {way_out}")
    return () if choice == "none" else tuple(given)
