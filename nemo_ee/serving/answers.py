# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Answers in OpenAI's shapes, whole or chunk by chunk, each with the exit of every token beside its text."""

from __future__ import annotations

import json
import os.path
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from nemo_ee.generation.items import ExitPoint
from nemo_ee.generation.stats import FINAL
from nemo_ee.serving.certified import promise
from nemo_ee.serving.exit_choice import ExitChoice
from nemo_ee.serving.protocol import Call
from nemo_ee.serving.text_stream import Piece


class Answers:
    """All answers to one request.

    Args:
        call: the request.
        model: name to report.
        choice: how the tokens leave.
        num_prompt_tokens: of all its prompts.
        before: of each answer, the last token of its prompt.
        exits: the model's.
        num_layers: the model's.
        decode: token ids -> text, for alternatives.
    """

    def __init__(
        self,
        call: Call,
        model: str,
        choice: ExitChoice,
        num_prompt_tokens: int,
        before: Sequence[int],
        exits: Sequence[ExitPoint],
        num_layers: int,
        decode: Callable[[list[int]], str],
    ) -> None:
        self._call, self._choice_of_exits, self._num_layers, self._decode = call, choice, num_layers, decode
        self._exits = [point.name for point in exits]
        self._num_prompt_tokens, self._before = num_prompt_tokens, before
        self.pieces: list[list[Piece]] = [[] for _ in range(max(1, len(call.prompts)) * call.num_answers)]
        self.failed = False  # the server could not give them
        self.finish_reasons: list[str | None] = [None] * len(self.pieces)
        self._offsets = [0] * len(self.pieces)  # characters sent so far, by answer
        kind = "chat.completion" if call.chat else "text_completion"
        self._head = {
            "id": ("chatcmpl-" if call.chat else "cmpl-") + secrets.token_hex(12),
            "object": f"{kind}.chunk" if call.chat and call.stream else kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": "nemo_ee",
        }

    @property
    def ended(self) -> bool:
        """Whether every answer has ended."""
        return all(self.finish_reasons)

    def add(self, answer: int, pieces: Sequence[Piece], finish_reason: str | None) -> None:
        """Take in what is new of an answer."""
        self.pieces[answer] += pieces
        self.finish_reasons[answer] = finish_reason

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self._choice(index, own, stream=False) for index, own in enumerate(self.pieces)]
        return {**self._head, "choices": choices, "usage": self.usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The first chunks of a stream: in a chat, whose turn it is."""
        if not self._call.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
            for index in range(len(self.pieces))
        ]

    def chunk(self, answer: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A chunk with these new tokens of an answer."""
        return self._chunk(self._choice(answer, pieces, stream=True))

    def last_chunk(self) -> dict[str, Any]:
        """The chunk without a choice that brings the usage."""
        return {**self._head, "choices": [], "usage": self.usage()}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._call.include_usage else {}
        return {**self._head, "choices": [choice], **usage}

    def usage(self) -> dict[str, Any]:
        """Token counts, and where the tokens came from."""
        events = [piece.event for own in self.pieces for piece in own]
        counts = Counter(FINAL if event.exit is None else event.exit for event in events)
        certificate = self._choice_of_exits.certificate
        depth = sum(event.layer for event in events) / len(events) if events else 0.0
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": len(events),
            "total_tokens": self._num_prompt_tokens + len(events),
            "early_exit": {
                "mode": self._choice_of_exits.mode,
                "tokens_per_exit": {name: counts[name] for name in [*self._exits, FINAL]},
                "mean_depth": round(depth, 4),
                "num_layers": self._num_layers,
                **({} if certificate is None else {"certificate": promise(certificate)}),
            },
        }

    def _choice(self, answer: int, pieces: Sequence[Piece], *, stream: bool) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        choice: dict[str, Any] = {"index": answer}
        if self._call.chat:
            choice["delta" if stream else "message"] = (
                {"content": text} if stream else {"role": "assistant", "content": text, "refusal": None}
            )
        else:
            choice["text"] = text
        choice["logprobs"] = None if self._call.num_top is None else self._logprobs(answer, pieces)
        choice["finish_reason"] = self.finish_reasons[answer]
        choice["early_exit"] = {"tokens": [_token(piece) for piece in pieces]}
        return choice

    def _logprobs(self, answer: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        if self._call.chat:
            start = len(self.pieces[answer]) - len(pieces)
            content = [self._chat_logprob(piece, self._alternatives(answer, start + index))
                       for index, piece in enumerate(pieces)]  # fmt: skip
            return {"content": content, "refusal": None}
        offsets = []
        for piece in pieces:
            offsets.append(self._offsets[answer])
            self._offsets[answer] += len(piece.text)
        start = len(self.pieces[answer]) - len(pieces)  # a stream's pieces are added before they are told
        top = [self._by_text(self._alternatives(answer, start + index), piece) for index, piece in enumerate(pieces)]
        return {
            "tokens": [piece.text for piece in pieces],
            "token_logprobs": [piece.event.logprob for piece in pieces],
            "top_logprobs": top if self._call.num_top else None,
            "text_offset": offsets,
        }

    def _alternatives(self, answer: int, index: int) -> list[str]:
        """Text of the most likely tokens at a place, each behind the token before it: alone it may lose its space."""
        own = self.pieces[answer]
        before = own[index - 1].event.token if index else self._before[answer]
        known = self._decode([before])
        texts = [self._decode([before, token]) for token, _ in own[index].event.top]
        return [text[len(os.path.commonprefix([known, text])) :] for text in texts]

    @staticmethod
    def _by_text(texts: Sequence[str], piece: Piece) -> dict[str, float]:
        """ln p by text. Texts may be equal (parts of characters, special tokens): the less likely go by their ids."""
        top: dict[str, float] = {}
        for text, (token, logprob) in zip(texts, piece.event.top, strict=True):
            top[f"token_id:{token}" if text in top else text] = logprob
        return top

    def _chat_logprob(self, piece: Piece, texts: Sequence[str]) -> dict[str, Any]:
        def entry(text: str, logprob: float) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

        top = [entry(text, logprob) for text, (_, logprob) in zip(texts, piece.event.top, strict=True)]
        return {**entry(piece.text, piece.event.logprob), "top_logprobs": top}


def _token(piece: Piece) -> dict[str, Any]:
    """Where a token came from. Texts of an answer's tokens, one after the other, are its text."""
    event = piece.event
    return {
        "text": piece.text,
        "id": event.token,
        "exit": FINAL if event.exit is None else event.exit,
        "layer": event.layer,
        "confidence": round(event.confidence, 6),
    }


def server_sent(value: dict[str, Any]) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


STREAM_END = "data: [DONE]\n\n"
