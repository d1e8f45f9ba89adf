# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Errors of a request, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from itertools import islice
from typing import Any

MAX_MESSAGE = 2000  # characters; a message may quote what came, which may be large


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: what is wrong, the rule and the way out.
        param: field of the request at fault.
        code: OpenAI's word for it.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        message = message if len(message) <= MAX_MESSAGE else f"{message[: MAX_MESSAGE - 3]}..."
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_mapping(self) -> dict[str, Any]:
        """The body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def kind(self) -> str:
        """OpenAI's type of error."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


def shown(value: object) -> str:
    """A value from a request as a message shows it: short, on one line."""
    text = repr(_part(value, 3))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _part(value: object, depth: int) -> object:
    """Enough of a value for its first 60 characters, so that a large one costs nothing."""
    if isinstance(value, str):
        return value[:60]
    if not isinstance(value, list | dict):
        return value
    if not depth:
        return "..."
    if isinstance(value, list):
        return [_part(one, depth - 1) for one in value[:30]]
    return {_part(key, 0): _part(one, depth - 1) for key, one in islice(value.items(), 30)}
