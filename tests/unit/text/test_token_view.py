# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Generated text as a person reads it: nothing is lost, nothing is invented, nothing drives the terminal."""

from __future__ import annotations

import re

import pytest

from nemo_ee.generation.decoding_model import ExitPoint
from nemo_ee.generation.stats import DecodingStats
from nemo_ee.text.token_view import (
    Detokenizer,
    ExitLegend,
    TokenText,
    coloured_text,
    escape,
    exit_table,
    marked_text,
)

EXITS = (ExitPoint("early", 2, 3), ExitPoint("late", 5, 10))
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def bytes_decode(ids: list[int]) -> str:
    """One byte per token, as the worst byte-level tokenizer does."""
    return bytes(ids).decode("utf-8", errors="replace")


def detokenize(text: bytes, prompt: bytes = b"") -> list[str]:
    detokenizer = Detokenizer(bytes_decode, list(prompt))
    return [detokenizer.push(byte, last=index + 1 == len(text)) for index, byte in enumerate(text)]


@pytest.mark.parametrize("prompt", ["", "p", "a long prompt with ümläut and 日本語"])
@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "🙂 done", "x\n\ty"])
def test_characters_spread_over_tokens_appear_once_and_whole(prompt, text):
    pieces = detokenize(text.encode(), prompt.encode())
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_a_character_comes_with_the_token_that_completes_it():
    assert detokenize("é!".encode()) == ["", "é", "!"]


def test_an_answer_that_ends_inside_a_character_shows_that_it_does():
    pieces = detokenize("ab日".encode()[:-1])
    assert pieces[:2] == ["a", "b"] and pieces[-1].endswith("\N{REPLACEMENT CHARACTER}")


def test_broken_bytes_in_the_middle_do_not_swallow_what_follows():
    assert "".join(detokenize(b"a\xffbcd")).endswith("bcd")


def test_the_first_token_keeps_its_leading_space():
    def decode(ids: list[int]) -> str:  # as SentencePiece: the first word of a text has no space in front
        return " ".join("word" for _ in ids)

    assert Detokenizer(decode, [1, 2]).push(3) == " word"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("x\x07\x08\r\x7f", "x\\x07\\x08\\x0d\\x7f"),
        ("\x9b2J", "\\x9b2J"),
        ("if \u202e(nimda)", "if \\u202e(nimda)"),
        ("\u2028\u2066", "\\u2028\\u2066"),
        ("\U000e0041", "\\U000e0041"),
        ("\ud800", "\\ud800"),
        ("tab\tline\n日本 é", "tab\tline\n日本 é"),
    ],
)
def test_what_could_drive_a_terminal_is_escaped(text, shown):
    assert escape(text) == shown


def test_no_form_lets_model_text_or_the_prompt_reach_the_terminal_unescaped():
    legend, hostile = ExitLegend(EXITS), "\x1b]0;title\x07\x1b[2J\r\u202e"
    tokens = [TokenText(hostile, "early"), TokenText(hostile, None)]
    for shown in (ANSI.sub("", coloured_text(hostile, tokens, legend)), marked_text(hostile, tokens, legend)):
        assert shown == escape(shown)
    with pytest.raises(AssertionError):
        assert hostile == escape(hostile)  # the control: the comparison sees such text


def test_colours_say_the_exit_and_stop_at_the_end_of_a_line():
    legend = ExitLegend(EXITS)
    tokens = [TokenText(" a", "early"), TokenText("\n b", "late"), TokenText("c", None)]
    shown = coloured_text("p", tokens, legend)
    assert ANSI.sub("", shown) == "p a\n bc"
    first, second = shown.split("\n")
    assert first.endswith("\x1b[0m") and second.endswith("\x1b[0mc"), "the final exit has no colour"
    colours = re.findall(r"48;5;(\d+)m", shown)
    assert len(set(colours)) == 2


def test_marks_stand_under_the_first_character_of_each_token():
    tokens = [
        TokenText("def", "early"),
        TokenText(" add", "late"),
        TokenText("(", None),
        TokenText(":\n", "early"),
        TokenText("    x", "early"),
        TokenText("\n", "late"),
    ]
    assert marked_text(">>> ", tokens, ExitLegend(EXITS)).split("\n") == [
        ">>> def add(:",
        "    a--b---.a-",
        "    x",
        "a----b",
        "",
    ]


def test_marks_keep_step_with_wide_characters_tabs_and_escapes():
    tokens = [
        TokenText("日本", "early"),
        TokenText("\t", "late"),
        TokenText("e\u0301", None),
        TokenText("\x1b", "early"),
    ]
    text, marks = marked_text("", tokens, ExitLegend(EXITS)).split("\n")
    assert text == "日本    e\u0301\\x1b"
    assert marks == "a---b---.a---"


def test_long_lines_are_broken_so_that_text_and_marks_stay_in_step():
    tokens = [TokenText("abcdefg", "early"), TokenText("hij", "late")]
    assert marked_text("12", tokens, ExitLegend(EXITS), width=5).split("\n") == [
        "12abc", "  a--", "defgh", "----b", "ij", "--"
    ]  # fmt: skip


def test_many_exits_have_marks_too():
    many = [ExitPoint(f"e{index}", 1, 1) for index in range(60)]
    legend = ExitLegend(many)
    marks = [legend.mark(point.name) for point in many]
    assert len(set(marks[:52])) == 52 and set(marks[52:]) == {"?"}
    assert "." not in marks and "-" not in marks
    legend.paint("x", "e59")


def stats(num_tokens: int = 8, **counts: int) -> DecodingStats:
    return DecodingStats(
        num_prompt_tokens=3,
        num_tokens=num_tokens,
        tokens_per_exit={"early": 0, "late": 0, "final": 0} | counts,
        mean_depth=4.5,
        num_layers=6,
        computed_layers=60.0,
        evaluations={},
    )


def test_the_table_counts_every_exit_in_depth_order():
    lines = exit_table(stats(early=5, late=1, final=2), EXITS, seconds=2.0).split("\n")
    assert [line.split() for line in lines[1:4]] == [
        ["a", "early", "2/6", "5", "62.5", "%"],
        ["b", "late", "5/6", "1", "12.5", "%"],
        [".", "final", "6/6", "2", "25.0", "%"],
    ]
    assert lines[4] == "8 tokens, mean depth 4.50 of 6 layers, 4.0 tokens/s"
    assert "\x1b" not in "".join(lines)


def test_the_table_without_tokens_or_exits():
    assert "-" in exit_table(stats(num_tokens=0), EXITS)
    assert exit_table(stats(final=8), ()).split("\n")[1].split() == [".", "final", "6/6", "8", "100.0", "%"]


def test_colours_do_not_move_the_tables_columns():
    plain = exit_table(stats(early=5, late=1, final=2), EXITS)
    coloured = exit_table(stats(early=5, late=1, final=2), EXITS, legend=ExitLegend(EXITS))
    assert coloured != plain
    assert [line[4:] for line in ANSI.sub("", coloured).split("\n")[:4]] == [
        line[4:] for line in plain.split("\n")[:4]
    ]
