# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""End strings against a search in the whole text."""

from __future__ import annotations

import random

import pytest

from nemo_ee.evaluation.end_strings import EndStrings


@pytest.mark.parametrize("seed", range(20))
def test_found_after_the_token_that_completes_one_and_not_before(seed):
    """One token per byte, and strings of characters of one to three bytes."""
    rng = random.Random(seed)
    strings = ["".join(rng.choice("aé€") for _ in range(rng.randint(1, 4))) for _ in range(2)]
    tokens = list("".join(rng.choice("aé€") for _ in range(60)).encode())
    ends = EndStrings(lambda ids: bytes(ids).decode(errors="replace"), strings)
    first = next((n for n in range(1, 61) if ends(tokens[:n])), None)
    whole = bytes(tokens[:60]).decode(errors="replace")
    found = [whole.index(own) + len(own) for own in strings if own in whole]
    expected = len(whole[: min(found)].encode()) if found else None
    assert first == expected


def test_a_string_far_back_is_not_looked_for_again():
    """Each token is asked about once, so only what the newest one completes counts."""
    seen = []
    ends = EndStrings(lambda ids: seen.append(len(ids)) or "", ["ab"])
    assert not ends(list(range(1000))) and seen == [10]
