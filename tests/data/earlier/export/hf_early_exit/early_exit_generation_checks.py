# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a call, found before anything runs: tokens, lengths, requests.

May import: the standard library and `nemo_ee.generation.{items,request}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

from .early_exit_generation_items import DecodingModel
from .early_exit_generation_request import Request


def request_faults(model: DecodingModel, what: str, request: Request) -> Iterator[str]:
    """Faults of a request that need no mode to be seen. `what`: how to call it in a message, e.g. "prompt 3"."""
    yield from token_faults(model, what, request.prompt)
    yield from (
        f"stop token {token!r} is not in the vocabulary 0..{model.vocab_size - 1}; remove it"
        for token in request.stop_tokens
        if not _in_vocabulary(model, token)
    )
    new, least, limit = request.max_new_tokens, request.min_new_tokens, model.max_positions
    if not is_whole(new) or new < 1:
        yield f"{what}: max_new_tokens = {new!r} must be a whole number from 1"
        return
    if not is_whole(least) or not 0 <= least <= new:
        yield f"{what}: min_new_tokens = {least!r} must be a whole number from 0 to max_new_tokens = {new}"
    if least and len(request.stop_tokens) >= model.vocab_size:
        yield f"{what}: every token is a stop token, so min_new_tokens = {least} cannot be; leave some out"
    if not is_whole(request.num_top) or request.num_top < 0:
        yield f"{what}: num_top = {request.num_top!r} must be a whole number from 0"
    if len(request.prompt) + new > limit:
        yield (
            f"{what}: {len(request.prompt)} prompt tokens + max_new_tokens = {new} are more than the "
            f"model's {limit} positions; shorten the prompt or ask for at most "
            f"{max(limit - len(request.prompt), 0)} new tokens"
        )


def token_faults(model: DecodingModel, what: str, tokens: Sequence[int]) -> Iterator[str]:
    """No tokens, or tokens the model does not have."""
    if len(tokens) == 0:
        yield f"{what} is empty; give at least one token, e.g. the begin-of-text token"
    outside = [token for token in tokens if not _in_vocabulary(model, token)]
    if outside:
        more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
        yield (
            f"{what}: token {', '.join(map(repr, outside[:3]))}{more} outside the vocabulary "
            f"0..{model.vocab_size - 1}; use the tokenizer the model was trained with"
        )


def _in_vocabulary(model: DecodingModel, token: object) -> bool:
    return is_whole(token) and 0 <= token < model.vocab_size


def is_whole(value: object) -> bool:
    """An integer of any kind that is not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def per_sequence(key: str, value: Any, count: int, kind: type, faults: list[str]) -> list[Any]:
    """`value` for every sequence: itself `count` times when it is a `kind`, else one each."""
    if isinstance(value, kind):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        faults.append(
            f"{key} = {value!r} must be one {kind.__name__}, or a list with one for each of {count} sequences"
        )
        return []
    return list(value)


def raise_all(faults: Sequence[str]) -> None:
    """One `ValueError` with every fault; nothing without any."""
    faults = list(dict.fromkeys(faults))  # a stop token shared by all prompts is one fault
    if len(faults) == 1:
        raise ValueError(faults[0])
    if faults:
        raise ValueError("\n".join([f"the call has {len(faults)} faults:", *(f"  - {fault}" for fault in faults)]))
