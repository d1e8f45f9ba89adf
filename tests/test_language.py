# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The words of the project: retired words with their replacements.

A retired word is looked for in prose and in names (`fault` also in `token_faults`), not inside other words (default).
In Markdown, code blocks, code spans and quotations are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {
    "docs": ["*.md", "docs/*.md", "assets/*/*.md", "benchmarks/**/*.md"],
    "yaml": ["conf/*.yaml"],
    "package": ["nemo_ee/**/*.py", "nemo_ee/**/*.html"],
    "scripts": ["examples/**/*.py", "scripts/**/*.py", "benchmarks/**/*.py"],
}
ENFORCED = tuple(GROUPS)

ALLOWED = ("nemo_ee/export/manifest.py:19: 'artefacts'",)  # the key in manifests of earlier versions

# Retired word (a regular expression) -> what to write instead.
RETIRED = {
    r"faults?|faulty": "problem, error",
    r"artefacts?": "export, artifact",
    r"ask(?:s|ed|ing)?": "evaluate (an exit), need, request",
    r"(?:un)?sure(?:r|st|ly|ness)?": "confidence passes the threshold; certain",
    r"courses?": "exit plan",
    r"(?<!gradient )descents?": "staged forward, forward pass",
    r"(?<!in[-_ ])flights?|flying": "forward pass, running",
    r"(?<!\.)(?:feeds?|fed|feeding)(?![-_]?forward)": "input, run",  # `.feed` is a method of html.parser
    r"waiting[ _]tokens?|tokens? that waits?": "pending tokens",
    r"checks? of (?:the )?drafts?|drafts? (?:are |is )?checked|checks? drafts?": "verification, verify",
    r"heard|hears?": "get, receive",
    r"ow(?:e|es|ed)": "need, must",
    r"likewise": "also, in the same way",
    r"affairs?": "setting",
    r"held[ _]tokens?": "min-length mask",
    r"known[ _]text[ _]pass": "teacher-forced pass",
}
# A word ends at anything that is no letter, so "default" and "measure" are other words and `token_faults` has one.
PATTERNS = {re.compile(rf"(?<![a-z])(?:{word})(?![a-z])", re.IGNORECASE): better for word, better in RETIRED.items()}


def prose(markdown: str) -> str:
    """The text without code blocks, code spans and quotations; line numbers stay."""

    def blank(match: re.Match) -> str:
        return "\n" * match[0].count("\n")

    text = re.sub(r"^[ ]*```.*?^[ ]*```", blank, markdown, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`]*`", blank, text)
    text = re.sub(r'"[^"\n]*"', blank, text)
    return re.sub(r"^> .*$", "", text, flags=re.MULTILINE)


def retired_words(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, better in PATTERNS.items():
            for match in pattern.finditer(line):
                yield f"{number}: {match[0]!r}; write: {better}"


def files(group: str) -> list[Path]:
    return sorted({path for pattern in GROUPS[group] for path in ROOT.glob(pattern)})


def problems_of(group: str) -> list[str]:
    found = []
    for path in files(group):
        text = path.read_text(encoding="utf-8")
        words = retired_words(prose(text) if path.suffix == ".md" else text)
        found += [f"{path.relative_to(ROOT).as_posix()}:{word}" for word in words]
    found = [one for one in found if not one.startswith(ALLOWED)]
    return found


@pytest.mark.parametrize("group", ENFORCED)
def test_no_retired_word(group: str) -> None:
    assert files(group)
    found = problems_of(group)
    assert not found, f"{len(found)} retired words:\n" + "\n".join(found)


def test_control_every_retired_word_is_found() -> None:
    text = """one fault, two token_faults
    an artefact
    exits are asked
    when it is sure enough
    its course
    the descent of a token
    a flight of rows
    feed it
    waiting tokens
    drafts checked
    it hears of it
    it owes a row
    likewise
    the run's affair
    held tokens
    KNOWN_TEXT_PASS"""
    lines = [int(found.split(":")[0]) for found in retired_words(text)]
    assert sorted(set(lines)) == list(range(1, len(RETIRED) + 1)) and len(lines) == len(RETIRED) + 1


def test_control_other_words_are_not_found() -> None:
    text = "default, measured, tasks, basket, ensure, gradient descent, in-flight batching, max_in_flight, feedforward"
    assert (
        list(
            retired_words(text + ", feed-forward, feed_forward_length, federated, recourse, owner, showed, scheduled")
        )
        == []
    )
    quoted = 'the log has "asks no exit" or `asks no exit`\n> "fault", as it was\n```\nfault\n```\n`two\nfaults`\n'
    assert list(retired_words(prose(quoted))) == []
    assert [found.split(":")[0] for found in retired_words(prose(quoted + "a fault\n"))] == ["8"]
