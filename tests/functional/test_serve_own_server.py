# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Servers started for one test: keys, time limits, what is refused at start, failures, and the end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.serving.serve import make_server
from nemo_ee.serving.settings import ServerSettings
from tests.helpers.served_model import (
    GOOD,
    REFERENCE_MODEL,
    post,
    records,
    running,
    serve_config,
    write_exported_model,
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exported_model(tmp_path_factory.mktemp("served") / "hf_early_exit")


def test_keys_are_asked_for(model_path: Path, monkeypatch) -> None:
    keys = ["a-key-of-sixteen-characters", "another-one-of-these-keys"]
    monkeypatch.setenv("NEMO_EE_API_KEYS", ",".join(keys))
    settings = ServerSettings.from_config(serve_config(model_path, host="0.0.0.0"))
    with running(make_server(settings)) as url:
        for key in keys:
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                assert client.models.list().data[0].id == "demo"
                assert client.completions.create(model="demo", prompt="x", max_tokens=1).usage.completion_tokens == 1
        for wrong in (keys[0][:-1], "x", keys[0] + "x", "k\u00e9y"):
            status, answer = post(url, GOOD, authorization=f"Bearer {wrong}")
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert post(url, GOOD)[0] == 401
        import urllib.request

        assert urllib.request.urlopen(f"{url}/health").status == 200
        with pytest.raises(Exception, match="401"):
            urllib.request.urlopen(f"{url}/metrics")


def test_time_is_limited(model_path: Path) -> None:
    settings = ServerSettings.from_config(serve_config(model_path, request_timeout=0.3))
    server = make_server(settings)
    long = {"model": "demo", "prompt": "import", "max_tokens": 1000, "temperature": 0}
    with running(server) as url:
        status, answer = post(url, long)
        assert status == 504 and answer["error"]["code"] == "timeout"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.APIError, match="took longer"):
                list(client.completions.create(**long, stream=True))
        assert server.metrics.registry.get_sample_value("nemo_ee_cancelled_requests_total") == 0, "no client left"
        server.settings = settings.model_copy(update={"request_timeout": 60})
        assert post(url, GOOD)[0] == 200


def test_running_answers_are_told_of_the_end(model_path: Path) -> None:
    """The server is told to stop while an answer is streamed and another one is not: both hear of it."""
    server = make_server(ServerSettings.from_config(serve_config(model_path, shutdown_timeout=0.5)))
    long = {"model": "demo", "prompt": "import", "max_tokens": 1000, "temperature": 0}
    with ThreadPoolExecutor(2) as threads:
        with running(server) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            whole = threads.submit(post, url, long)
            stream = iter(client.completions.create(**long, stream=True))
            next(stream)
            while server.metrics.registry.get_sample_value("nemo_ee_running_sequences") < 2:
                time.sleep(0.01)
            # The end of the block tells the server to stop; what it then says is read behind it.
            rest = threads.submit(list, stream)
        status, answer = whole.result()
        assert status == 503 and "stopping" in answer["error"]["message"]
        with pytest.raises(openai.APIError, match="stopping"):
            rest.result()
    assert server.metrics.registry.get_sample_value("nemo_ee_cancelled_requests_total") == 0, "no client left"


def test_a_model_without_exits_is_served_too() -> None:
    settings = ServerSettings.from_config(serve_config(REFERENCE_MODEL))
    with running(make_server(settings)) as url:
        assert post(url, GOOD)[1]["usage"]["early_exit"]["tokens_per_exit"] == {"final": 2}
        status, answer = post(url, {**GOOD, "early_exit": {"exits": ["layer3-mlp"]}})
        assert status == 400 and "this model's exits are none" in answer["error"]["message"]


