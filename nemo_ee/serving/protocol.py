# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Requests of OpenAI's completions and chat completions, checked field by field, with early exit as one more field.

    early_exit: {mode, threshold | certificate, exits, criterion, max_waiting}

Every fault of a request is reported at once. What this server cannot do is refused, never ignored.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.serving.errors import ApiError, shown

# Fields that are understood, for both endpoints and for each.
_BOTH = frozenset(
    "model max_tokens temperature top_p top_k repetition_penalty seed n stop stream stream_options logprobs user "
    "metadata early_exit".split()
)
FIELDS = {False: _BOTH | {"prompt"}, True: _BOTH | {"messages", "max_completion_tokens", "top_logprobs"}}
# Fields of OpenAI's that are refused unless they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, False, True),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None, "none"),
}
EXIT_FIELDS = ("mode", "threshold", "certificate", "exits", "criterion", "max_waiting")
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_FAULTS = 10  # that one error lists
MAX_MESSAGES, MAX_PARTS, MAX_EXITS = 1024, 64, 256
_LONGEST_NAME = 40  # of a field; nothing longer was mistyped
# Fields of a message that come back with OpenAI's answers; refused unless they are empty.
_NEUTRAL_IN_MESSAGE = frozenset("name refusal tool_calls function_call audio annotations reasoning".split())
_LEGACY_MAX_TOKENS = 16  # OpenAI's default for completions


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_new_tokens: per answer.
        max_choices: answers per request, prompts times `n`.
    """

    max_new_tokens: int
    max_choices: int


@dataclass(frozen=True)
class Call:
    """A checked request; what it needs the model and tokenizer for is still as it came.

    Attributes:
        chat: it is a chat completion.
        model: the name it asks for, or None.
        prompts: texts or token ids; of a chat there are none.
        messages: of a chat.
        max_new_tokens: per answer; None = as many as there is room for.
        sampling: of the first answer; `sampling_of` has the others'.
        num_answers: per prompt.
        stops: strings that end an answer.
        stream, include_usage: send tokens as they come; with the usage at the end.
        num_top: report ln p of every token and of this many most likely ones; None = none.
        early_exit: the field as it came, an object of known keys, or None.
    """

    chat: bool
    model: str | None
    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[Mapping[str, str], ...]
    max_new_tokens: int | None
    sampling: SamplingParams
    num_answers: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    num_top: int | None
    early_exit: Mapping[str, Any] | None

    def sampling_of(self, prompt: int, answer: int) -> SamplingParams:
        """Of a prompt's answer, both by number; every answer of a request has random numbers of its own."""
        return replace(self.sampling, seed=self.sampling.seed + (answer << 64) + (prompt << 96))


