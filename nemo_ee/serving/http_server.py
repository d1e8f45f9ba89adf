# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The HTTP side: routes, limits, streams. The model's side is `Scheduler`, in a thread of its own.

GET /  /docs  /openapi.json  /health  /metrics  /v1/models  /v1/models/{name}
POST /v1/completions  /v1/chat/completions
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from nemo_ee.serving.answers import STREAM_END, Answers, server_sent
from nemo_ee.serving.errors import ApiError
from nemo_ee.serving.guard import Guard
from nemo_ee.serving.metrics import CONTENT_TYPE, Metrics
from nemo_ee.serving.openapi import ERRORS, of_post, openapi_document
from nemo_ee.serving.protocol import ApiRequest, read_body, read_request
from nemo_ee.serving.request_in_flight import Deliveries, RequestInFlight
from nemo_ee.serving.scheduler import Scheduler
from nemo_ee.serving.served_model import Prepared, ServedModel
from nemo_ee.serving.settings import ServerSettings

_LOG = logging.getLogger(__name__)
PAGE, DOCS = (Path(__file__).with_name(name) for name in ("page.html", "docs.html"))
_BODY_SECONDS = 30  # seconds to receive a request body
_UNREAD_SECONDS = 10  # seconds that a client may lag behind at the end of a stream
_CLIENT_GONE = 499  # non-standard status (nginx) of a client that disconnected; only in the metrics


