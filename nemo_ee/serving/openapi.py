# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document of the server: FastAPI lists the routes, the pydantic models of the requests give the
schemas."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from nemo_ee.serving.errors import ErrorAnswer
from nemo_ee.serving.guard import OPEN_PATHS
from nemo_ee.serving.protocol import Limits, request_model

_SCHEMAS = "#/components/schemas/{model}"
_EXAMPLE = {"max_tokens": 32, "temperature": 0, "early_exit": {"threshold": 0.8}}
EXAMPLES: dict[bool, dict[str, Any]] = {
    False: {"prompt": "def add(a, b):", **_EXAMPLE},
    True: {"messages": [{"role": "user", "content": "Write a haiku."}], **_EXAMPLE},
}
_STATUSES = {
    400: "the request has problems: all of them, up to ten",
    401: "no or wrong API key",
    403: "the Host header is not loopback, and the server has no API keys",
    404: "no such model or path",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "the body is not declared as application/json",
    429: "too many requests wait; try again later",
    500: "decoding failed; the server's log says why",
    503: "the server is stopping",
    504: "the answer took too long",
}
# FastAPI's `responses` of every route.
ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorAnswer, "description": "any other error"}}


def of_post(chat: bool, limits: Limits) -> dict[str, Any]:
    """Arguments of FastAPI's `add_api_route` for an endpoint that generates text."""
    schema = {"$ref": _SCHEMAS.format(model=request_model(chat, limits).__name__)}
    body = {"required": True, "content": {"application/json": {"schema": schema, "example": EXAMPLES[chat]}}}
    answer = (
        "OpenAI's answer; choices[i].early_exit.tokens has the exit of every token, usage.early_exit their counts. "
        "With stream, server-sent events of its chunks"
    )
    errors = {status: {"model": ErrorAnswer, "description": text} for status, text in _STATUSES.items()}
    responses = {200: {"description": answer, "content": {"text/event-stream": {}}}, **errors}
    return {"methods": ["POST"], "responses": responses, "openapi_extra": {"requestBody": body}}


def openapi_document(app: FastAPI, limits: Limits, needs_key: bool) -> dict[str, Any]:
    """The document.

    Args:
        app: the application, whose routes are listed.
        limits: limits of one request, which the schemas hold.
        needs_key: whether the server has API keys.
    """
    document = get_openapi(
        title=app.title,
        version="v1",  # version of the API, as in its paths
        description="OpenAI's completions and chat completions over a model with early exits.",
        routes=app.routes,
    )
    models = [(request_model(chat, limits), "validation") for chat in (False, True)]
    _, schemas = models_json_schema(models, ref_template=_SCHEMAS)
    document["components"]["schemas"] |= schemas["$defs"]
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in OPEN_PATHS:
            for operation in document["paths"][path].values():
                operation["security"] = []
    return document
