# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Text of one answer, token by token: whole characters only, and no text that may be the beginning of a stop string.

A stop string is never part of the answer. Text is held back while it could be the beginning of one, in whole tokens,
so that every token keeps its text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from nemo_ee.generation.stats import TokenEvent
from nemo_ee.text.token_view import Detokenizer

# A character has at most four bytes. After this many tokens without a character their bytes are shown as they are.
_LONGEST_WAIT = 8


class Piece(NamedTuple):
    """A token and the text it adds; empty for one that completes no character, ends the answer, or follows a stop."""

    event: TokenEvent
    text: str


class TextStream:
    """Turns the events of one sequence into text.

    Args:
        decode: token ids -> text, special tokens left out.
        prompt: token ids in front, which decide whether a first token's leading space is kept.
        stops: strings that end the answer, none empty.
        stop_tokens: ids that end it; their text is left out.

    Attributes:
        finish_reason: `stop` or `length` once the answer has ended, else None.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        stop_tokens: Collection[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(decode, prompt)
        self._stops, self._stop_tokens = tuple(stops), frozenset(stop_tokens)
        self._held: list[Piece] = []
        self._silent = 0  # tokens in a row that completed no character
        self.finish_reason: str | None = None

    def push(self, event: TokenEvent) -> list[Piece]:
        """Add the next token. Returns the pieces that can be sent now; at the end of the answer all remaining ones."""
        assert self.finish_reason is None, "the answer has ended"
        ends = event.finish_reason is not None
        if event.token in self._stop_tokens:  # it has no text; bytes of earlier tokens may be left
            text = self._detokenizer.flush()
        else:
            text = self._detokenizer.push(event.token, last=ends or self._silent >= _LONGEST_WAIT)
        self._silent = 0 if text else self._silent + 1
        self._held.append(Piece(event, text))
        buffer = "".join(piece.text for piece in self._held)
        starts = [start for stop in self._stops if (start := buffer.find(stop)) >= 0]
        if starts:
            self.finish_reason = "stop"
            return self._release(min(starts), everything=True)
        if ends:
            self.finish_reason = event.finish_reason
            return self._release(len(buffer), everything=True)
        return self._release(len(buffer) - self._overlap(buffer))

    def _overlap(self, buffer: str) -> int:
        """Number of characters at the end that may begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        lengths = range(min(longest, len(buffer)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(buffer[-n:]) for stop in self._stops)), 0)

    def _release(self, stop: int, *, everything: bool = False) -> list[Piece]:
        """The pieces whose text ends within the first `stop` characters; with `everything` all, cut there."""
        released, start = [], 0
        while self._held:
            event, text = self._held[0]
            if not everything and start + len(text) > stop:
                break
            released.append(Piece(event, text[: max(0, stop - start)]))
            start += len(text)
            del self._held[0]
        return released
