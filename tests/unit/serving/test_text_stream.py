# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Text token by token against the text of all tokens at once, with a vocabulary of bytes and one of whole words."""

from __future__ import annotations

import random

import pytest

from nemo_ee.generation.stats import TokenEvent
from nemo_ee.serving.text_stream import TextStream

TEXT = "déjà vu: \N{SNOWMAN} \U0001f600\U0001f469\u200d\U0001f4bb = 日本語\n\n  end"
END = 0  # a token without text


def of_bytes(ids: list[int]) -> str:
    return bytes(one for one in ids if one != END).decode("utf-8", "replace")


def stream(data: bytes, stops=(), prompt=(), end: bool = True) -> tuple[list[list[str]], TextStream, int]:
    """Push bytes as tokens. Returns the texts released by each push, the stream, and how many pushes it took."""
    own = TextStream(of_bytes, prompt, stops, [END])
    released, tokens = [], [*data, *([END] if end else [])]
    for index, token in enumerate(tokens):
        reason = None if index + 1 < len(tokens) else "stop" if end else "length"
        pieces = own.push(TokenEvent(0, index, token, None, 1, 0.5, -1.0, reason))
        assert all(isinstance(piece.event, TokenEvent) for piece in pieces)
        released.append([piece.text for piece in pieces])
        if own.finish_reason:
            return released, own, index + 1
    return released, own, len(tokens)


def joined(released: list[list[str]]) -> str:
    return "".join(text for own in released for text in own)


def test_characters_are_never_split() -> None:
    data = TEXT.encode()
    released, own, pushes = stream(data)
    assert joined(released) == TEXT and own.finish_reason == "stop" and pushes == len(data) + 1
    assert all("\N{REPLACEMENT CHARACTER}" not in text for own in released for text in own)
    assert sum(map(len, released)) == pushes, "each token is told once"
    for index, texts in enumerate(released):
        assert len(texts) == 1, f"without stop strings nothing is held back ({index})"


def test_an_answer_cut_inside_a_character_says_so_at_its_end() -> None:
    released, own, _ = stream("ab☃".encode()[:-1], end=False)
    assert joined(released) == "ab\N{REPLACEMENT CHARACTER}" and own.finish_reason == "length"


def test_bytes_that_are_no_text_do_not_wait_for_ever() -> None:
    released, _, _ = stream(b"a" + b"\xff" * 40 + b"b" * 3)
    assert joined(released).startswith("a\N{REPLACEMENT CHARACTER}") and joined(released).endswith("bbb")
    silent = [not "".join(texts) for texts in released]
    assert max(len(run) for run in "".join("x" if one else " " for one in silent).split()) <= 9


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_wherever_they_fall(seed: int) -> None:
    """Against cutting the whole text: random text over few letters, random stops, so that beginnings abound."""
    chosen = random.Random(seed)
    text = "".join(chosen.choices("ab☃", k=60))
    stops = ["".join(chosen.choices("ab☃", k=chosen.randint(2, 6))) for _ in range(chosen.randint(1, 3))]
    released, own, pushes = stream(text.encode(), stops)
    # The first stop that is complete ends the answer, at its beginning.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not ends:
        assert joined(released) == text and own.finish_reason == "stop"
        return
    first = min(end for end, _ in ends)
    assert joined(released) == text[: min(start for end, start in ends if end == first)]
    assert own.finish_reason == "stop" and pushes == len(text[:first].encode())
    assert sum(map(len, released)) == pushes, "tokens of the stop string are told too, without text"


def test_text_is_held_back_only_while_it_may_begin_a_stop() -> None:
    released, _, _ = stream(b"a\n\nb\nc", ["\n\n\n"])
    assert ["".join(texts) for texts in released] == ["a", "", "", "\n\nb", "", "\nc", ""]


def test_control_without_holding_back_the_stop_would_show() -> None:
    released, _, _ = stream(b"abc")
    assert ["".join(texts) for texts in released] == ["a", "b", "c", ""]


def test_a_first_token_s_space_depends_on_the_prompt() -> None:
    """Words as SentencePiece writes them: the space in front is dropped at the start of a text only."""

    def words(ids: list[int]) -> str:
        return " ".join(["zero", "one", "two"][one] for one in ids)

    own = TextStream(words, [0])
    assert [own.push(TokenEvent(0, 1, 1, None, 1, 0.5, -1.0))[0].text, own.push(
        TokenEvent(0, 2, 2, None, 1, 0.5, -1.0, "length"))[0].text] == [" one", " two"]  # fmt: skip


def test_a_stop_token_has_no_text_but_what_was_owed_before_it_has() -> None:
    """The stop token is one with text of its own; half a character before it is told all the same."""
    for data, text in ((b"ab", "ab"), ("ab\N{SNOWMAN}".encode()[:-1], "ab\N{REPLACEMENT CHARACTER}")):
        own = TextStream(of_bytes, (), (), [ord("!")])
        tokens = [*data, ord("!")]
        got = [own.push(TokenEvent(0, i, token, None, 1, 0.5, -1.0, "stop" if i == len(data) else None))
               for i, token in enumerate(tokens)]  # fmt: skip
        assert "".join(piece.text for pieces in got for piece in pieces) == text and own.finish_reason == "stop"
        assert sum(map(len, got)) == len(tokens)
    control = TextStream(of_bytes, (), (), [ord("?")])
    assert control.push(TokenEvent(0, 0, ord("!"), None, 1, 0.5, -1.0, "length"))[0].text == "!"


def test_a_prompt_that_ends_inside_a_character() -> None:
    *front, last = "a\N{SNOWMAN}".encode()
    released, _, _ = stream(bytes([last]) + b"b", prompt=front)
    assert joined(released) == "\N{SNOWMAN}b"
    released, _, _ = stream(b"b", prompt="a\N{REPLACEMENT CHARACTER}".encode())
    assert joined(released) == "b", "a character that is there already is not told again"
