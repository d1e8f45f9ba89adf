# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The model that is served: weights, tokenizer, chat template, and engine requests made from users' requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from nemo_ee.certificates.certificate import Certificate
from nemo_ee.exits.criteria import CRITERIA, OF_LOGITS
from nemo_ee.generation.decoding_model import DecodingModel
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import MODES, plan_exits
from nemo_ee.generation.request import Request
from nemo_ee.generation.session import DecodingSession
from nemo_ee.generation.validation import request_problems, token_problems, too_long
from nemo_ee.serving.chat_prompt import chat_prompt
from nemo_ee.serving.errors import ApiError
from nemo_ee.serving.exit_choice import ExitChoice, exit_choice
from nemo_ee.serving.messages import Conversation
from nemo_ee.serving.protocol import ApiRequest
from nemo_ee.serving.request_certificates import check_setting, promise
from nemo_ee.settings.user_input import shortened
from nemo_ee.text.special_tokens import EndOfText, prompt_ids


@dataclass(frozen=True)
class Prepared:
    """A call for the engine: the requests in the order of the answers, and their exit choice.

    `prompt_texts`: the beginning of each answer where the call has `echo`, else empty texts.
    """

    requests: tuple[Request, ...]
    choice: ExitChoice
    num_prompt_tokens: int
    prompt_texts: tuple[str, ...]


