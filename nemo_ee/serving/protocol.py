# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Requests of OpenAI's completions and chat completions as pydantic models, with early exit as one more field.

    early_exit: {mode, threshold | certificate, exits, criterion, max_pending_tokens, num_draft_tokens,
        draft_rule}

A field's type has its limits and its description; errors and the published schema are made from them. Every problem of
a request is reported at once. Unsupported fields are refused (`other_fields.py`).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, create_model, field_validator

from nemo_ee.exits.criteria import CRITERIA
from nemo_ee.generation.policy import DRAFT_RULES, MODES
from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.serving.errors import ApiError
from nemo_ee.serving.messages import Conversation, Messages, Tools
from nemo_ee.serving.other_fields import other_fields
from nemo_ee.serving.request_fields import MAX_PROBLEMS, RequestFields, UpTo
from nemo_ee.settings.user_input import InputError, Natural, read, rule, shortened
from nemo_ee.text.json_values import JsonError, parse_json

MAX_STOPS, MAX_STOP_LENGTH, MAX_EXITS, MAX_TOKEN_IDS = 16, 256, 256, 1024
LEAST_TEMPERATURE = 0.01  # above 0
_LEGACY_MAX_TOKENS = 16  # OpenAI's default for completions
_TOKEN_ID = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        max_new_tokens: new tokens per answer.
        max_choices: answers per request, prompts times `n`.
    """

    max_new_tokens: int
    max_choices: int


class EarlyExit(RequestFields):
    """Early exit of a request. Missing keys have the server's defaults, which /v1/models lists."""

    mode: Literal[MODES] | None = Field(
        None, description="self_speculative and full give the full model's text; static_depth uses one exit"
    )
    threshold: float | Annotated[dict[str, float], UpTo(MAX_EXITS)] | None = Field(
        None,
        description="a token leaves if its confidence is greater: one number, or one for each exit by name. From 0 to "
        "1, where 1 never leaves; with criterion entropy in nats, less leaves and 0 never does",
    )
    certificate: Literal[True] | str | None = Field(
        None,
        description="name of a certificate whose thresholds are used; true is the only one, or the one named default",
    )
    exits: Annotated[tuple[str, ...], UpTo(MAX_EXITS)] | None = Field(
        None, description="names of the exits where tokens may leave; static_depth takes one"
    )
    criterion: Literal[CRITERIA] | None = Field(None, description="measure of confidence; goes with a threshold")
    max_pending_tokens: Natural | None = Field(
        None, description="mode early_exit: tokens that left early and whose deeper layers have not run"
    )
    num_draft_tokens: Natural | None = Field(
        None, description="mode self_speculative: tokens drafted before they are verified"
    )
    draft_rule: Literal[DRAFT_RULES] | None = Field(
        None, description="mode self_speculative: drafts by the thresholds (fixed) or by expected time (value)"
    )


class StreamOptions(RequestFields):
    """Options of a stream; without `stream` they have no effect."""

    include_usage: bool | None = Field(False, description="the stream ends with the usage")
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