class Server:
    """Answers requests.

    Args:
        model: the served model.
        scheduler: runs it; started and stopped with the app.
        metrics: the scheduler's.
        settings: the network's side.
    """

    def __init__(self, model: ServedModel, scheduler: Scheduler, metrics: Metrics, settings: ServerSettings) -> None:
        self.model, self.scheduler, self.metrics, self.settings = model, scheduler, metrics, settings
        self._created = int(time.time())
        # Large bodies take long to read and to tokenize, and a tokenizer must not be used by two threads.
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._page, self._docs = _page(PAGE), _page(DOCS)
        self._openapi: dict[str, Any] = {}  # once the app has its routes
        self._deliveries: Deliveries | None = None  # once the event loop runs

    def app(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(
            title="nemo_ee", docs_url=None, redoc_url=None, openapi_url=None, responses=ERRORS, lifespan=self._lifespan
        )
        limits, keys = self.settings.limits, self.settings.api_keys
        app.add_api_route("/v1/completions", self.completions, **of_post(False, limits))
        app.add_api_route("/v1/chat/completions", self.chat_completions, **of_post(True, limits))
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/models/{name:path}", self.one_model)
        app.add_api_route("/health", self.health)
        app.add_api_route("/health", self.health, methods=["HEAD"], include_in_schema=False)
        app.add_api_route("/metrics", self.metrics_text, response_class=PlainTextResponse)
        app.add_api_route("/openapi.json", self.openapi)
        app.add_api_route("/docs", self.docs, response_class=HTMLResponse)
        app.add_api_route("/", self.page, response_class=HTMLResponse)
        self._openapi = openapi_document(app, limits, needs_key=bool(keys))
        app.add_exception_handler(ApiError, _api_error)
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(Exception, _server_error)
        app.add_middleware(Guard, api_keys=keys)
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self._deliveries = Deliveries(asyncio.get_running_loop())
        self.scheduler.start()
        yield
        await asyncio.to_thread(self.scheduler.stop)
        self._reading.shutdown()

    async def page(self) -> Response:
        """The page to try the model on."""
        return self._page()

    async def docs(self) -> Response:
        """The page that describes the endpoints."""
        return self._docs()

    async def openapi(self) -> Response:
        """This document."""
        return JSONResponse(self._openapi)

    async def health(self) -> Response:
        """Whether requests are accepted: 200, else 503."""
        good = self.scheduler.healthy
        return JSONResponse({"status": "ok" if good else "stopping"}, 200 if good else 503)

    async def metrics_text(self) -> Response:
        """Metrics in Prometheus' format."""
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def models(self) -> Response:
        """The served model, in a list: its exits, modes, certificates and defaults."""
        return JSONResponse({"object": "list", "data": [self.model.card(self._created)]})

    async def one_model(self, name: str) -> Response:
        """The served model, by name."""
        if name != self.model.name:
            raise ApiError(404, f"the model {name[:60]!r} does not exist", param="model", code="model_not_found")
        return JSONResponse(self.model.card(self._created))

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        return await self._measured(request, chat=False)

    async def chat_completions(self, request: Request) -> Response:
        """Answer in a conversation."""
        return await self._measured(request, chat=True)

    async def _measured(self, request: Request, *, chat: bool) -> Response:
        endpoint, started, status, streams = "chat" if chat else "completions", time.monotonic(), 500, False
        try:
            response = await self._answer(request, chat, started)
            status, streams = response.status_code, isinstance(response, TokenStream)
        except ApiError as error:
            status = error.status
            raise
        finally:
            self.metrics.requests.labels(endpoint, str(status)).inc()
            if status == _CLIENT_GONE:
                self.metrics.cancelled.inc()
            if not streams:  # a stream has only begun
                self.metrics.latency.labels(endpoint).observe(time.monotonic() - started)
        return response

    async def _answer(self, request: Request, chat: bool, started: float) -> Response:
        deadline = started + self.settings.request_timeout
        body = await self._body(request)
        reading = asyncio.get_running_loop().run_in_executor(self._reading, self._read, body, chat)
        call, prepared = await reading
        model = self.model.model
        answers = Answers(
            call, self.model.name, prepared, model.exits, model.num_layers, self.model.decoder(call)
        )  # fmt: skip
        in_flight = RequestInFlight(
            call, prepared, self.model, self.scheduler, self._deliveries, self.metrics, started, deadline
        )
        if call.stream:
            return TokenStream(
                self._stream(call, answers, in_flight),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache"},
                at_end=lambda: self._end_stream(call, answers, in_flight, started),
                # The request has its own, shorter limit, which is reported in the stream.
                seconds=self.settings.request_timeout + _UNREAD_SECONDS,
            )
        try:
            return await self._whole(request, answers, in_flight)
        finally:
            in_flight.cancel()

    def _read(self, body: bytes, chat: bool) -> tuple[ApiRequest, Prepared]:
        """The request in a body. A large one takes long, so it runs outside of the event loop."""
        call = read_request(read_body(body), chat=chat, limits=self.settings.limits)
        return call, self.model.prepare(call)

    async def _body(self, request: Request) -> bytes:
        """The body, counted as it comes.

        Raises:
            ApiError: 413 it is larger than allowed, 408 it does not come in time, 499 the client has disconnected.
        """
        limit = self.settings.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {limit} bytes; send less")
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared[:20]) > limit:
            raise too_large
        chunks: list[bytes] = []

        async def read() -> None:
            size = 0
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise too_large
                chunks.append(chunk)

        try:
            await asyncio.wait_for(read(), _BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not come within {_BODY_SECONDS} s") from None
        except ClientDisconnect:
            raise ApiError(_CLIENT_GONE, "the client disconnected before its body was received") from None
        return b"".join(chunks)

    async def _whole(self, request: Request, answers: Answers, in_flight: RequestInFlight) -> Response:
        """Wait for the whole answer, or for the client to disconnect."""

        async def collect() -> None:
            async for index, update in in_flight.updates():
                answers.add(index, update.pieces, update.finish_reason, update.prompt)

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        collecting, watching = asyncio.create_task(collect()), asyncio.create_task(gone())
        try:
            await asyncio.wait([collecting, watching], return_when=asyncio.FIRST_COMPLETED)
        finally:
            collected = collecting.done()
            collecting.cancel()
            watching.cancel()
        if not collected:
            return Response(status_code=_CLIENT_GONE)
        collecting.result()
        # The texts of many tokens take long.
        return JSONResponse(await asyncio.to_thread(answers.whole))

    async def _stream(self, call: ApiRequest, answers: Answers, in_flight: RequestInFlight) -> AsyncIterator[str]:
        """Events as the tokens come."""
        try:
            for chunk in answers.opening():
                yield server_sent(chunk)
            async for index, update in in_flight.updates():
                answers.add(index, update.pieces, update.finish_reason, update.prompt)
                if update.prompt is None:
                    chunk = answers.chunk(index, update.pieces)
                else:  # of many tokens, as above
                    chunk = await asyncio.to_thread(answers.chunk, index, update.pieces)
                yield server_sent(chunk)
            if call.include_usage:
                yield server_sent(answers.last_chunk())
            yield STREAM_END
        except ApiError as error:  # the status is sent already, so the error goes into the stream
            answers.failed = True
            yield server_sent(error.to_mapping())

    def _end_stream(self, call: ApiRequest, answers: Answers, in_flight: RequestInFlight, started: float) -> None:
        """Record the end, after the last chunk or when the client has disconnected."""
        in_flight.cancel()
        if not (answers.ended or answers.failed):
            self.metrics.cancelled.inc()
        endpoint = "chat" if call.chat else "completions"
        self.metrics.latency.labels(endpoint).observe(time.monotonic() - started)


class TokenStream(StreamingResponse):
    """A stream that reports its end, also when the client does not read it.

    Args:
        at_end: called once at the end, after errors too.
        seconds: time limit; a client that stops reading is cut off then.
        args, kwargs: StreamingResponse's.
    """

    def __init__(self, *args: Any, at_end: Callable[[], None], seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._at_end, self._seconds = at_end, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._seconds)
        except asyncio.TimeoutError:
            _LOG.info("a client did not read its answer in time and was cut off")
        finally:
            self._at_end()


def _page(path: Path) -> Callable[[], Response]:
    """Returns a function that makes responses with a static page."""
    text = path.read_text(encoding="utf-8")
    return partial(HTMLResponse, text, headers=page_headers(text))


def page_headers(page: str) -> dict[str, str]:
    """Headers under which the page can run only its own script and style, and connect to this server only."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


async def _api_error(request: Request, error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status == 429 else None
    return JSONResponse(error.to_mapping(), error.status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    known = {404: f"there is no {request.url.path[:60]} here", 405: f"{request.method} is not for this path"}
    own = ApiError(error.status_code, known.get(error.status_code, str(error.detail)))
    return JSONResponse(own.to_mapping(), error.status_code, error.headers)


async def _server_error(request: Request, error: Exception) -> Response:
    _LOG.error("an answer failed", exc_info=error)
    return JSONResponse(ApiError(500, "the server failed on this request").to_mapping(), 500)
