# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Fields of OpenAI's and vLLM's requests that this server does not act on.

`NO_EFFECT` are taken whatever they say: they change no answer. The values in `NEUTRAL` ask for nothing and are taken;
any other value asks for something that is not done, and is refused with the way out.
"""

from __future__ import annotations

from typing import Any

from nemo_ee.serving.errors import shown
from nemo_ee.serving.request_fields import Fields

NO_EFFECT = frozenset(
    "user metadata safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention request_id "
    "cache_salt include_reasoning".split()
)
_FORMAT = "say in the prompt what the answer is to look like"
_LEAVE_OUT = "leave it out"
# field -> (values that ask for nothing, way out); null always asks for nothing.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    # OpenAI's
    "audio": ((), _LEAVE_OUT),
    "best_of": ((1,), "ask for several answers with n"),
    "function_call": (("none", "auto"), "give tools"),
    "functions": (([],), "give tools"),
    "modalities": ((["text"],), "only text is written"),
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
    "bad_words": (([],), "ban tokens with logit_bias"),
    "chat_template": ((), "start the server with chat_template=<file>"),
    "documents": (([],), "write them into a message"),
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
    "logits_processors": (([],), "use logit_bias"),
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
# Fields whose neutral values, or meaning, an endpoint has for itself.
NEUTRAL_OF: dict[bool, dict[str, tuple[tuple[Any, ...], str]]] = {
    False: {"add_special_tokens": ((True,), "give token ids")},
    True: {
        "add_special_tokens": ((False,), "the chat template writes them"),
        "echo": ((False,), "use /v1/completions"),
    },
}


def check_other(fields: Fields, chat: bool, field: str) -> bool:
    """Note a fault where a field of this file asks for what is not done. Returns whether the field is one of these."""
    if field in NO_EFFECT:
        return True
    entry = NEUTRAL_OF[chat].get(field) or NEUTRAL.get(field)
    if entry is None:
        return False
    value = fields.body[field]
    if value is not None and not any(_is_same(value, neutral) for neutral in entry[0]):
        fields.fault(field, f"{field} = {shown(value)} is not supported here; {entry[1]}")
    return True


def _is_same(value: object, neutral: object) -> bool:
    """Equal, where a switch and a number are different things (True == 1 in Python)."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
