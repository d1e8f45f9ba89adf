# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Errors of a request, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

MAX_MESSAGE = 2000  # characters; a message may quote the request, which may be large


class ErrorFields(BaseModel):
    """The fields of an error."""

    message: str = Field(description="every problem with the value, the rule and the way out")
    type: str = Field(description="authentication_error, rate_limit_error, invalid_request_error or server_error")
    param: str | None = Field(description="field of the request with the first problem")
    code: str | None = Field(description="OpenAI's word for the error")


class ErrorAnswer(BaseModel):
    """The body of an answer that is an error."""

    error: ErrorFields


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: the problem, the rule and the way out.
        param: field of the request with the first problem.
        code: OpenAI's word for it.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        message = message if len(message) <= MAX_MESSAGE else f"{message[: MAX_MESSAGE - 3]}..."
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_mapping(self) -> dict[str, Any]:
        """The body."""
        fields = ErrorFields(message=self.message, type=self.kind, param=self.param, code=self.code)
        return ErrorAnswer(error=fields).model_dump()

    @property
    def kind(self) -> str:
        """OpenAI's type of error."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