class _Fields:
    """Reads the fields of a request and collects what is wrong with them."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body
        self.faults: list[tuple[str, str]] = []  # field, message

    def fault(self, field: str, message: str) -> None:
        """Note a fault. One too many ends the reading, so that a body of nothing but faults costs little."""
        self.faults.append((field, message))
        if len(self.faults) >= MAX_FAULTS:
            self.raise_all()

    def number(self, field: str, default: float, least: float, most: float, note: str = "") -> float:
        value = self.body.get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            self.fault(field, f"{field} = {shown(value)} must be a number from {least:g} to {most:g}{note}")
            return default
        return float(value)

    def whole(self, field: str, default: int | None, least: int, most: int) -> int | None:
        value = self.body.get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.fault(field, f"{field} = {shown(value)} must be a whole number from {least} to {most}")
            return default
        return value

    def switch(self, field: str) -> bool:
        value = self.body.get(field)
        if value is not None and not isinstance(value, bool):
            self.fault(field, f"{field} = {shown(value)} must be true or false")
        return value is True

    def raise_all(self) -> None:
        if self.faults:
            field = self.faults[0][0]
            raise ApiError(400, "; ".join(message for _, message in self.faults), param=field)


def parse_call(body: Mapping[str, Any], *, chat: bool, limits: Limits) -> Call:
    """Check a request.

    Args:
        body: parsed JSON.
        chat: it came to /v1/chat/completions.
        limits: the server's.

    Raises:
        ApiError: 400, with every fault.
    """
    fields = _Fields(body)
    _check_names(fields, chat)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        fields.fault("model", f"model = {shown(model)} must be a name")
    prompts = () if chat else _prompts(fields, limits)
    messages = _messages(fields) if chat else ()
    n = fields.whole("n", 1, 1, limits.max_choices)
    if len(prompts) * n > limits.max_choices:
        fields.fault("n", f"{len(prompts)} prompts x n = {n} are more than {limits.max_choices} answers; send less")
    call = Call(
        chat=chat,
        model=model,
        prompts=prompts,
        messages=messages,
        max_new_tokens=_max_tokens(fields, chat, limits),
        sampling=_sampling(fields),
        num_answers=n,
        stops=_stops(fields),
        stream=fields.switch("stream"),
        include_usage=_include_usage(fields),
        num_top=_num_top(fields, chat),
        early_exit=_early_exit(fields),
    )
    fields.raise_all()
    return call


def _check_names(fields: _Fields, chat: bool) -> None:
    for field, value in fields.body.items():
        if field in FIELDS[chat]:
            continue
        if field in _NEUTRAL:
            # True == 1 in Python; a switch and a number are different things here.
            if not any(value == allowed and type(value) is type(allowed) or (value == 0 and allowed == 0)
                       for allowed in _NEUTRAL[field]):  # fmt: skip
                fields.fault(field, f"{field} = {shown(value)} is not supported here; leave it out")
            continue
        fields.fault(
            field[:60], f"{shown(field)} is not a field of this request; {_guess(field, FIELDS[chat], 'leave it out')}"
        )


def _guess(name: str, known: Collection[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name, known, n=1) if len(name) <= _LONGEST_NAME else []
    return f"did you mean {close[0]}?" if close else otherwise


def _prompts(fields: _Fields, limits: Limits) -> tuple[str | tuple[int, ...], ...]:
    given = fields.body.get("prompt")
    if given is None:
        fields.fault("prompt", "prompt is missing; give a text, token ids, or a list of either")
        return ()
    many = given if isinstance(given, list) and given and not _is_ids(given) else [given]
    if len(many) > limits.max_choices:
        fields.fault("prompt", f"{len(many)} prompts are more than {limits.max_choices} answers; send less")
        return ()
    prompts = []
    for one in many:
        if not (isinstance(one, str) or isinstance(one, list) and _is_ids(one)):
            fields.fault("prompt", f"prompt holds {shown(one)}; give a text, token ids, or a list of either")
        elif not one:
            fields.fault("prompt", "prompt is empty; give at least one token, e.g. the begin-of-text token")
        else:
            prompts.append(one if isinstance(one, str) else tuple(one))
    return tuple(prompts)


def _is_ids(value: Sequence[Any]) -> bool:
    return all(type(one) is int for one in value)  # a bool is an int, but no token


def _messages(fields: _Fields) -> tuple[dict[str, str], ...]:
    given = fields.body.get("messages")
    if not isinstance(given, list) or not given:
        fields.fault("messages", f"messages = {shown(given)} must be a list of at least one message")
        return ()
    if len(given) > MAX_MESSAGES:
        fields.fault("messages", f"messages has {len(given)} entries; {MAX_MESSAGES} are allowed")
        return ()
    messages = []
    for index, one in enumerate(given):
        where = f"messages[{index}]"
        if not isinstance(one, dict):
            fields.fault(where, f"{where} = {shown(one)} must be an object with role and content")
            continue
        role, content = one.get("role"), one.get("content")
        _refuse_others(fields, where, one, ("role", "content"), _NEUTRAL_IN_MESSAGE)
        if role not in ("system", "developer", "user", "assistant"):
            fields.fault(where, f"{where}.role = {shown(role)} must be system, developer, user or assistant")
        if isinstance(content, list):  # OpenAI's parts
            content = _joined_parts(fields, f"{where}.content", content)
        if not isinstance(content, str):
            fields.fault(where, f"{where}.content must be a text, or parts of type text; nothing else is read")
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    return tuple(messages)


def _joined_parts(fields: _Fields, where: str, parts: list[Any]) -> str | None:
    """Text of OpenAI's content parts; None = they are not all text."""
    if len(parts) > MAX_PARTS:
        fields.fault(where, f"{where} has {len(parts)} parts; {MAX_PARTS} are allowed")
        return None
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            return None
        _refuse_others(fields, f"{where}[{index}]", part, ("type", "text"))
        texts.append(part["text"])
    return "".join(texts)