PromptText = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[tuple[int, ...], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class ApiRequest(RequestFields):
    """The fields of both endpoints that have an effect."""

    chat: ClassVar[bool]
    limits: ClassVar[Limits]
    prompts: ClassVar[tuple[()]] = ()
    conversation: ClassVar[None] = None

    model: str | None = Field(None, description="name of the model, as /v1/models lists it; null is the served one")
    n: int | None = Field(1, ge=1, description="answers per prompt")
    temperature: float | None = Field(
        1.0, ge=0, le=2, description=f"divides the logits; 0 is greedy, otherwise at least {LEAST_TEMPERATURE}"
    )
    top_p: float | None = Field(
        1.0, ge=1e-6, le=1, description="keeps the fewest most likely tokens whose probabilities sum to this"
    )
    top_k: int | None = Field(-1, ge=-1, le=2**31, description="keeps this many most likely tokens; -1 and 0 keep all")
    min_p: float | None = Field(
        0.0, ge=0, le=1, description="keeps tokens with at least this share of the most likely token's probability"
    )
    repetition_penalty: float | None = Field(
        1.0, ge=0.1, le=10, description="divides (negative: multiplies) logits of tokens in prompt and answer; 1 = off"
    )
    presence_penalty: float | None = Field(
        0.0, ge=-2, le=2, description="is subtracted from logits of tokens in the answer"
    )
    frequency_penalty: float | None = Field(
        0.0, ge=-2, le=2, description="is subtracted from logits once for each time a token is in the answer"
    )
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], UpTo(MAX_TOKEN_IDS)] | None = Field(
        {},
        json_schema_extra={"propertyNames": {"pattern": f"^{_TOKEN_ID.pattern}$"}},
        description="numbers that are added to logits, by token id (a text of digits)",
    )
    seed: int | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="the same seed gives the same text; null draws one"
    )
    stop: Stop | Annotated[tuple[Stop, ...], UpTo(MAX_STOPS)] | None = Field(
        (), description="texts that end an answer and are no part of it"
    )
    stop_token_ids: Annotated[tuple[int, ...], UpTo(MAX_TOKEN_IDS)] | None = Field(
        (), description="token ids that end an answer, besides the model's own"
    )
    ignore_eos: bool | None = Field(False, description="the model's own end tokens do not end an answer")
    min_tokens: int | None = Field(
        0, ge=0, le=2**31, description="new tokens before which no token ends an answer; not together with stop"
    )
    skip_special_tokens: bool | None = Field(True, description="special tokens have no text")
    stream: bool | None = Field(False, description="tokens are sent as they come, as server-sent events")
    stream_options: StreamOptions | None = Field(None, description="options of a stream")
    early_exit: EarlyExit | None = Field(None, description="how tokens leave early; null is the server's default")

    @field_validator("temperature")
    @classmethod
    def _not_almost_greedy(cls, temperature: float) -> float:
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"must be 0 (greedy) or from {LEAST_TEMPERATURE} to 2")
        return temperature

    @field_validator("logit_bias")
    @classmethod
    def _each_token_once(cls, biases: Mapping[str, float]) -> Mapping[str, float]:
        bad = [token for token in biases if not _TOKEN_ID.fullmatch(token)]
        if bad:
            raise ValueError(f"holds {shortened({bad[0]: biases[bad[0]]})}; its keys must be token ids as texts")
        if len({int(token) for token in biases}) < len(biases):
            raise ValueError("names a token twice; name it once")
        return biases

    @field_validator("min_tokens")
    @classmethod
    def _without_stop(cls, min_tokens: int, info: ValidationInfo) -> int:
        if min_tokens and info.data.get("stop"):
            raise ValueError("and stop are both given; leave one out, or use stop_token_ids")
        return min_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_prompt_top(self) -> int | None:
        """`prompt_logprobs` of the engine's requests, which a request without new tokens needs."""
        if self.echo and self.num_top is not None:
            return self.num_top
        return 0 if self.max_new_tokens == 0 else None

    @cached_property
    def sampling(self) -> SamplingParams:
        """Sampling of the first answer; without a seed one is drawn, once."""
        shifts: dict[str, Any] = {
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": tuple(sorted((int(token), bias) for token, bias in self.logit_bias.items())),
        }
        if self.temperature == 0:
            return SamplingParams(greedy=True, **shifts)
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**64
        top_k = None if self.top_k in (-1, 0) else self.top_k
        return SamplingParams(False, self.temperature, top_k, self.top_p, min_p=self.min_p, seed=seed, **shifts)

    def sampling_of(self, prompt: int, answer: int) -> SamplingParams:
        """Sampling of a prompt's answer, both by number: every answer of a request has its own random numbers."""
        return replace(self.sampling, seed=self.sampling.seed + (answer << 64) + (prompt << 96))


class CompletionRequest(ApiRequest):
    """Request to continue prompts."""

    chat: ClassVar[bool] = False

    echo: bool | None = Field(False, description="the answer starts with the prompt, with logprobs also its tokens")
    max_tokens: int | None = Field(_LEGACY_MAX_TOKENS, ge=0, description="new tokens per answer; 0 needs echo")
    logprobs: int | None = Field(
        None, ge=0, le=5, description="ln p of every token and of this many most likely tokens beside it; null = none"
    )
    prompt: Annotated[
        PromptText | TokenIds | Annotated[tuple[PromptText | TokenIds, ...], Field(min_length=1, fail_fast=True)],
        rule("a text, token ids, or a list of either, none of them empty"),
    ] = Field(description="what the answer continues; each prompt of a list has its own answers")

    @field_validator("max_tokens")
    @classmethod
    def _none_with_echo(cls, max_tokens: int, info: ValidationInfo) -> int:
        if max_tokens == 0 and not info.data.get("echo", True):
            raise ValueError("needs echo = true, because there is no answer; request at least 1")
        return max_tokens

    @field_validator("prompt")
    @classmethod
    def _not_too_many(cls, prompt: Any, info: ValidationInfo) -> Any:
        n, most = info.data.get("n", 1), cls.limits.max_choices
        if len(_several(prompt)) * n > most:
            raise ValueError(f"with n={n} is more than {most} answers; send less")
        return prompt

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """Texts or token ids."""
        return _several(self.prompt)

    @property
    def max_new_tokens(self) -> int:
        """New tokens per answer."""
        return self.max_tokens

    @property
    def num_top(self) -> int | None:
        """Number of most likely tokens to report beside each token; None = no ln p at all."""
        return self.logprobs


