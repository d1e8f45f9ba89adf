# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Requests of OpenAI's completions and chat completions, checked field by field, with early exit as one more field.

    early_exit: {mode, threshold | certificate, exits, criterion, max_pending_tokens, num_draft_tokens}

Every fault of a request is reported at once. What this server cannot do is refused (`other_fields.py`), never ignored.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.serving.errors import shown
from nemo_ee.serving.messages import Conversation, read_conversation
from nemo_ee.serving.other_fields import check_other
from nemo_ee.serving.request_fields import Fields, guess, is_number
from nemo_ee.text.renamed_keys import renamed_key

# Fields that are acted on, for both endpoints and for each.
_BOTH = frozenset(
    "model max_tokens temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty logit_bias "
    "seed n stop stop_token_ids ignore_eos min_tokens skip_special_tokens stream stream_options logprobs "
    "early_exit".split()
)
_OF_CHAT = frozenset(
    "messages max_completion_tokens top_logprobs tools tool_choice parallel_tool_calls continue_final_message "
    "add_generation_prompt chat_template_kwargs".split()
)
FIELDS = {False: _BOTH | {"prompt", "echo"}, True: _BOTH | _OF_CHAT}
EXIT_FIELDS = ("mode", "threshold", "certificate", "exits", "criterion", "max_pending_tokens", "num_draft_tokens")
MAX_STOPS, MAX_STOP_LENGTH, MAX_EXITS, MAX_BIASES = 16, 256, 256, 1024
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
        conversation: of a chat, else None.
        max_new_tokens: per answer; None = as many as there is room for.
        sampling: of the first answer; `sampling_of` has the others'.
        num_answers: per prompt.
        stops: strings that end an answer.
        stop_token_ids: token ids that end it, besides those of the model.
        ignore_eos: those of the model do not.
        min_tokens: no token ends an answer before it has so many.
        skip_special_tokens: special tokens have no text.
        echo: an answer starts with its prompt.
        stream, include_usage: send tokens as they come; with the usage at the end.
        num_top: report ln p of every token and of this many most likely ones; None = none.
        early_exit: the field as it came, an object of known keys, or None.
    """

    chat: bool
    model: str | None
    prompts: tuple[str | tuple[int, ...], ...]
    conversation: Conversation | None
    max_new_tokens: int | None
    sampling: SamplingParams
    num_answers: int
    stops: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    min_tokens: int
    skip_special_tokens: bool
    echo: bool
    stream: bool
    include_usage: bool
    num_top: int | None
    early_exit: Mapping[str, Any] | None

    @property
    def prompt_logprobs(self) -> int | None:
        """`prompt_logprobs` of its requests to the engine, which without a new token has to have another task."""
        if self.echo and self.num_top is not None:
            return self.num_top
        return 0 if self.max_new_tokens == 0 else None

    def sampling_of(self, prompt: int, answer: int) -> SamplingParams:
        """Of a prompt's answer, both by number; every answer of a request has random numbers of its own."""
        return replace(self.sampling, seed=self.sampling.seed + (answer << 64) + (prompt << 96))


def parse_call(body: Mapping[str, Any], *, chat: bool, limits: Limits) -> Call:
    """Check a request.

    Args:
        body: parsed JSON.
        chat: it came to /v1/chat/completions.
        limits: the server's.

    Raises:
        ApiError: 400, with every fault.
    """
    fields = Fields(body)
    _check_names(fields, chat)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        fields.fault("model", f"model = {shown(model)} must be a name")
    prompts = () if chat else _prompts(fields, limits)
    n = fields.whole("n", 1, 1, limits.max_choices)
    if len(prompts) * n > limits.max_choices:
        fields.fault("n", f"{len(prompts)} prompts x n = {n} are more than {limits.max_choices} answers; send less")
    call = Call(
        chat=chat,
        model=model,
        prompts=prompts,
        conversation=read_conversation(fields) if chat else None,
        max_new_tokens=_max_tokens(fields, chat, limits),
        sampling=_sampling(fields),
        num_answers=n,
        stops=_stops(fields),
        stop_token_ids=_stop_token_ids(fields),
        ignore_eos=fields.switch("ignore_eos"),
        min_tokens=_min_tokens(fields),
        skip_special_tokens=fields.switch("skip_special_tokens", default=True),
        echo=not chat and fields.switch("echo"),
        stream=fields.switch("stream"),
        include_usage=_include_usage(fields),
        num_top=_num_top(fields, chat),
        early_exit=_early_exit(fields),
    )
    fields.raise_all()
    return call


def _check_names(fields: Fields, chat: bool) -> None:
    for field in fields.body:
        if field in FIELDS[chat] or check_other(fields, chat, field):
            continue
        way_out = guess(field, FIELDS[chat], "leave it out")
        fields.fault(field[:60], f"{shown(field)} is not a field of this request; {way_out}")


def _prompts(fields: Fields, limits: Limits) -> tuple[str | tuple[int, ...], ...]:
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


