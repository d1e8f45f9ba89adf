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
from itertools import accumulate
from typing import Any

from nemo_ee.generation.decoding_model import ExitPoint
from nemo_ee.generation.stats import FINAL, PromptScores, TokenEvent
from nemo_ee.serving.protocol import ApiRequest
from nemo_ee.serving.request_certificates import promise
from nemo_ee.serving.served_model import Prepared
from nemo_ee.serving.text_stream import Piece, TextStream

_ENCODE = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps makes an encoder for each chunk


class Answers:
    """All answers to one request.

    Args:
        call: the request.
        model: name to report.
        prepared: the engine's requests for it.
        exits: the model's.
        num_layers: the model's.
        decode: token ids -> text, for alternatives.
    """

    def __init__(
        self,
        call: ApiRequest,
        model: str,
        prepared: Prepared,
        exits: Sequence[ExitPoint],
        num_layers: int,
        decode: Callable[[list[int]], str],
    ) -> None:
        self._call, self._prepared, self._num_layers, self._decode = call, prepared, num_layers, decode
        self._exits = [point.name for point in exits]
        self._prompts = [request.prompt for request in prepared.requests]
        self.pieces: list[list[Piece]] = [[] for _ in self._prompts]
        self._scores: list[PromptScores | None] = [None] * len(self.pieces)
        self._unsent = list(prepared.prompt_texts)
        self.failed = False  # the answers ended with an error
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

    def add(
        self, answer: int, pieces: Sequence[Piece], finish_reason: str | None, prompt: PromptScores | None = None
    ) -> None:
        """Add new pieces of an answer; `prompt`: the scores of its prompt, before or with its first token."""
        self.pieces[answer] += pieces
        self._scores[answer] = prompt or self._scores[answer]
        self.finish_reasons[answer] = finish_reason

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self._choice(index, own, stream=False) for index, own in enumerate(self.pieces)]
        return {**self._head, "choices": choices, "usage": self.usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The first chunks of a stream: in a chat, the role of the answer."""
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
        certificate = self._prepared.choice.certificate
        depth = sum(event.layer for event in events) / len(events) if events else 0.0
        return {
            "prompt_tokens": self._prepared.num_prompt_tokens,
            "completion_tokens": len(events),
            "total_tokens": self._prepared.num_prompt_tokens + len(events),
            "early_exit": {
                "mode": self._prepared.choice.mode,
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
            choice["logprobs"] = None if self._call.num_top is None else self._chat_logprobs(answer, pieces)
        else:
            echo, self._unsent[answer] = self._unsent[answer], ""
            choice["text"] = echo + text
            choice["logprobs"] = None if self._call.num_top is None else self._logprobs(answer, pieces, echo)
        choice["finish_reason"] = self.finish_reasons[answer]
        choice["early_exit"] = {"tokens": [_token(piece) for piece in pieces]}
        return choice

    def _chat_logprobs(self, answer: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        start = len(self.pieces[answer]) - len(pieces)  # a stream's pieces are added before they are sent
        content = []
        for index, (event, text) in enumerate(pieces, start):
            texts = self._alternatives(self._token_before(answer, index), event.top)
            top = [_entry(one, logprob) for one, (_, logprob) in zip(texts, event.top, strict=True)]
            content.append({**_entry(text, event.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _logprobs(self, answer: int, pieces: Sequence[Piece], echo: str) -> dict[str, Any]:
        """OpenAI's four lists for new tokens; with `echo`, the prompt's text, they begin with the prompt's tokens."""
        rows: list[tuple[str, float | None, dict[str, float] | None]] = []
        offsets: list[int] = []
        scores, self._scores[answer] = self._scores[answer], None
        if scores is not None and self._call.echo:
            rows = self._prompt_rows(answer, scores)
            ends = accumulate(len(text) for text, *_ in rows)
            offsets = [0, *(min(end, len(echo)) for end in ends)][:-1]
        self._offsets[answer] += len(echo)
        start = len(self.pieces[answer]) - len(pieces)
        for index, (event, text) in enumerate(pieces, start):
            texts = self._alternatives(self._token_before(answer, index), event.top)
            rows.append((text, event.logprob, self._by_text(texts, event.top)))
            offsets.append(self._offsets[answer])
            self._offsets[answer] += len(text)
        return {
            "tokens": [text for text, *_ in rows],
            "token_logprobs": [logprob for _, logprob, _ in rows],
            "top_logprobs": [top for *_, top in rows] if self._call.num_top else None,
            "text_offset": offsets,
        }

    def _prompt_rows(
        self, answer: int, scores: PromptScores
    ) -> list[tuple[str, float | None, dict[str, float] | None]]:
        """Text, ln p and alternatives of each token of a prompt; nothing is known about the first."""
        prompt, rows = self._prompts[answer], []
        stream = TextStream(self._decode, ())
        for index, token in enumerate(prompt):
            reason = "length" if index + 1 == len(prompt) else None
            (piece,) = stream.push(TokenEvent(answer, index, token, None, self._num_layers, 1.0, 0.0, reason))
            if index == 0:
                rows.append((piece.text, None, None))
                continue
            top = scores.top[index - 1] if scores.top else ()
            texts = self._alternatives(prompt[index - 1], top)
            rows.append((piece.text, scores.logprobs[index - 1], self._by_text(texts, top)))
        return rows

    def _token_before(self, answer: int, index: int) -> int:
        """The token in front of an answer's token at this index."""
        return self.pieces[answer][index - 1].event.token if index else self._prompts[answer][-1]

    def _alternatives(self, before: int, top: Sequence[tuple[int, float]]) -> list[str]:
        """Text of the most likely tokens at a place. Each is decoded behind the token before it: alone it may lose its
        space."""
        known = self._decode([before]) if top else ""
        texts = [self._decode([before, token]) for token, _ in top]
        return [text[len(os.path.commonprefix([known, text])) :] for text in texts]

    @staticmethod
    def _by_text(texts: Sequence[str], alternatives: Sequence[tuple[int, float]]) -> dict[str, float]:
        """ln p by text. Where texts are equal (parts of characters, special tokens), the less likely ones have their
        ids as keys."""
        top: dict[str, float] = {}
        for text, (token, logprob) in zip(texts, alternatives, strict=True):
            top[f"token_id:{token}" if text in top else text] = logprob
        return top


def _entry(text: str, logprob: float) -> dict[str, Any]:
    """A token of a chat's logprobs."""
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}


def _token(piece: Piece) -> dict[str, Any]:
    """The exit of a token. The texts of an answer's tokens, one after the other, are its text."""
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
    return f"data: {_ENCODE(value)}\n\n"


STREAM_END = "data: [DONE]\n\n"