def _several(prompt: str | tuple[Any, ...]) -> tuple[Any, ...]:
    """The prompts of a request's field."""
    return (prompt,) if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class ChatRequest(ApiRequest):
    """Request to answer in a conversation."""

    chat: ClassVar[bool] = True

    messages: Messages = Field(description="the conversation, which the model's chat template writes")
    max_tokens: int | None = Field(None, ge=1, description="new tokens per answer; null = as many as fit")
    max_completion_tokens: int | None = Field(None, ge=1, description="another name of max_tokens")
    logprobs: bool | None = Field(False, description="ln p of every token")
    top_logprobs: int | None = Field(
        0, ge=0, le=20, description="number of most likely tokens beside each token; needs logprobs"
    )
    tools: Tools | None = Field((), description="tools that the chat template describes; calls stand in the text")
    tool_choice: Literal["auto", "none"] | None = Field("auto", description="none hides the tools from the model")
    parallel_tool_calls: bool | None = Field(True, description="false is refused where there are tools")
    continue_final_message: bool | None = Field(False, description="the answer continues the last message's text")
    add_generation_prompt: bool | None = Field(
        None, description="the beginning of the answer's turn is written; null = unless continue_final_message"
    )
    chat_template_kwargs: dict[str, Any] | None = Field({}, description="further names that the chat template sees")

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_of_both(cls, max_tokens: int, info: ValidationInfo) -> int:
        if info.data.get("max_tokens") is not None:
            raise ValueError("and max_tokens are both given; leave one out")
        return max_tokens

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, top: int, info: ValidationInfo) -> int:
        if top and not info.data.get("logprobs", True):
            raise ValueError("needs logprobs = true; set it, or leave top_logprobs out")
        return top

    @field_validator("parallel_tool_calls")
    @classmethod
    def _not_one_at_a_time(cls, parallel: bool, info: ValidationInfo) -> bool:
        if not parallel and info.data.get("tools") and info.data.get("tool_choice") == "auto":
            raise ValueError("is not supported here; tool calls are not read out of the answer; leave it out")
        return parallel

    @field_validator("continue_final_message")
    @classmethod
    def _something_to_continue(cls, continues: bool, info: ValidationInfo) -> bool:
        messages = info.data.get("messages")
        if continues and messages and not messages[-1].content:
            raise ValueError("needs a last message with a text to continue; leave it out")
        return continues

    @field_validator("add_generation_prompt")
    @classmethod
    def _not_behind_a_continued_message(cls, opens: bool, info: ValidationInfo) -> bool:
        if opens and info.data.get("continue_final_message"):
            raise ValueError("and continue_final_message are both true; set one of them to false")
        return opens

    @property
    def max_new_tokens(self) -> int | None:
        """New tokens per answer; None = as many as there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_top(self) -> int | None:
        """Number of most likely tokens to report beside each token; None = no ln p at all."""
        return self.top_logprobs if self.logprobs else None

    @cached_property
    def conversation(self) -> Conversation:
        """Input of the chat template."""
        continues, opens = self.continue_final_message, self.add_generation_prompt
        return Conversation(
            tuple(message.for_template() for message in self.messages),
            () if self.tool_choice == "none" else self.tools,
            continues,
            not continues if opens is None else opens,
            self.chat_template_kwargs,
        )


@cache
def request_model(chat: bool, limits: Limits) -> type[CompletionRequest] | type[ChatRequest]:
    """The model of an endpoint's requests with a server's limits and with the fields of `other_fields.py`."""
    kind = ChatRequest if chat else CompletionRequest
    most = {"n": limits.max_choices} | dict.fromkeys(("max_tokens", "max_completion_tokens"), limits.max_new_tokens)
    fields: dict[str, Any] = other_fields(chat)
    for key in most.keys() & kind.model_fields.keys():
        info = kind.model_fields[key]
        default = info.default if info.default is None else min(info.default, most[key])
        fields[key] = (Annotated[info.annotation, info, Field(le=most[key])], default)
    model = create_model(kind.__name__, __base__=kind, **fields)
    model.__doc__, model.limits = kind.__doc__, limits
    return model


def read_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body, within the limits of `nemo_ee.text.json_values`.

    Raises:
        ApiError: 400.
    """
    try:
        value = parse_json(body)
    except JsonError as error:
        raise ApiError(400, f"the body cannot be read, line {error.line}: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {shortened(value)}")
    return value


def read_request(body: Mapping[str, Any], *, chat: bool, limits: Limits) -> CompletionRequest | ChatRequest:
    """Validate a request.

    Args:
        body: parsed JSON.
        chat: whether it came to /v1/chat/completions.
        limits: the server's.

    Raises:
        ApiError: 400, with every problem.
    """
    try:
        return read(request_model(chat, limits), body, most=MAX_PROBLEMS)
    except InputError as error:
        texts = "; ".join(problem.text for problem in error.problems)
        raise ApiError(400, texts, param=error.problems[0].where) from None
