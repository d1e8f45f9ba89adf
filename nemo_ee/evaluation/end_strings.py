# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Texts that end an answer, found in the text of its newest tokens.

May import: the standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What the first characters of a piece of text look like may depend on tokens in front of it.
_MARGIN = 8


class EndStrings:
    """Whether new tokens hold an end string, asked after each of them; a `Request.ends`.

    Args:
        decode: token ids -> text.
        strings: not empty, none of them empty.
    """

    def __init__(self, decode: Callable[[list[int]], str], strings: Sequence[str]) -> None:
        self._decode, self._strings = decode, tuple(strings)
        # No token is shorter than a byte, so a string that the newest token completes began no earlier than this.
        self._num_tokens = max(len(own.encode()) for own in strings) + _MARGIN

    def __call__(self, tokens: Sequence[int]) -> bool:
        text = self._decode(list(tokens[-self._num_tokens :]))
        return any(own in text for own in self._strings)