def test_what_does_not_fit_the_model_is_refused_at_start(model_path: Path) -> None:
    for changes, words in (
        ({"max_length": 2000}, "more than the model's 1024 positions"),
        ({"exits": ["layer4-mlp"]}, "does not have"),
        ({"mode": "static_depth"}, "reads from one exit"),
        ({"dtype": "int8"}, "dtype='int8' must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            make_server(ServerSettings.from_config(serve_config(model_path, **changes)))


def test_a_thread_that_ends_leaves_nobody_waiting(model_path: Path, monkeypatch) -> None:
    """A step fails, and so does the making of a new session: everyone is told, and /health says so."""
    from nemo_ee.generation.session import DecodingSession

    server = make_server(ServerSettings.from_config(serve_config(model_path, num_slots=1)))

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DecodingSession, "step", fail)
    monkeypatch.setattr(server.scheduler, "_start_session", fail)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with running(server) as url:
        status, answer = post(url, {**GOOD, "n": 2})
        assert status == 500 and "out of memory" not in answer["error"]["message"]
        assert post(url, GOOD)[0] == 503
        with pytest.raises(Exception, match="503"):
            import urllib.request

            urllib.request.urlopen(f"{url}/health")


def test_a_client_that_stops_reading_is_cut_off() -> None:
    """A stream into a connection that takes nothing any more ends, and says that it has."""
    import asyncio

    from nemo_ee.serving.http_server import TokenStream

    ended = []

    async def tokens():
        while True:
            yield "x"

    async def stuck(_message) -> None:
        await asyncio.sleep(3600)

    async def connected():
        await asyncio.sleep(3600)

    stream = TokenStream(tokens(), at_end=lambda: ended.append(True), seconds=0.05)
    asyncio.run(asyncio.wait_for(stream({"type": "http", "asgi": {"spec_version": "2.3"}}, connected, stuck), 10))
    assert ended == [True]


def test_a_sequence_that_fails_ends_alone(model_path: Path, monkeypatch) -> None:
    """Logits of one prompt are made NaN: it gets an error, the one beside it what it gets alone."""
    import torch

    server = make_server(ServerSettings.from_config(serve_config(model_path)))
    model, tokenizer = server.model.model, server.model.tokenizer
    bad, good = tokenizer("import os")["input_ids"], tokenizer("def test_add(self):\n")["input_ids"]
    alone = EarlyExitEngine(model).generate([good], max_new_tokens=20, mode="full").tokens[0]
    real = model.embed

    def poisoned(tokens, positions):
        hidden = real(tokens, positions)
        rows = torch.isin(positions.sequence, positions.sequence[tokens == bad[-1]])
        return hidden.masked_fill(rows[:, None], torch.nan)

    monkeypatch.setattr(model, "embed", poisoned)
    with running(server) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        kind = {"model": "demo", "temperature": 0, "extra_body": {"early_exit": {"mode": "full"}}}
        stream = client.completions.create(prompt=good, max_tokens=20, stream=True, **kind)
        told = records(next(iter(stream)).choices[0])
        with pytest.raises(openai.InternalServerError, match="decoding failed"):
            client.completions.create(prompt=bad, max_tokens=20, **kind)
        told += [one for chunk in stream for one in records(chunk.choices[0])]
    assert [one["id"] for one in told] == list(alone)


def test_a_step_that_fails_ends_its_requests_and_nothing_else(model_path: Path, monkeypatch) -> None:
    from nemo_ee.generation.session import DecodingSession

    server = make_server(ServerSettings.from_config(serve_config(model_path)))
    step, broken = DecodingSession.step, threading.Event()

    def step_or_fail(self, max_prompt_tokens=None):
        if broken.is_set():
            raise RuntimeError("the logits are not numbers")
        return step(self, max_prompt_tokens)

    monkeypatch.setattr(DecodingSession, "step", step_or_fail)
    with running(server) as url:
        broken.set()
        status, answer = post(url, GOOD)
        assert status == 500 and "logits" not in answer["error"]["message"], "what failed is in the log"
        broken.clear()
        assert post(url, GOOD)[0] == 200
