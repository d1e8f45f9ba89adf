# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of every request before it is read: host name, API key, and content type, which keeps web pages out.

Without keys the server listens on loopback only, where any web page in a browser on the machine can still reach it.
Two rules keep pages out: the Host header must name loopback (a foreign name may be made to resolve to it), and a body
must be declared as JSON (for which a page of another origin needs a permission that is never given here).

    Host = uri-host [ ":" port ]                                          RFC 9110, section 7.2
    host = IP-literal / IPv4address / reg-name      port = *DIGIT         RFC 3986, section 3.2
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from nemo_ee.serving.errors import ApiError
from nemo_ee.serving.settings import is_loopback

# Answered without a key: the two pages, which have a field for it, and the health check.
OPEN_PATHS = ("/", "/docs", "/health")
_HOST = re.compile(
    r"(?P<host>\[(?P<literal>[0-9A-Fa-f:.]+)\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::(?P<port>[0-9]*))?"
)


class Guard:
    """ASGI middleware.

    Args:
        app: the guarded application.
        api_keys: valid keys; () = no key is needed, loopback only.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app, self._keys = app, [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with an error."""
        error = self._error(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
            return
        headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
        await JSONResponse(error.to_mapping(), error.status, headers)(scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if not self._keys:
            names = headers.getlist("host")
            # Health checks of load balancers use HTTP/1.0, which has no such header. Browsers do not use it.
            if not names and scope["http_version"] == "1.0" and scope["path"] == "/health":
                return None
            name = host_of(names[0]) if len(names) == 1 else None
            if name is None:
                message = (
                    f"the Host header {', '.join(names)[:60]!r} is not one host with at most a port; call 127.0.0.1"
                )
                return ApiError(400, message)
            if not is_loopback(name):
                return ApiError(403, f"the Host header {names[0][:60]!r} is not loopback; call 127.0.0.1 or localhost")
        elif scope["path"] not in OPEN_PATHS and not self._knows(headers.get("authorization", "")):
            message = "no or wrong API key; send the header Authorization: Bearer <key>"
            return ApiError(401, message, code="invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return ApiError(415, f"Content-Type is {kind[:60]!r}; send application/json")
        return None

    def _knows(self, authorization: str) -> bool:
        kind, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        # Every key is compared, each in constant time, so that the delay of the answer does not depend on the key.
        return any([hmac.compare_digest(given, known) for known in self._keys]) and kind.lower() == "bearer"


def _digest(key: str) -> bytes:
    """A key as a digest of constant length, so that timing does not depend on the key's length either."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def host_of(header: str) -> str | None:
    """The host in a Host header, an IPv6 address without its brackets; None = not a valid Host header."""
    match = _HOST.fullmatch(header)
    if match is None or len(match["port"] or "") > 5 or int(match["port"] or 0) > 65535:
        return None
    literal = match["literal"]
    if literal is None:
        return match["host"]
    try:
        return str(ipaddress.IPv6Address(literal))
    except ValueError:
        return None
