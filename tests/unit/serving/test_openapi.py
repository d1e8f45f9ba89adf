# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The published OpenAPI document and the page that shows it. That requests which the server accepts validate against
the schemas is checked in every test of the server (conftest.py)."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi.openapi.models import OpenAPI

from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.serving.http_server import DOCS, Server
from nemo_ee.serving.openapi import EXAMPLES, openapi_document
from nemo_ee.serving.protocol import Limits, read_request
from nemo_ee.serving.settings import ServerSettings
from tests.helpers.json_schema import problems

LIMITS = Limits(max_new_tokens=64, max_choices=4)
KEY = "sixteen-letters-x"
USER = {"role": "user", "content": "x"}


def application(*keys: str) -> Any:
    settings = ServerSettings.model_construct(
        host="127.0.0.1", port=0, api_keys=keys, max_new_tokens=LIMITS.max_new_tokens, max_choices=LIMITS.max_choices,
        max_body_bytes=1 << 20, max_connections=10, request_timeout=30, shutdown_timeout=5,
    )  # fmt: skip
    scheduler = SimpleNamespace(healthy=True, start=lambda: None, stop=lambda: None)
    return Server(SimpleNamespace(name="demo"), scheduler, None, settings).app()


def get(app: Any, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of an answer, without a socket."""
    sent: list[dict] = []
    messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> dict:
        return next(messages, None) or await asyncio.sleep(3600)

    async def send(message: dict) -> None:
        sent.append(message)

    own = {"host": "127.0.0.1", **headers}
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
             "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
             "headers": [(key.encode(), value.encode()) for key, value in own.items()]}  # fmt: skip
    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], {key.decode(): value.decode() for key, value in sent[0]["headers"]}, body.decode()


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    status, _, text = get(application(), "/openapi.json")
    assert status == 200
    return json.loads(text)


def request_problems(document: dict[str, Any], chat: bool, body: dict[str, Any]) -> list[str]:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return list(problems(schema, json.loads(json.dumps(body)), document))


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(inner)


def test_it_is_an_openapi_document_whose_references_are_there(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    OpenAPI.model_validate(document)
    references = {one["$ref"] for one in nodes(document) if isinstance(one.get("$ref"), str)}
    named = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references <= named and named - references == set(), "no schema is missing and none is left over"
    assert set(document["paths"]) == {"/", "/docs", "/openapi.json", "/health", "/metrics", "/v1/models",
                                      "/v1/models/{name}", "/v1/completions", "/v1/chat/completions"}  # fmt: skip


def test_fields_have_their_limits_and_descriptions(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": LIMITS.max_choices}
    assert fields["max_tokens"]["anyOf"][0]["maximum"] == LIMITS.max_new_tokens
    assert fields["stop_token_ids"]["anyOf"][0]["maxItems"] == 1024
    assert fields["logit_bias"]["anyOf"][0]["maxProperties"] == 1024
    for name in ("CompletionRequest", "ChatRequest", "EarlyExit"):
        own = document["components"]["schemas"][name]
        assert own["description"]
        assert all(field.get("description") for field in own["properties"].values())


def test_defaults_are_within_a_server_s_limits() -> None:
    request = read_request({"prompt": "x"}, chat=False, limits=Limits(max_new_tokens=8, max_choices=1))
    assert request.max_new_tokens == 8
    assert read_request({"prompt": "x"}, chat=False, limits=LIMITS).max_new_tokens == 16, "control: OpenAI's default"


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_the_examples_are_requests(chat: bool, document: dict[str, Any]) -> None:
    assert request_problems(document, chat, EXAMPLES[chat]) == []
    assert read_request(EXAMPLES[chat], chat=chat, limits=LIMITS).sampling == SamplingParams()


REFUSED = [
    (False, {}), (False, {"prompt": ""}), (False, {"prompt": []}), (False, {"prompt": [1, "x"]}),
    (False, {"prompt": True}), (False, {"prompt": "x", "promtp": 1}), (False, {"prompt": "x", "n": 0}),
    (False, {"prompt": "x", "n": 5}), (False, {"prompt": "x", "n": True}), (False, {"prompt": "x", "n": 1.5}),
    (False, {"prompt": "x", "n": "1"}), (False, {"prompt": "x", "max_tokens": 65}),
    (False, {"prompt": "x", "temperature": 2.1}), (False, {"prompt": "x", "top_p": 0}),
    (False, {"prompt": "x", "stop": [""]}), (False, {"prompt": "x", "stop": ["a"] * 17}),
    (False, {"prompt": "x", "stop_token_ids": ["a"]}), (False, {"prompt": "x", "logit_bias": {"x": 1}}),
    (False, {"prompt": "x", "logit_bias": {"1": 101}}), (False, {"prompt": "x", "logprobs": 6}),
    (False, {"prompt": "x", "echo": 1}), (False, {"prompt": "x", "best_of": 2}),
    (False, {"prompt": "x", "best_of": True}), (False, {"prompt": "x", "messages": []}),
    (False, {"prompt": "x", "stream_options": {"include_obfuscation": True}}),
    (False, {"prompt": "x", "early_exit": 0.8}), (False, {"prompt": "x", "early_exit": {"mode": "fast"}}),
    (False, {"prompt": "x", "early_exit": {"treshold": 1}}),
    (False, {"prompt": "x", "early_exit": {"threshold": "a"}}),
    (False, {"prompt": "x", "early_exit": {"exits": "a"}}), (False, {"prompt": "x", "early_exit": {"certificate": 3}}),
    (True, {}), (True, {"messages": []}), (True, {"messages": [USER], "prompt": "x"}),
    (True, {"messages": [{**USER, "role": "robot"}]}), (True, {"messages": [{**USER, "contents": "x"}]}),
    (True, {"messages": [{**USER, "content": [{"type": "image_url"}]}]}), (True, {"messages": [{"role": "user"}]}),
    (True, {"messages": [{**USER, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]}),
    (True, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 7, "arguments": "{}"}}]}]}),
    (True, {"messages": [USER], "tools": [{"type": "custom"}]}),
    (True, {"messages": [USER], "tool_choice": "required"}),
    (True, {"messages": [USER], "logprobs": 3}), (True, {"messages": [USER], "max_tokens": 0}),
    (True, {"messages": [USER], "response_format": {"type": "json_object"}}),
]  # fmt: skip


@pytest.mark.parametrize(("chat", "body"), REFUSED, ids=str)
def test_what_types_and_limits_refuse_the_schema_refuses(chat: bool, body: dict, document: dict[str, Any]) -> None:
    from nemo_ee.serving.errors import ApiError

    with pytest.raises(ApiError) as caught:
        read_request(body, chat=chat, limits=LIMITS)
    assert caught.value.param is not None
    assert request_problems(document, chat, body)


def test_with_keys_the_document_needs_one_and_the_page_does_not() -> None:
    app = application(KEY)
    assert get(app, "/openapi.json")[0] == 401 and get(app, "/docs")[0] == 200
    status, _, text = get(app, "/openapi.json", authorization=f"Bearer {KEY}")
    document = json.loads(text)
    assert status == 200 and document["security"] == [{"key": []}] and KEY not in text
    unlocked = {path for path, methods in document["paths"].items() if methods.get("get", {}).get("security") == []}
    assert unlocked == {"/", "/docs", "/health"}
    for path in unlocked:
        assert get(app, path)[0] == 200
    for path in set(document["paths"]) - unlocked - {"/v1/completions", "/v1/chat/completions"}:
        assert get(app, path)[0] == 401
    for path in ("/docs", "/openapi.json"):
        assert get(application(), path, host="evil.example")[0] == 403


def test_the_page_loads_nothing_from_another_host_and_sets_text_only() -> None:
    status, headers, text = get(application(), "/docs")
    assert status == 200 and text == DOCS.read_text(encoding="utf-8")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert not re.search(r"https?:|//[a-z]|@import|\burl\(", re.sub(r"<!--.*?-->", "", text))
    assert set(re.findall(r"\b(?:href|src)=\"([^\"]*)\"", text)) == {"data:,", "/openapi.json", "/"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text)
    assert (Path(DOCS).stat().st_size) < 16_000


def test_the_document_is_made_of_the_app_s_routes() -> None:
    app = application()
    app.add_api_route("/more", lambda: None)
    assert "/more" in openapi_document(app, LIMITS, needs_key=False)["paths"]
