# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The model that is served: weights, tokenizer, chat template, and engine requests made from users' requests."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError

from nemo_ee.certificates.certificate import Certificate
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.items import DecodingModel
from nemo_ee.generation.policy import MODES, course_of
from nemo_ee.generation.request import Request
from nemo_ee.generation.session import DecodingSession
from nemo_ee.serving.certified import check_setting, promise
from nemo_ee.serving.errors import ApiError, shown
from nemo_ee.serving.exit_choice import ExitChoice, exit_choice
from nemo_ee.serving.protocol import Call

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A call as the engine takes it: the requests in the order of the answers, and how their tokens leave."""

    requests: tuple[Request, ...]
    choice: ExitChoice
    num_prompt_tokens: int


class ServedModel:
    """A model with the tokenizer that belongs to it.

    Args:
        name: what requests call it.
        model: what decodes.
        tokenizer: transformers'.
        default: mode and policy of requests that do not say.
        stop_tokens: ids that end every answer.
        max_length: most tokens of a sequence, prompt included; None = the model's positions.
        max_new_tokens: most new ones.
        certificates: of these weights, by name.
        precision: of the weights, in the words of certificates: `32` or `bf16`.
        cost_rule: of the engine.

    Raises:
        ValueError: the defaults do not fit the model.
    """

    def __init__(
        self,
        name: str,
        model: DecodingModel,
        tokenizer: Any,
        default: ExitChoice,
        stop_tokens: frozenset[int],
        max_length: int | None,
        max_new_tokens: int,
        certificates: Mapping[str, Certificate] = MappingProxyType({}),
        precision: str = "32",
        cost_rule: str = "none",
    ) -> None:
        self._engine = EarlyExitEngine(model, cost_rule=cost_rule)
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.default, self.stop_tokens, self.max_new_tokens = default, stop_tokens, max_new_tokens
        self.certificates, self.precision = certificates, precision
        self.max_length = model.max_positions if max_length is None else max_length
        if self.max_length > model.max_positions:
            raise ValueError(
                f"max_length={self.max_length} is more than the model's {model.max_positions} positions; lower it"
            )
        course_of(default.mode, default.policy, model.exits, model.num_layers)

    @property
    def has_chat_template(self) -> bool:
        """Whether it can be talked to in messages."""
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

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def prepare(self, call: Call) -> Prepared:
        """Tokenize a call and hold it against the model. Costs time with a long prompt: not for the event loop.

        Raises:
            ApiError: 400 or 404.
        """
        if call.model is not None and call.model != self.name:
            raise ApiError(
                404,
                f"the model {shown(call.model)} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
        choice = exit_choice(call.early_exit, self.model, self.default, self.certificates)
        prompts = [self._chat_ids(call.messages)] if call.chat else [self._ids(prompt) for prompt in call.prompts]
        requests = []
        for number, prompt in enumerate(prompts):
            for answer in range(call.num_answers):
                requests.append(
                    Request(
                        prompt,
                        self._new_tokens(prompt, call),
                        call.sampling_of(number, answer),
                        stop_tokens=self.stop_tokens,
                        num_top=call.num_top or 0,
                        mode=choice.mode,
                        policy=choice.policy,
                    )
                )
        if choice.certificate is not None:
            check_setting(choice.certificate, call, requests, self.precision)
        return Prepared(tuple(requests), choice, sum(map(len, prompts)))

    def _ids(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            outside = [token for token in prompt if not 0 <= token < self.model.vocab_size]
            if outside:
                raise ApiError(
                    400,
                    f"prompt holds the token {outside[0]}, which is outside the vocabulary "
                    f"0..{self.model.vocab_size - 1}; use the tokenizer of {self.name!r}",
                    param="prompt",
                )
            return prompt
        ids = tuple(self.tokenizer(prompt, verbose=False)["input_ids"])
        if not ids:
            raise ApiError(400, f"prompt = {shown(prompt)} has no tokens; write something", param="prompt")
        return ids

    def _chat_ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        if not self.has_chat_template:
            raise ApiError(
                400,
                f"the tokenizer of {self.name!r} has no chat template; use /v1/completions, or start the server with "
                "chat_template=<file>",
                param="messages",
            )
        try:
            ids = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as fault:  # what a template says to messages it was not made for
            raise ApiError(
                400, f"the model's chat template refuses these messages: {fault}", param="messages"
            ) from None
        except Exception:  # whatever else it does with them
            _LOG.exception("the chat template failed")
            raise ApiError(400, "the model's chat template fails on these messages", param="messages") from None
        if not ids:
            raise ApiError(400, "the messages have no tokens; write something", param="messages")
        return tuple(ids)

    def _new_tokens(self, prompt: Sequence[int], call: Call) -> int:
        room = self.max_length - len(prompt)
        wanted = call.max_new_tokens if call.max_new_tokens is not None else max(1, min(room, self.max_new_tokens))
        if wanted > room:
            raise ApiError(
                400,
                f"{len(prompt)} prompt tokens + max_tokens = {wanted} are more than the {self.max_length} tokens a "
                f"sequence may have here; shorten the prompt or ask for at most {max(0, room)} new tokens",
                param="messages" if call.chat else "prompt",
                code="context_length_exceeded",
            )
        return wanted

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
                "certificates": [promise(one) for one in self.certificates.values()],
                "default": {
                    "mode": default.mode,
                    "threshold": default.policy.thresholds,
                    "criterion": default.policy.criterion,
                    "exits": None if default.policy.active is None else list(default.policy.active),
                    "max_waiting": default.policy.max_waiting,
                },
            },
        }


def stop_tokens_of(directory: Path, tokenizer: Any) -> frozenset[int]:
    """The end-of-text token of the tokenizer and those of generation_config.json."""
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        named = json.loads((directory / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        named = None
    stops += named if isinstance(named, list) else [named]
    return frozenset(one for one in stops if isinstance(one, int) and not isinstance(one, bool))