def _max_tokens(fields: Fields, chat: bool, limits: Limits) -> int | None:
    if not chat:
        tokens = fields.whole("max_tokens", min(_LEGACY_MAX_TOKENS, limits.max_new_tokens), 0, limits.max_new_tokens)
        if tokens == 0 and fields.body.get("echo") is not True:
            fields.fault("max_tokens", "max_tokens = 0 needs echo = true, for there is no answer; ask for at least 1")
        return tokens
    tokens = fields.whole("max_tokens", None, 1, limits.max_new_tokens)
    new_name = fields.whole("max_completion_tokens", None, 1, limits.max_new_tokens)
    if tokens is not None and new_name is not None:
        fields.fault("max_tokens", "both max_tokens and max_completion_tokens are given; leave one out")
    return new_name if new_name is not None else tokens


def _sampling(fields: Fields) -> SamplingParams:
    temperature = fields.number("temperature", 1.0, 0, 2)
    if 0 < temperature < 0.01:
        fields.fault("temperature", f"temperature = {temperature:g} must be 0 (greedy) or from 0.01 to 2")
    top_p = fields.number("top_p", 1.0, 1e-6, 1)
    top_k = fields.whole("top_k", None, -1, 2**31)
    min_p = fields.number("min_p", 0.0, 0, 1)
    seed = fields.whole("seed", None, -(2**63), 2**63 - 1)
    shifts: dict[str, Any] = {
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 0.1, 10),
        "presence_penalty": fields.number("presence_penalty", 0.0, -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -2, 2),
        "logit_bias": _logit_bias(fields),
    }
    if temperature < 0.01:
        return SamplingParams(greedy=True, **shifts)
    seed = secrets.randbits(63) if seed is None else seed % 2**64
    top_k = None if top_k in (-1, 0) else top_k  # vLLM's ways to say all
    return SamplingParams(False, temperature, top_k, top_p, min_p=min_p, seed=seed, **shifts)


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    """(token, bias) pairs; whether the model has the tokens is not known here."""
    given = fields.body.get("logit_bias")
    if given is None:
        return ()
    if not isinstance(given, dict) or len(given) > MAX_BIASES:
        rule = f"an object of at most {MAX_BIASES} numbers by token id"
        fields.fault("logit_bias", f"logit_bias = {shown(given)} must be {rule}")
        return ()
    biases: dict[int, float] = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10) or not is_number(bias, -100, 100):
            rule = "token ids as texts, each with a number from -100 to 100"
            fields.fault("logit_bias", f"logit_bias holds {shown({token: bias})}; it must hold {rule}")
        elif int(token) in biases:
            fields.fault("logit_bias", f"logit_bias names token {int(token)} twice; name it once")
        else:
            biases[int(token)] = float(bias)
    return tuple(sorted(biases.items()))


def _stop_token_ids(fields: Fields) -> tuple[int, ...]:
    given = fields.body.get("stop_token_ids")
    if given is None:
        return ()
    if not isinstance(given, list) or len(given) > MAX_BIASES or not _is_ids(given):
        rule = f"a list of at most {MAX_BIASES} token ids"
        fields.fault("stop_token_ids", f"stop_token_ids = {shown(given)} must be {rule}")
        return ()
    return tuple(given)


def _min_tokens(fields: Fields) -> int:
    least = fields.whole("min_tokens", 0, 0, 2**31)
    if least and fields.body.get("stop"):
        fields.fault("min_tokens", "min_tokens and stop are both given; leave one out, or use stop_token_ids")
    return least


def _stops(fields: Fields) -> tuple[str, ...]:
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


def _include_usage(fields: Fields) -> bool:
    """Whether a stream ends with the usage; without a stream there is none to end."""
    options = fields.body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not isinstance(options.get("include_usage") or False, bool):
        fields.fault("stream_options", f"stream_options = {shown(options)} must be {{include_usage: true | false}}")
        return False
    off = [key for key in ("include_obfuscation", "continuous_usage_stats") if options.get(key) in (None, False)]
    fields.refuse_others("stream_options", options, ("include_usage", *off))
    return options.get("include_usage") is True


def _num_top(fields: Fields, chat: bool) -> int | None:
    """How many alternatives to report beside each token; None = no ln p at all. OpenAI's limits."""
    if not chat:
        return fields.whole("logprobs", None, 0, 5)
    wanted = fields.switch("logprobs")
    top = fields.whole("top_logprobs", 0, 0, 20)
    if top and not wanted:
        fields.fault("top_logprobs", "top_logprobs needs logprobs = true; set it, or leave top_logprobs out")
    return top if wanted else None


def _early_exit(fields: Fields) -> dict[str, Any] | None:
    given = fields.body.get("early_exit")
    if given is None:
        return None
    if not isinstance(given, dict):
        example = '{"mode": "early_exit", "threshold": 0.8}'
        fields.fault("early_exit", f"early_exit = {shown(given)} must be an object, e.g. {example}")
        return None
    for key in given:
        if key not in EXIT_FIELDS:
            way_out = guess(key, EXIT_FIELDS, f"its keys are {', '.join(EXIT_FIELDS)}")
            new = renamed_key(key)
            problem = f"is now {new}" if new else f"is unknown; {way_out}"
            fields.fault("early_exit", f"early_exit.{key[:40]} {problem}")
    for key in ("exits", "threshold"):
        if isinstance(given.get(key), list | dict) and len(given[key]) > MAX_EXITS:
            fields.fault("early_exit", f"early_exit.{key} has {len(given[key])} entries; {MAX_EXITS} are allowed")
    return {key: value for key, value in given.items() if value is not None}