def _refuse_others(
    fields: _Fields, where: str, given: Mapping[str, Any], known: Collection[str], neutral: Collection[str] = ()
) -> None:
    """A fault for each key that is not known, but for neutral ones that hold nothing."""
    for key, value in given.items():
        if key in known or key in neutral and (value is None or value == []):
            continue
        fields.fault(where, f"{where}.{key[:40]} is not supported here; {_guess(key, known, 'leave it out')}")


def _max_tokens(fields: _Fields, chat: bool, limits: Limits) -> int | None:
    tokens = fields.whole("max_tokens", None, 1, limits.max_new_tokens)
    if not chat:
        return min(_LEGACY_MAX_TOKENS, limits.max_new_tokens) if tokens is None else tokens
    new_name = fields.whole("max_completion_tokens", None, 1, limits.max_new_tokens)
    if tokens is not None and new_name is not None:
        fields.fault("max_tokens", "both max_tokens and max_completion_tokens are given; leave one out")
    return new_name if new_name is not None else tokens


def _sampling(fields: _Fields) -> SamplingParams:
    temperature = fields.number("temperature", 1.0, 0, 2)
    if 0 < temperature < 0.01:
        fields.fault("temperature", f"temperature = {temperature:g} must be 0 (greedy) or from 0.01 to 2")
    top_p = fields.number("top_p", 1.0, 1e-6, 1)
    top_k = fields.whole("top_k", None, 0, 2**31)
    penalty = fields.number("repetition_penalty", 1.0, 0.1, 10)
    seed = fields.whole("seed", None, -(2**63), 2**63 - 1)
    if temperature < 0.01:
        return SamplingParams(greedy=True, repetition_penalty=penalty)
    seed = secrets.randbits(63) if seed is None else seed % 2**64
    return SamplingParams(False, temperature, top_k or None, top_p, penalty, seed)


def _stops(fields: _Fields) -> tuple[str, ...]:
    given = fields.body.get("stop")
    stops = [] if given is None else [given] if isinstance(given, str) else given
    if not (
        isinstance(stops, list)
        and len(stops) <= MAX_STOPS
        and all(isinstance(one, str) and 0 < len(one) <= MAX_STOP_LENGTH for one in stops)
    ):
        rule = f"a text of 1 to {MAX_STOP_LENGTH} characters, or a list of at most {MAX_STOPS} of them"
        fields.fault("stop", f"stop = {shown(given)} must be {rule}")
        return ()
    return tuple(stops)


def _include_usage(fields: _Fields) -> bool:
    options = fields.body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        fields.fault("stream_options", f"stream_options = {shown(options)} must be {{include_usage: true | false}}")
        return False
    _refuse_others(fields, "stream_options", options, ("include_usage",))
    if fields.body.get("stream") is not True:
        fields.fault("stream_options", "stream_options is given without stream = true; leave it out")
    return options.get("include_usage", False)


def _num_top(fields: _Fields, chat: bool) -> int | None:
    """How many alternatives to report beside each token; None = no ln p at all. OpenAI's limits."""
    if not chat:
        return fields.whole("logprobs", None, 0, 5)
    wanted = fields.switch("logprobs")
    top = fields.whole("top_logprobs", 0, 0, 20)
    if top and not wanted:
        fields.fault("top_logprobs", "top_logprobs needs logprobs = true; set it, or leave top_logprobs out")
    return top if wanted else None


def _early_exit(fields: _Fields) -> dict[str, Any] | None:
    given = fields.body.get("early_exit")
    if given is None:
        return None
    if not isinstance(given, dict):
        example = '{"mode": "early_exit", "threshold": 0.8}'
        fields.fault("early_exit", f"early_exit = {shown(given)} must be an object, e.g. {example}")
        return None
    for key in given:
        if key not in EXIT_FIELDS:
            guess = _guess(key, EXIT_FIELDS, f"its keys are {', '.join(EXIT_FIELDS)}")
            fields.fault("early_exit", f"early_exit.{key[:40]} is unknown; {guess}")
    for key in ("exits", "threshold"):
        if isinstance(given.get(key), list | dict) and len(given[key]) > MAX_EXITS:
            fields.fault("early_exit", f"early_exit.{key} has {len(given[key])} entries; {MAX_EXITS} are allowed")
    return {key: value for key, value in given.items() if value is not None}
