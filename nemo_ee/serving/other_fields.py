# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Fields of OpenAI's and vLLM's requests that this server does not act on.

The fields in `NO_EFFECT` are accepted with any value: they change no answer. The fields in `NEUTRAL` are accepted with
the values there, which change nothing; any other value is refused with the way out.
"""

from __future__ import annotations

from typing import Any

from nemo_ee.serving.request_fields import neutral, no_effect

NO_EFFECT = (
    "user metadata safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention request_id "
    "cache_salt include_reasoning".split()
)
_FORMAT = "describe the form of the answer in the prompt"
_LEAVE_OUT = "leave it out"
# field -> (values that change nothing, way out); null changes nothing either. Lists are tuples, as in `UserInput`.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    # OpenAI's
    "audio": ((), _LEAVE_OUT),
    "best_of": ((1,), "request several answers with n"),
    "function_call": (("none", "auto"), "give tools"),
    "functions": (((),), "give tools"),
    "modalities": ((("text",),), "only text is written"),
    "moderation": ((), _LEAVE_OUT),
    "prediction": ((), "leave it out; the answer is the same without it"),
    "reasoning_effort": (("none",), _LEAVE_OUT),
    "response_format": (({"type": "text"},), _FORMAT),
    "service_tier": (("auto", "default"), _LEAVE_OUT),
    "store": ((False,), "nothing is stored"),
    "suffix": (("",), "write prompt and suffix in the model's own fill-in-the-middle form"),
    "verbosity": (("medium",), _FORMAT),
    "web_search_options": ((), _LEAVE_OUT),
    # vLLM's
    "allowed_token_ids": ((), "ban the others with logit_bias"),
    "bad_words": (((),), "ban tokens with logit_bias"),
    "chat_template": ((), "start the server with chat_template=<file>"),
    "documents": (((),), "write them into a message"),
    "early_stopping": ((False,), _LEAVE_OUT),
    "guided_choice": ((), _FORMAT),
    "guided_decoding_backend": ((), _LEAVE_OUT),
    "guided_grammar": ((), _FORMAT),
    "guided_json": ((), _FORMAT),
    "guided_regex": ((), _FORMAT),
    "guided_whitespace_pattern": ((), _LEAVE_OUT),
    "include_stop_str_in_output": ((False,), "append the stop string yourself"),
    "kv_transfer_params": ((), _LEAVE_OUT),
    "length_penalty": ((1,), _LEAVE_OUT),
    "logits_processors": (((),), "use logit_bias"),
    "media_io_kwargs": (({},), _LEAVE_OUT),
    "mm_processor_kwargs": (({},), _LEAVE_OUT),
    "priority": ((0,), "requests are served in the order they come"),
    "prompt_embeds": ((), "give text or token ids"),
    "prompt_logprobs": ((), "use echo with logprobs in /v1/completions"),
    "return_token_ids": ((False,), "choices[i].early_exit.tokens has them"),
    "return_tokens_as_token_ids": ((False,), "choices[i].early_exit.tokens has the ids"),
    "spaces_between_special_tokens": ((True,), _LEAVE_OUT),
    "structural_tag": ((), _FORMAT),
    "structured_outputs": ((), _FORMAT),
    "truncate_prompt_tokens": ((), "shorten the prompt yourself"),
    "use_beam_search": ((False,), _LEAVE_OUT),
    "vllm_xargs": (({},), _LEAVE_OUT),
}
# Fields whose neutral values, or meaning, depend on the endpoint.
NEUTRAL_OF: dict[bool, dict[str, tuple[tuple[Any, ...], str]]] = {
    False: {"add_special_tokens": ((True,), "give token ids")},
    True: {
        "add_special_tokens": ((False,), "the chat template writes them"),
        "echo": ((False,), "use /v1/completions"),
    },
}


def other_fields(chat: bool) -> dict[str, tuple[Any, None]]:
    """The fields of this file that an endpoint has, as pydantic's `create_model` takes them."""
    refused = {field: neutral(*entry) for field, entry in {**NEUTRAL, **NEUTRAL_OF[chat]}.items()}
    return {field: (kind, None) for field, kind in {**refused, **dict.fromkeys(NO_EFFECT, no_effect())}.items()}
