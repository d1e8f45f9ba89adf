# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Alternatives beside a token: none is lost when texts are equal, and each is the text it would have added."""

from __future__ import annotations

from nemo_ee.generation.decoding_model import ExitPoint
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request
from nemo_ee.generation.stats import PromptScores, TokenEvent
from nemo_ee.serving.answers import Answers
from nemo_ee.serving.exit_choice import ExitChoice
from nemo_ee.serving.protocol import Limits, read_request
from nemo_ee.serving.served_model import Prepared
from nemo_ee.serving.text_stream import Piece

WORDS = ["", "", "one", "two", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"]


def decode(ids: list[int]) -> str:
    """As SentencePiece, a space before every word but the first; 0 and 1 are special, 4 and 5 half characters."""
    return " ".join(WORDS[one] for one in ids if WORDS[one])


def answers(stream: bool, chat: bool, prompt: tuple[int, ...] = (2,), **changes) -> Answers:
    body = {"stream": stream, **({"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 5}
                                 if chat else {"prompt": list(prompt), "logprobs": 5}), **changes}  # fmt: skip
    call = read_request(body, chat=chat, limits=Limits(8, 8))
    choice, texts = ExitChoice("full", ExitPolicy(0.9)), (decode(list(prompt)) if call.echo else "",)
    prepared = Prepared((Request(prompt, 4),), choice, len(prompt), texts)
    return Answers(call, "m", prepared, [ExitPoint("a", 4, 8)], 8, decode)


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


SCORES = PromptScores(0, (-0.5, -2.0), (((3, -0.25), (2, -0.5)), ((2, -2.0), (0, -3.0))))


def test_an_echo_comes_once_and_first() -> None:
    """Prompt one, three (a word with its space), special: the same lists whole, and chunk by chunk together."""
    own = answers(stream=False, chat=False, prompt=(2, 3, 1), echo=True)
    own.add(0, [piece(3)], None, SCORES)
    own.add(0, [piece(4)], "length")
    (choice,) = own.whole()["choices"]
    assert choice["text"] == "one two one one"
    assert choice["logprobs"]["tokens"] == ["one", " two", "", " one", " one"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -2.0, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 3, 7, 7, 11]
    assert choice["logprobs"]["top_logprobs"][:3] == [None, {" two": -0.25, " one": -0.5}, {" one": -2.0, "": -3.0}]
    assert [one["id"] for one in choice["early_exit"]["tokens"]] == [2, 2], "tokens of the answer alone"
    streamed, lists = answers(stream=True, chat=False, prompt=(2, 3, 1), echo=True), []
    for new, scores in (([piece(3)], SCORES), ([piece(4)], None)):
        streamed.add(0, new, None, scores)
        lists.append(streamed.chunk(0, new)["choices"][0])
    assert [one["text"] for one in lists] == ["one two one", " one"]
    for key, value in choice["logprobs"].items():
        assert lists[0]["logprobs"][key] + lists[1]["logprobs"][key] == value


def test_an_echo_of_a_text_is_that_text() -> None:
    """Where special tokens or a normaliser change it, offsets stay inside of it, and new tokens stand behind it."""
    own = answers(stream=False, chat=False, prompt=(2, 3, 1), echo=True)
    own._unsent = ["one"]
    own.add(0, [piece(3)], "length", SCORES)
    (choice,) = own.whole()["choices"]
    assert choice["text"] == "one one" and choice["logprobs"]["text_offset"] == [0, 3, 3, 3]
