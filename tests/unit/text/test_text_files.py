# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Which files hold a JSON value on each line."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_ee.text.text_files import is_jsonl


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", True),
        ("a.jsonl.gz", True),
        ("a.b.jsonl", True),
        ("notes.jsonl.txt", False),
        ("notes.jsonl.txt.gz", False),
        ("a.jsonl.gz.gz", False),
        ("a.txt", False),
        ("a.gz", False),
        (".gz", False),
        ("jsonl", False),
    ],
)
def test_the_ending_says_it(name: str, expected: bool) -> None:
    assert is_jsonl(Path("folder.jsonl", name)) is expected
