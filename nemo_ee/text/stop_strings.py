# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Texts that end an answer, found in the text of its newest tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# The first characters of a piece of text may depend on tokens in front of it: a decoder in SentencePiece's way drops a
# leading space, and bytes of one character may be spread over tokens.
_CONTEXT = 8


class EndStrings:
    """Whether new tokens hold an end string; called after each of them as a `Request.ends`.

    Args:
        decode: token ids -> text.
        strings: not empty, none of them empty.
        prompt: the ids in front of the new tokens; strings in their text do not count.
    """

    def __init__(self, decode: Callable[[list[int]], str], strings: Sequence[str], prompt: Sequence[int] = ()) -> None:
        self._decode, self._strings = decode, tuple(strings)
        # No token is shorter than a byte, so a string that the newest token completes began no earlier than this.
        self._num_tokens = max(len(own.encode()) for own in strings) + _CONTEXT
        self._prompt = list(prompt[-_CONTEXT:])
        self._prompt_length = len(decode(self._prompt)) if self._prompt else 0

    def __call__(self, tokens: Sequence[int]) -> bool:
        if len(tokens) <= self._num_tokens:
            text = self._decode([*self._prompt, *tokens])[self._prompt_length :]
        else:
            text = self._decode(list(tokens[-self._num_tokens :]))
        return any(own in text for own in self._strings)
