# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Generated text with the exit of every token, for people.

Two forms of the same text. With colours, each token stands on its exit's background, early exits green, late ones red,
the final exit none. Without, a line of marks under each line of text:

    def add(self, other):
    a---b--a----.b-----a-        a = first exit, b = second exit, . = final exit, - = the same token goes on

Model text is escaped before it is shown: it must not be able to drive the terminal or reorder a line.
"""

from __future__ import annotations

import os.path
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nemo_ee.generation.decoding_model import ExitPoint
from nemo_ee.generation.stats import FINAL, DecodingStats

_RESET = "\x1b[0m"
# Backgrounds of the 256-colour palette, from green to red; text on them is black.
_BACKGROUNDS = (114, 150, 186, 222, 216, 210, 204)
_MARKS = string.ascii_lowercase + string.ascii_uppercase
_FINAL_MARK, _GOES_ON, _UNKNOWN_MARK = ".", "-", "?"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TokenText:
    """The text one token adds, and the exit it came from (None = the final exit)."""

    text: str
    exit: str | None


class Detokenizer:
    """Text token by token. Characters whose bytes are spread over tokens appear with the token that completes them.

    Args:
        decode: token ids -> text.
        prompt: token ids in front, so that a first token's leading space is kept.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode, self._ids = decode, list(prompt)
        # Text is decoded from a few tokens before the new one, because a token's text depends on the one before it.
        self._start, self._done = max(0, len(self._ids) - 8), len(self._ids)

    def push(self, token: int, *, last: bool = False) -> str:
        """Append a token; returns the text that is now complete, with `last` everything that is left."""
        self._ids.append(token)
        text = self._pending()
        if text.endswith(_REPLACEMENT) and not last:
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text

    def flush(self) -> str:
        """The text that is left when no token follows: bytes that make no whole character."""
        text = self._pending()
        self._start, self._done = self._done, len(self._ids)
        return text

    def _pending(self) -> str:
        known = self._decode(self._ids[self._start : self._done]) if self._done > self._start else ""
        text = self._decode(self._ids[self._start :])
        # A prompt of token ids may end inside a character, which the next token then completes.
        return text[len(os.path.commonprefix([known, text])) :]


def escape(text: str) -> str:
    """Text that is safe to print: control and format characters (escape sequences, carriage returns, changes of the
    reading direction), line separators and lone surrogates become `\\x1b`-like escapes; newline and tab stay."""
    return "".join(_escape(char) if _is_unsafe(char) else char for char in text)


def _is_unsafe(char: str) -> bool:
    return char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class ExitLegend:
    """Colour and mark of each exit of a model, in depth order.

    Args:
        exits: the model's exits, sorted by stop.
    """

    def __init__(self, exits: Sequence[ExitPoint]) -> None:
        steps = max(len(exits) - 1, 1)
        self._colours = {
            point.name: _BACKGROUNDS[index * (len(_BACKGROUNDS) - 1) // steps] for index, point in enumerate(exits)
        }
        self._marks = {point.name: _MARKS[index : index + 1] or _UNKNOWN_MARK for index, point in enumerate(exits)}

    def mark(self, exit: str | None) -> str:
        """One character; more than 52 exits share `?`."""
        return _FINAL_MARK if exit is None else self._marks[exit]

    def paint(self, text: str, exit: str | None) -> str:
        """`text`, escaped, on the exit's background; no colour runs over the end of a line."""
        text = escape(text)
        if exit is None:
            return text
        start = f"\x1b[30;48;5;{self._colours[exit]}m"
        return "\n".join(f"{start}{line}{_RESET}" if line else "" for line in text.split("\n"))


def coloured_text(prompt: str, tokens: Iterable[TokenText], legend: ExitLegend) -> str:
    """Prompt and tokens with ANSI colours; for a terminal."""
    return f"\x1b[2m{escape(prompt)}{_RESET}" + "".join(legend.paint(token.text, token.exit) for token in tokens)


def marked_text(prompt: str, tokens: Iterable[TokenText], legend: ExitLegend, *, width: int = 100) -> str:
    """Prompt and tokens without colours: under each line a line with each token's mark below its first character.

    A newline's mark stands behind the line's last character. Nothing stands under the prompt. Lines are broken at
    `width` columns, so that no terminal breaks them and puts text and marks out of step.
    """
    lines, marks = [""], [""]

    def add(char: str, mark: str) -> None:
        if char == "\n":
            marks[-1] += mark
            lines.append("")
            marks.append("")
            return
        shown = " " * (4 - len(marks[-1]) % 4) if char == "\t" else _escape(char) if _is_unsafe(char) else char
        columns = _width(shown)
        if len(marks[-1]) + columns > width:
            lines.append("")
            marks.append("")
        lines[-1] += shown
        if columns:
            marks[-1] += mark + (" " if mark == " " else _GOES_ON) * (columns - 1)

    for char in prompt:
        add(char, " ")
    for token in tokens:
        mark = legend.mark(token.exit)
        for char in token.text:
            add(char, mark)
            mark = _GOES_ON
    shown = []
    for line, under in zip(lines, marks, strict=True):
        shown.append(line)
        if under.strip():
            shown.append(under.rstrip())
    return "\n".join(shown)


def _width(text: str) -> int:
    """Columns on a terminal."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def exit_table(
    stats: DecodingStats,
    exits: Sequence[ExitPoint],
    *,
    seconds: float | None = None,
    legend: ExitLegend | None = None,
) -> str:
    """Table of the number of tokens from each exit, their mean depth and the speed.

    Args:
        stats: statistics of the call.
        exits: the model's exits, sorted by stop.
        seconds: duration of the call, for tokens/s.
        legend: paints the marks; None leaves them plain.
    """
    plain = ExitLegend(exits)
    rows = [(point.name, plain.mark(point.name), point.layer, point.name) for point in exits]
    rows.append((FINAL, plain.mark(None), stats.num_layers, None))
    width = max(len("exit"), *(len(row[0]) for row in rows))
    lines = [f"{'':4}{'exit':<{width}}  {'layer':>7}  {'tokens':>7}  {'share':>7}"]
    for name, mark, layer, exit in rows:
        count = stats.tokens_per_exit[name]
        share = f"{100 * count / stats.num_tokens:.1f} %" if stats.num_tokens else "-"
        shown = mark if legend is None else legend.paint(f" {mark} ", exit)
        pad = " " * (4 - (1 if legend is None else 3))
        depth = f"{layer}/{stats.num_layers}"
        lines.append(f"{shown}{pad}{name:<{width}}  {depth:>7}  {count:>7}  {share:>7}")
    total = f"{stats.num_tokens} tokens, mean depth {stats.mean_depth:.2f} of {stats.num_layers} layers"
    if seconds:
        total += f", {stats.num_tokens / seconds:.1f} tokens/s"
    lines.append(total)
    if stats.num_verifications:
        lines.append(
            f"{stats.drafted} tokens drafted, {100 * stats.acceptance_rate:.1f} % accepted, "
            f"{stats.mean_accepted_length:.2f} per verification; {stats.computed_depth:.2f} layers run per token"
        )
    return "\n".join(lines)
