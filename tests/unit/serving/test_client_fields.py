# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Every field that OpenAI's client and vLLM's extra fields can bring: acted on, taken without effect, or refused with
the way out; and docs/server.md says which."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest

pytest.importorskip("openai")

from openai.types import chat, completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from nemo_ee.generation.sampling import GREEDY, SamplingParams
from nemo_ee.serving.errors import ApiError
from nemo_ee.serving.messages import AssistantMessage, Message, TextPart, ToolMessage
from nemo_ee.serving.other_fields import NEUTRAL, NEUTRAL_OF
from nemo_ee.serving.protocol import ApiRequest, EarlyExit, Limits, read_request, request_model

LIMITS = Limits(max_new_tokens=64, max_choices=4)
BODY = {False: {"prompt": "x"}, True: {"messages": [{"role": "user", "content": "x"}]}}
CLIENT = {
    False: completion_create_params.CompletionCreateParamsBase,
    True: chat_create_params.CompletionCreateParamsBase,
}
BOTH = pytest.mark.parametrize("is_chat", [False, True], ids=["completions", "chat"])
# What vLLM's servers take beside OpenAI's fields, with the values that change nothing there.
VLLM = {
    "top_k": [-1, 0], "min_p": [0.0, 0], "repetition_penalty": [1.0], "length_penalty": [1.0], "stop_token_ids": [[]],
    "include_stop_str_in_output": [False], "ignore_eos": [False], "min_tokens": [0], "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True], "truncate_prompt_tokens": [], "prompt_logprobs": [], "bad_words": [[]],
    "allowed_token_ids": [], "use_beam_search": [False], "early_stopping": [False], "guided_json": [],
    "guided_regex": [], "guided_choice": [], "guided_grammar": [], "guided_decoding_backend": [],
    "guided_whitespace_pattern": [], "structural_tag": [], "structured_outputs": [], "priority": [0],
    "request_id": ["a"], "logits_processors": [[]], "return_tokens_as_token_ids": [False],
    "return_token_ids": [False], "cache_salt": ["a"], "kv_transfer_params": [], "vllm_xargs": [{}],
}  # fmt: skip
VLLM_OF = {
    False: {"add_special_tokens": [True], "prompt_embeds": []},
    True: {"add_special_tokens": [False], "add_generation_prompt": [True], "continue_final_message": [False],
           "echo": [False], "documents": [[]], "chat_template": [], "chat_template_kwargs": [{}],
           "mm_processor_kwargs": [{}], "include_reasoning": [True], "media_io_kwargs": [{}]},
}  # fmt: skip
# Of OpenAI's fields, values that ask for what happens anyway.
OPENAI = {
    "frequency_penalty": [0, 0.0], "presence_penalty": [0, -0.0], "logit_bias": [{}], "n": [1], "stop": [[]],
    "stream": [False], "top_p": [1], "temperature": [1], "user": ["a"],
    "stream_options": [{}, {"include_usage": True}, {"include_usage": None}, {"include_obfuscation": False}],
}  # fmt: skip
OPENAI_OF = {
    False: {"best_of": [1], "echo": [False], "suffix": [""]},
    True: {"audio": [], "function_call": ["none", "auto"], "functions": [[]], "logprobs": [False], "metadata": [{}],
           "modalities": [["text"]], "parallel_tool_calls": [True, False], "prediction": [], "top_logprobs": [0],
           "prompt_cache_key": ["a"], "reasoning_effort": ["none"], "response_format": [{"type": "text"}],
           "safety_identifier": ["a"], "service_tier": ["auto", "default"], "store": [False], "tools": [[]],
           "tool_choice": ["auto", "none"], "verbosity": ["medium"], "prompt_cache_options": [{"mode": "implicit"}]},
}  # fmt: skip


# Everything that the server reads of a request.
MEANING = (
    "model n prompts conversation max_new_tokens sampling stops stop_token_ids ignore_eos min_tokens "
    "skip_special_tokens echo stream include_usage num_top num_prompt_top early_exit"
).split()


def read(is_chat: bool, **changes) -> ApiRequest:
    return read_request({**BODY[is_chat], "temperature": 0, **changes}, chat=is_chat, limits=LIMITS)


def meaning(request: ApiRequest) -> dict:
    return {key: getattr(request, key) or None for key in MEANING}


def fields_of_clients(is_chat: bool) -> set[str]:
    own = typing.get_type_hints(CLIENT[is_chat], include_extras=False)
    return {*own, "stream", *VLLM, *VLLM_OF[is_chat]}


@BOTH
def test_no_field_of_a_client_is_unknown(is_chat: bool) -> None:
    known = set(request_model(is_chat, LIMITS).model_fields)
    assert not fields_of_clients(is_chat) - known
    assert not read(is_chat, temperature=None).sampling.greedy
    for field in fields_of_clients(is_chat) - {"prompt", "messages", "temperature"}:
        assert meaning(read(is_chat, **{field: None})) == meaning(read(is_chat)), f"{field} = null is not given"


