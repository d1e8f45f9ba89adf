# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Messages and tools of a chat completion, and the conversation that a chat template gets.

Tool calls are not parsed out of generated text. Clients send earlier ones back, and the template writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    WrapValidator,
    create_model,
    field_validator,
)

from nemo_ee.serving.request_fields import RequestFields, UpTo, neutral, no_effect
from nemo_ee.settings.user_input import rule
from nemo_ee.text.json_values import JsonError, parse_json

MAX_MESSAGES, MAX_PARTS, MAX_TOOLS = 1024, 64, 128
# Fields of OpenAI's and others' answers, which clients send back in messages; refused unless they are empty.
NEUTRAL_IN_MESSAGE = tuple("refusal function_call audio annotations reasoning reasoning_content".split())


@dataclass(frozen=True)
class Conversation:
    """Input of a chat template.

    Attributes:
        messages: `role`, `content` (text) and, where given, `name`, `tool_call_id` and `tool_calls`, whose arguments
            are objects, as templates expect them. The role `developer` has become `system`.
        tools: as in the request; empty = none.
        continues: the answer continues the last message's text.
        opens: the template writes the beginning of the answer's turn behind the messages.
        template_kwargs: further names that the template sees.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    continues: bool = False
    opens: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def _arguments(given: Any) -> dict[str, Any]:
    """Arguments of a tool call, which OpenAI writes as JSON in a text."""
    try:
        value = parse_json(given.encode() or b"{}") if isinstance(given, str) else given
    except JsonError:
        value = None
    if not isinstance(value, dict):
        raise ValueError("must be an object, or a text with the JSON of one")
    return value


class FunctionCall(RequestFields):
    """The function that a tool call names."""

    name: str
    arguments: Annotated[
        dict[str, Any],
        BeforeValidator(_arguments),
        WithJsonSchema({"type": ["string", "object"], "description": "an object, or a text with the JSON of one"}),
    ]


class ToolCall(RequestFields):
    """A tool call of an earlier answer."""

    type: Literal["function"] | None = "function"
    function: FunctionCall
    id: no_effect() = None
    index: no_effect() = None


def _as_templates_take_it(given: Any, check: Any) -> dict[str, Any]:
    """The tool call of the request, with its arguments as an object."""
    call = check(given)
    return {**given, "type": call.type, "function": call.function.model_dump()}


class NamedFunction(RequestFields, extra="allow"):
    """Description of a function; further keys, e.g. `description` and `parameters`, go to the template."""

    name: str


class Tool(RequestFields, extra="allow"):
    """A tool that the chat template describes to the model."""

    type: Literal["function"]
    function: NamedFunction


def _as_it_came(given: Any, check: Any) -> Any:
    check(given)
    return given


class TextPart(RequestFields):
    """A part of a message's content."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: no_effect() = None


def _joined(content: str | tuple[TextPart, ...]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


Content = Annotated[
    str | Annotated[tuple[TextPart, ...], Field(fail_fast=True), UpTo(MAX_PARTS)],
    AfterValidator(_joined),
    rule(f"a text, or a list of at most {MAX_PARTS} parts of type text; nothing else is read"),
]

_Answered = create_model(
    "_Answered",
    __base__=RequestFields,
    **{key: (neutral(("", ()), "leave it out"), None) for key in (*NEUTRAL_IN_MESSAGE, "tool_calls", "tool_call_id")},
)


class Message(_Answered):
    """A message of the system, the developer (the same as system) or the user."""

    role: Literal["system", "developer", "user"]
    name: Annotated[str | None, Field(description="name of the author, for templates that write it")] = None
    content: Annotated[Content, Field(description="text, or parts of text that are joined")]

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}
        extra = {key: getattr(self, key) for key in ("name", "tool_call_id") if getattr(self, key) is not None}
        return {**message, **extra, **({"tool_calls": list(self.tool_calls)} if self.tool_calls else {})}


class AssistantMessage(Message):
    """An earlier answer; without content only where it has tool calls."""

    role: Literal["assistant"]
    tool_calls: (
        Annotated[
            tuple[Annotated[ToolCall, WrapValidator(_as_templates_take_it)], ...],
            Field(fail_fast=True),
            UpTo(MAX_TOOLS),
        ]
        | None
    ) = None
    content: Content | None = Field(None, validate_default=True)

    @field_validator("content")
    @classmethod
    def _not_without_both(cls, content: str | None, info: ValidationInfo) -> str | None:
        if content is None and not info.data.get("tool_calls", True):
            raise ValueError("must be a text, or parts of type text, in a message without tool_calls")
        return content


class ToolMessage(Message):
    """The result of a tool call."""

    role: Literal["tool"]
    tool_call_id: Annotated[str | None, Field(description="id of the tool call that it answers")] = None


ROLES = "system, developer, user, assistant or tool"
Messages = Annotated[
    tuple[
        Annotated[
            Message | AssistantMessage | ToolMessage,
            Field(discriminator="role"),
            rule(f"an object with content and a role that is {ROLES}"),
        ],
        ...,
    ],
    Field(min_length=1),
    UpTo(MAX_MESSAGES),
]
Tools = Annotated[
    tuple[Annotated[Tool, WrapValidator(_as_it_came)], ...],
    Field(fail_fast=True),
    UpTo(MAX_TOOLS),
]
