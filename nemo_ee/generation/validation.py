# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Validation of a call before anything runs: tokens, lengths, and each request once (`plan_request`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

from nemo_ee.generation.decoding_model import DecodingModel
from nemo_ee.generation.policy import ExitPlan, ExitPolicy, plan_exits
from nemo_ee.generation.request import Request


def plan_request(
    model: DecodingModel,
    what: str,
    request: Request,
    mode: str,
    policy: ExitPolicy | None,
    problems: list[str],
    max_length: int | None = None,
) -> ExitPlan:
    """Validate a request and plan its exits.

    Args:
        model: the model.
        what: name of the request in messages, e.g. "prompt 3".
        mode, policy: the session's, for a request without its own.
        problems: every problem is appended.
        max_length: tokens that a sequence may have; None = the model's positions.
    """
    problems += request_problems(model, what, request, max_length)
    own_policy = policy if request.policy is None else request.policy
    return plan_or_problem(model, mode if request.mode is None else request.mode, own_policy, problems)


def plan_or_problem(model: DecodingModel, mode: str, policy: ExitPolicy | None, problems: list[str]) -> ExitPlan:
    """The plan of a mode and a policy; where they do not fit the model, the problem is appended."""
    try:
        return plan_exits(mode, policy, model.exits, model.num_layers)
    except ValueError as error:
        problems.append(str(error))
        return ExitPlan()


def request_problems(
    model: DecodingModel, what: str, request: Request, max_length: int | None = None
) -> Iterator[str]:
    """Problems of a request that do not depend on the mode; the arguments are those of `plan_request`."""
    yield from token_problems(model.vocab_size, what, request.prompt)
    yield from (
        f"stop token {token!r} is not in the vocabulary 0..{model.vocab_size - 1}; remove it"
        for token in request.stop_tokens
        if not _in_vocabulary(model.vocab_size, token)
    )
    yield from (
        f"{what}: logit_bias names token {token}, which is not in the vocabulary 0..{model.vocab_size - 1}; remove it"
        for token, _ in request.sampling.logit_bias
        if not _in_vocabulary(model.vocab_size, token)
    )
    new, least = request.max_new_tokens, request.min_new_tokens
    lowest = 1 if request.prompt_logprobs is None else 0
    if not is_whole(new) or new < lowest:
        yield f"{what}: max_new_tokens = {new!r} must be a whole number from {lowest}"
        return
    if not is_whole(least) or not 0 <= least <= new:
        yield f"{what}: min_new_tokens = {least!r} must be a whole number from 0 to max_new_tokens = {new}"
    if least and len(request.stop_tokens) >= model.vocab_size:
        yield f"{what}: every token is a stop token, so min_new_tokens = {least} cannot be; leave some out"
    if not is_whole(request.num_top) or request.num_top < 0:
        yield f"{what}: num_top = {request.num_top!r} must be a whole number from 0"
    own = request.prompt_logprobs
    if own is not None and (not is_whole(own) or own < 0):
        yield f"{what}: prompt_logprobs = {own!r} must be a whole number from 0, or None"
    limit = model.max_positions
    rule, way_out = f"the model's {limit} positions", ""
    if max_length is not None and max_length < limit:
        limit, rule = max_length, f"this session's {max_length} positions"
        way_out = ", or start the session with a larger max_length"
    if len(request.prompt) + new > limit:
        yield f"{what}: {too_long(len(request.prompt), new, 'max_new_tokens', limit, rule)}{way_out}"


def too_long(num_prompt: int, new: int, key: str, limit: int, rule: str) -> str:
    """The message where prompt and new tokens are more than `limit`; `rule`: its words, `key`: name of `new`."""
    room = limit - num_prompt
    if room > 0:
        way_out = f"shorten the prompt or request at most {room} new tokens"
    else:
        way_out = f"shorten the prompt by at least {min(new, 1) - room} tokens"
        way_out += ", which leaves room for one new token" if new else ""
    return f"{num_prompt} prompt tokens + {key} = {new} are more than {rule}; {way_out}"


def token_problems(vocab_size: int, what: str, tokens: Sequence[int]) -> Iterator[str]:
    """Problems of a token sequence: no tokens, or tokens outside a vocabulary of this true size."""
    if len(tokens) == 0:
        yield f"{what} is empty; give at least one token, e.g. the begin-of-text token"
    outside = [token for token in tokens if not _in_vocabulary(vocab_size, token)]
    if outside:
        more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
        yield (
            f"{what}: token {', '.join(map(repr, outside[:3]))}{more} outside the vocabulary "
            f"0..{vocab_size - 1}; use the tokenizer the model was trained with"
        )


def _in_vocabulary(vocab_size: int, token: object) -> bool:
    return is_whole(token) and 0 <= token < vocab_size


def is_whole(value: object) -> bool:
    """Whether `value` is an integer of any type, but not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def per_sequence(key: str, value: Any, count: int, kind: type, problems: list[str]) -> list[Any]:
    """A list with one value for each sequence: `value` repeated where it is a `kind`, else its `count` elements."""
    if isinstance(value, kind):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        problems.append(
            f"{key} = {value!r} must be one {kind.__name__}, or a list with one for each of {count} sequences"
        )
        return []
    return list(value)


def raise_all(problems: Sequence[str]) -> None:
    """Raise one `ValueError` with every problem; do nothing without any."""
    problems = list(dict.fromkeys(problems))  # a stop token shared by all prompts is one problem
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(
            "\n".join([f"the call has {len(problems)} problems:", *(f"  - {problem}" for problem in problems)])
        )