class ServedModel:
    """A model with the tokenizer that belongs to it.

    Args:
        name: name of the model in requests.
        model: the runtime model.
        tokenizer: a `JsonTokenizer`, or transformers'.
        default: mode and policy of requests without their own.
        end_of_text: the tokens that end every answer.
        max_length: most tokens of a sequence, prompt included; None = the model's positions.
        max_new_tokens: most new tokens of an answer.
        certificates: certificates of these weights, by name.
        precision: precision of the weights, in the words of certificates: `32` or `bf16`.
        engine: the model's engine; None = one without a cost rule.

    Raises:
        ValueError: the defaults do not fit the model.
    """

    def __init__(
        self,
        name: str,
        model: DecodingModel,
        tokenizer: Any,
        default: ExitChoice,
        end_of_text: EndOfText,
        max_length: int | None,
        max_new_tokens: int,
        certificates: Mapping[str, Certificate] = MappingProxyType({}),
        precision: str = "32",
        engine: EarlyExitEngine | None = None,
    ) -> None:
        self._engine = EarlyExitEngine(model) if engine is None else engine
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.end_of_text, self.stop_tokens = end_of_text, frozenset(end_of_text.ids)
        self.default, self.max_new_tokens = default, max_new_tokens
        self.certificates, self.precision = certificates, precision
        self.max_length = model.max_positions if max_length is None else max_length
        if self.max_length > model.max_positions:
            raise ValueError(
                f"max_length={self.max_length} is more than the model's {model.max_positions} positions; lower it"
            )
        plan_exits(default.mode, default.policy, model.exits, model.num_layers)

    @property
    def has_chat_template(self) -> bool:
        """Whether it has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def start_session(self, num_slots: int) -> DecodingSession:
        """An empty session that any request fits into."""
        return self._engine.start(
            [],
            mode=self.default.mode,
            policy=self.default.policy,
            exits=[point.name for point in self.model.exits],
            num_slots=num_slots,
            max_length=self.max_length,
        )

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        kind = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(ids, **kind)

    def decoder(self, call: ApiRequest) -> Callable[[list[int]], str]:
        """`decode` with the call's setting of special tokens."""
        return partial(self.decode, skip_special_tokens=call.skip_special_tokens)

    def prepare(self, call: ApiRequest) -> Prepared:
        """Tokenize a request and check it against the model. Long prompts take long, so it runs outside of the event
        loop.

        Raises:
            ApiError: 400, with every problem, or 404.
        """
        if call.model is not None and call.model != self.name:
            raise ApiError(
                404,
                f"the model {shortened(call.model)} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
        choice = exit_choice(call.early_exit, self.model, self.default, self.certificates)
        if call.conversation is not None:
            prompts = [self._chat_ids(call.conversation)]
        else:
            prompts = [self._ids(prompt) for prompt in call.prompts]
        stop_tokens = (frozenset() if call.ignore_eos else self.stop_tokens) | set(call.stop_token_ids)
        requests = [
            Request(
                prompt,
                self._new_tokens(prompt, call),
                call.sampling_of(number, answer),
                stop_tokens=stop_tokens,
                min_new_tokens=call.min_tokens,
                num_top=call.num_top or 0,
                prompt_logprobs=call.num_prompt_top,
                mode=choice.mode,
                policy=choice.policy,
            )
            for number, prompt in enumerate(prompts)
            for answer in range(call.n)
        ]
        self._check(call, requests[:: call.n])
        if choice.certificate is not None:
            check_setting(choice.certificate, call, requests, self.precision, self.end_of_text)
        texts = [""] * len(prompts)
        if call.echo:
            decode = self.decoder(call)
            given = zip(call.prompts, prompts, strict=True)
            texts = [text if isinstance(text, str) else decode(list(ids)) for text, ids in given]
        texts = [text for text in texts for _ in range(call.n)]
        return Prepared(tuple(requests), choice, sum(map(len, prompts)), tuple(texts))

    def _check(self, call: ApiRequest, requests: Sequence[Request]) -> None:
        """Check the first request of each prompt against the model; messages name the API's fields."""
        prompt_field = "messages" if call.chat else "prompt"
        biased = [token for token, _ in call.sampling.logit_bias]
        named = [("logit_bias", biased), ("stop_token_ids", call.stop_token_ids)]
        problems = [
            (field, text)
            for field, ids in [(prompt_field, own.prompt) for own in requests] + [one for one in named if one[1]]
            for text in token_problems(self.model.vocab_size, field, ids)
        ]
        code, rule = None, f"the {self.max_length} tokens a sequence may have here"
        for own in requests:
            if len(own.prompt) + own.max_new_tokens > self.max_length:
                text = too_long(len(own.prompt), own.max_new_tokens, "max_tokens", self.max_length, rule)
                problems.append((prompt_field, text))
                code = "context_length_exceeded"
            elif own.min_new_tokens > own.max_new_tokens:
                text = f"min_tokens = {own.min_new_tokens} is more than max_tokens = {own.max_new_tokens}; lower it"
                problems.append(("min_tokens", text))
        # The remaining problems have no field of their own.
        problems = problems or [
            (None, text) for own in requests for text in request_problems(self.model, "the request", own)
        ]
        if problems:
            texts = "; ".join(dict.fromkeys(text for _, text in problems))
            raise ApiError(400, texts, param=problems[0][0], code=code)

    def _ids(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        return tuple(prompt_ids(self.tokenizer, prompt)) if isinstance(prompt, str) else prompt

    def _chat_ids(self, conversation: Conversation) -> tuple[int, ...]:
        if not self.has_chat_template:
            raise ApiError(
                400,
                f"the tokenizer of {self.name!r} has no chat template; use /v1/completions, or start the server with "
                "chat_template=<file>",
                param="messages",
            )
        text = chat_prompt(self.tokenizer, conversation)
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _new_tokens(self, prompt: Sequence[int], call: ApiRequest) -> int:
        if call.max_new_tokens is not None:
            return call.max_new_tokens
        return max(1, min(self.max_length - len(prompt), self.max_new_tokens))

    def card(self, created: int) -> dict[str, Any]:
        """Its entry in /v1/models."""
        model, default = self.model, self.default
        return {
            "id": self.name,
            "object": "model",
            "created": created,
            "owned_by": "nemo_ee",
            "max_model_len": self.max_length,
            "max_new_tokens": self.max_new_tokens,
            "chat": self.has_chat_template,
            "early_exit": {
                "num_layers": model.num_layers,
                "exits": [{"name": point.name, "layer": point.layer} for point in model.exits],
                "modes": list(MODES) if model.exits else ["full"],
                "criteria": list(CRITERIA if any(point.probe for point in model.exits) else OF_LOGITS),
                "certificates": [promise(one) for one in self.certificates.values()],
                "default": {
                    "mode": default.mode,
                    "threshold": default.policy.thresholds,
                    "criterion": default.policy.criterion,
                    "exits": None if default.policy.active is None else list(default.policy.active),
                    "max_pending_tokens": default.policy.max_pending_tokens,
                    "num_draft_tokens": default.policy.num_draft_tokens,
                    "draft_rule": default.policy.draft_rule,
                },
            },
        }