@BOTH
def test_what_changes_nothing_is_taken(is_chat: bool) -> None:
    for table in (VLLM, VLLM_OF[is_chat], OPENAI, OPENAI_OF[is_chat]):
        for field, values in table.items():
            for value in values:
                changes = {"temperature": 1, "seed": 3, field: value}
                got, plain = read(is_chat, **changes), read(is_chat, temperature=1, seed=3)
                if field in ("logprobs", "stream_options"):  # False = none; usage without a stream is nobody's
                    assert got.num_top is None and not got.stream
                else:
                    assert meaning(got) == meaning(plain), (field, value)


@BOTH
def test_what_is_not_done_is_refused_with_the_way_out(is_chat: bool) -> None:
    asking = {"best_of": 2, "store": True, "echo": 1, "priority": 1, "early_stopping": 1, "length_penalty": True}
    for field, (neutral, way_out) in {**NEUTRAL, **NEUTRAL_OF[is_chat]}.items():
        value = asking.get(field, {"a": 1} if neutral != ({},) else [1])  # no value that changes nothing
        with pytest.raises(ApiError) as caught:
            read(is_chat, **{field: value})
        assert caught.value.status == 400 and caught.value.param == field
        assert f"{field}={value!r} is not supported here; {way_out}" == caught.value.message


def test_every_field_of_a_message_is_known() -> None:
    params = {
        "system": chat.ChatCompletionSystemMessageParam, "developer": chat.ChatCompletionDeveloperMessageParam,
        "user": chat.ChatCompletionUserMessageParam, "assistant": chat.ChatCompletionAssistantMessageParam,
        "tool": chat.ChatCompletionToolMessageParam,
    }  # fmt: skip
    for role, kind in params.items():
        fields = set(typing.get_type_hints(kind))
        own = {"assistant": AssistantMessage, "tool": ToolMessage}.get(role, Message)
        assert not fields - set(own.model_fields)
        message = {"role": role, "content": "x", **dict.fromkeys(fields - {"role", "content"})}
        call = read_request({"messages": [message]}, chat=True, limits=LIMITS)
        assert call.conversation.messages == ({"role": "system" if role == "developer" else role, "content": "x"},)
    assert set(typing.get_type_hints(chat.ChatCompletionContentPartTextParam)) == set(TextPart.model_fields)


def test_what_is_acted_on_arrives() -> None:
    shape = {
        "min_p": 0.1,
        "presence_penalty": -2.0,
        "frequency_penalty": 1.5,
        "temperature": 0.5,
        "top_k": 5,
        "seed": 1,
    }
    ends = {"ignore_eos": True, "stop_token_ids": [4], "min_tokens": 2, "skip_special_tokens": False}
    call = read(False, **shape, **ends, logit_bias={"7": -100, "3": 1.5}, echo=True, max_tokens=0, logprobs=2)
    assert call.sampling == SamplingParams(greedy=False, **shape, logit_bias=((3, 1.5), (7, -100.0)))
    assert (call.ignore_eos, call.stop_token_ids, call.min_tokens, call.skip_special_tokens) == (True, (4,), 2, False)
    assert (call.echo, call.max_new_tokens, call.num_prompt_top) == (True, 0, 2)
    assert read(False).sampling == GREEDY and read(False).num_prompt_top is None
    assert read(False, top_k=-1, temperature=1, seed=0).sampling.top_k is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logit_bias": {"x": 1}}, "holds {'x': 1.0}; its keys must be token ids as texts"),
        ({"logit_bias": {"-1": 1}}, "holds {'-1': 1.0}; its keys must be token ids as texts"),
        ({"logit_bias": {"1": -101}}, "logit_bias.1=-101 must be a finite number from -100 to 100"),
        ({"logit_bias": {"1": True}}, "logit_bias.1=True must be a finite number from -100 to 100"),
        ({"logit_bias": {"1": 1, "01": 2}}, "names a token twice"),
        ({"logit_bias": [1]}, "logit_bias=[1] must be a block of finite numbers from -100 to 100 by key"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "has 1025 entries; 1024 are allowed"),
        ({"min_p": 1.1}, "min_p=1.1 must be a finite number from 0 to 1"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5 must be a finite number from -2 to 2"),
        ({"top_k": -2}, "top_k=-2 must be a whole number from -1"),
        ({"ignore_eos": 1}, "ignore_eos=1 must be True or False"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]='a' must be a whole number"),
        ({"min_tokens": 1, "stop": "x"}, "min_tokens=1 and stop are both given"),
        ({"max_tokens": 0}, "max_tokens=0 needs echo = true"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation=True must be False"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage=1 must be True or False"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(False, **changes)
    assert words in caught.value.message


@BOTH
def test_the_docs_say_what_becomes_of_each_field(is_chat: bool) -> None:
    text = (Path(__file__).parents[3] / "docs" / "server.md").read_text(encoding="utf-8")
    table = text[text.index("| fields | |") :].split("\n\n")[0]
    told = set(re.findall(r"`([a-z_]+)`", table))
    assert not (fields_of_clients(is_chat) | set(request_model(is_chat, LIMITS).model_fields)) - told


def test_the_docs_say_what_each_key_of_early_exit_does() -> None:
    text = (Path(__file__).parents[3] / "docs" / "server.md").read_text(encoding="utf-8")
    table = text[text.index("## The field `early_exit`") :]
    keys = re.findall(r"^\| `([a-z_]+)` \|", table[: table.index("\nCertificates (")], re.MULTILINE)
    assert set(keys) == set(EarlyExit.model_fields)
