# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The Host header of a server without keys: loopback, whole and alone, or no answer."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("starlette")

from nemo_ee.serving.guard import Guard, host_of

OURS = [
    "127.0.0.1", "127.0.0.1:8000", "127.8.8.8:1", "localhost", "LocalHost:65535", "[::1]", "[::1]:8000", "localhost:",
    "[0:0:0:0:0:0:0:1]:80",
]  # fmt: skip
FOREIGN = [
    "", ":80", "evil.com", "evil.com:8000", "localhost.evil.com", "127.0.0.1.evil.com", "evil.com,localhost",
    "localhost,evil.com", "%6cocalhost", "localhost%00", "localhost%2eevil.com", "127.1", "0x7f.0.0.1", "2130706433",
    "127.0.0.01", "0177.0.0.1", "0.0.0.0", "[::]", "[::2]:80", "[::ffff:8.8.8.8]", "[64:ff9b::7f00:1]",
    "127.0.0.1=evil.com", "localhost;evil.com", "localhost!", "local_host", "*",
]  # fmt: skip
BROKEN = [
    "[::1]evil.com", "[::1]evil.com:80", "localhost:80@evil.com", "127.0.0.1:evil.com", "127.0.0.1@evil.com",
    "user@127.0.0.1", "user:pass@localhost", "localhost:80:80", "localhost:-1", "localhost:+80", "localhost:8o",
    "localhost:65536", "localhost:00000080", "localhost:80 ", "localhost :80", "localhost\t", "localhost\n",
    "localhost/", "localhost/@evil.com", "localhost?evil.com", "localhost#evil.com", "localhost\\evil.com",
    "http://localhost", "//localhost", "[::1", "::1]", "::1", "::1:80", "[]", "[]:80", "[127.0.0.1]", "[localhost]",
    "[::1%25lo]", "[::1%evil.com]", "[::1]:evil.com", "[::1]]", "[[::1]]", "[::1][::1]", "[1::1::1]", "[v1.a]",
    "localhost%", "localhost%0", "localhost%zz", "l\xf6calhost", "127.0.0.\xb9", "localhost\x00",
    "localhost, evil.com", "localhost evil.com", "<localhost>", "\"localhost\"", "localhost:\xb2",
]  # fmt: skip


def ask(path: str = "/health", version: str = "1.1", hosts: tuple[str, ...] = (), keys=()) -> int:
    """The status that the guard gives; 200 = it lets the request in."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"host", host.encode("latin-1")) for host in hosts]
    scope = {"type": "http", "method": "GET", "path": path, "http_version": version, "headers": headers}
    asyncio.run(Guard(app, keys)(scope, None, send))
    return sent[0]["status"]


@pytest.mark.parametrize("host", OURS)
def test_loopback_is_let_in(host: str) -> None:
    assert ask(hosts=(host,)) == 200 and host_of(host) is not None


@pytest.mark.parametrize("host", FOREIGN)
def test_another_host_is_not_ours(host: str) -> None:
    assert ask(hosts=(host,)) == 403


@pytest.mark.parametrize("host", BROKEN)
def test_what_is_no_host_is_refused(host: str) -> None:
    assert host_of(host) is None and ask(hosts=(host,)) == 400


def test_two_hosts_are_refused() -> None:
    assert ask(hosts=("localhost", "localhost")) == 400 and ask(hosts=("localhost", "evil.com")) == 400


def test_only_an_old_health_check_comes_without_a_host() -> None:
    assert ask("/health", "1.0") == 200
    assert [ask(path, version) for path, version in (("/health", "1.1"), ("/", "1.0"), ("/v1/models", "1.0"))] == [
        400
    ] * 3
    assert ask("/health", "1.0", ("evil.com",)) == 403
    assert ask("/health", "1.0", keys=("k" * 16,)) == 200, "with keys the name does not matter"
