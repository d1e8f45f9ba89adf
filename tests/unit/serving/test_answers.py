# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Alternatives beside a token: none is lost when texts are equal, and each is the text it would have added."""

from __future__ import annotations

from nemo_ee.generation.items import ExitPoint
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.stats import TokenEvent
from nemo_ee.serving.answers import Answers
from nemo_ee.serving.exit_choice import ExitChoice
from nemo_ee.serving.protocol import Limits, parse_call
from nemo_ee.serving.text_stream import Piece

WORDS = ["", "", "one", "two", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"]


def decode(ids: list[int]) -> str:
    """As SentencePiece, a space before every word but the first; 0 and 1 are special, 4 and 5 half characters."""
    return " ".join(WORDS[one] for one in ids if WORDS[one])


def answers(stream: bool, chat: bool) -> Answers:
    body = {"stream": stream, **({"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 5}
                                 if chat else {"prompt": [2], "logprobs": 5})}  # fmt: skip
    call = parse_call(body, chat=chat, limits=Limits(8, 8))
    return Answers(call, "m", ExitChoice("full", ExitPolicy(0.9)), 1, [2], [ExitPoint("a", 4, 8)], 8, decode)


def piece(position: int) -> Piece:
    top = ((2, -0.5), (0, -1.0), (1, -2.0), (4, -3.0), (5, -4.0))
    return Piece(TokenEvent(0, position, 2, None, 8, 0.5, -0.5, None, top), " one")


EXPECTED = {" one": -0.5, "": -1.0, "token_id:1": -2.0, " \N{REPLACEMENT CHARACTER}": -3.0, "token_id:5": -4.0}


def test_alternatives_of_a_completion() -> None:
    """Five tokens with three texts between them: five entries, the more likely one under its text."""
    own = answers(stream=False, chat=False)
    own.add(0, [piece(1), piece(2)], "length")
    assert own.whole()["choices"][0]["logprobs"]["top_logprobs"] == [EXPECTED, EXPECTED]
    streamed = answers(stream=True, chat=False)
    for position in (1, 2):
        streamed.add(0, [piece(position)], None)
        (choice,) = streamed.chunk(0, [piece(position)])["choices"]
        assert choice["logprobs"]["top_logprobs"] == [EXPECTED]
        assert choice["logprobs"]["tokens"][0] in EXPECTED


def test_alternatives_of_a_chat() -> None:
    own = answers(stream=False, chat=True)
    own.add(0, [piece(1)], "length")
    (told,) = own.whole()["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in told["top_logprobs"]] == list(EXPECTED.values())
    assert told["top_logprobs"][0]["token"] == told["token"] == " one"
