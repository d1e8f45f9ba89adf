# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""End strings against a search in the whole text."""

from __future__ import annotations

import random

import pytest

from nemo_ee.text.stop_strings import EndStrings


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


WORDS = ["▁", "▁the", "▁a", "the", "a", "▁▁"]


@pytest.fixture(scope="module")
def llama():
    """ids -> text as Llama's tokenizer does it: pieces with their spaces, single bytes, one leading space dropped."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = WORDS + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    own = tokenizers.decoders
    tokenizer.decoder = own.Sequence(
        [own.Replace("▁", " "), own.ByteFallback(), own.Fuse(), own.Strip(content=" ", left=1, right=0)]
    )
    return tokenizer.decode


@pytest.mark.parametrize("seed", range(20))
def test_leading_spaces_and_the_prompt_with_a_decoder_like_llamas(llama, seed):
    """Against a search in the whole text behind the prompt's, after every token."""
    rng = random.Random(seed)
    strings = rng.sample([" the", " a", "aa", " a the", "é", "  ", "the a"], 2)
    choices = [*range(len(WORDS)), *(len(WORDS) + byte for byte in "é a".encode())]
    prompt = [rng.choice(range(len(WORDS))) for _ in range(rng.choice([1, 3, 12]))]
    tokens = [rng.choice(choices) for _ in range(40)]
    ends = EndStrings(llama, strings, prompt)
    whole = [llama([*prompt, *tokens[:n]])[len(llama(prompt)) :] for n in range(1, 41)]
    expected = next((n for n, text in enumerate(whole) if any(own in text for own in strings)), None)
    assert next((n for n in range(40) if ends(tokens[: n + 1])), None) == expected


def test_a_first_tokens_leading_space_counts_and_the_prompts_own_text_does_not(llama):
    the = WORDS.index("▁the")
    assert EndStrings(llama, [" the"], [WORDS.index("▁a")])([the])
    assert not EndStrings(llama, [" the"])([the]), "the control: alone the space is lost"
    assert not EndStrings(llama, [" the", "ea"], [the])([WORDS.index("a")]), "what begins in the prompt is not new"
