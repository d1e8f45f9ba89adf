# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The server, talked to by OpenAI's own client, against the decoding engine called directly. fp32, CPU.

Texts and exits are compared exactly, ln p within 1e-4.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.sampling import GREEDY, SamplingParams
from nemo_ee.serving.serve import make_server
from nemo_ee.serving.settings import ServerSettings
from tests.helpers.served_model import (
    CHAT_TEMPLATE,
    EXITS,
    GOOD,
    post,
    records,
    running,
    serve_config,
    write_exported_model,
)

PROMPT = "def test_add(self):\n"
THRESHOLD = 0.1


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exported_model(tmp_path_factory.mktemp("served") / "hf_early_exit")


@pytest.fixture(scope="module")
def server(model_path: Path):
    template = model_path.parent / "chat.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    config = serve_config(
        model_path, threshold=THRESHOLD, num_slots=4, max_queue=4, max_choices=8, chat_template=str(template)
    )
    return make_server(ServerSettings.from_config(config))


@pytest.fixture(scope="module")
def url(server):
    with running(server) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as own:
        yield own


def directly(
    server, prompt: str, new_tokens: int, *, mode="early_exit", threshold=THRESHOLD, sampling=GREEDY, **policy
):
    """The engine's own answer to one prompt, alone."""
    ids = server.model.tokenizer(prompt)["input_ids"]
    return EarlyExitEngine(server.model.model).generate(
        [ids],
        max_new_tokens=new_tokens,
        mode=mode,
        policy=ExitPolicy(threshold, **policy),
        sampling=sampling,
        stop_tokens=server.model.stop_tokens,
    )


def test_models(client, server) -> None:
    (card,) = client.models.list().data
    assert card.id == "demo" and client.models.retrieve("demo").id == "demo"
    assert [one["name"] for one in card.early_exit["exits"]] == list(EXITS)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


def test_a_completion_is_what_the_engine_gives(client, server) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0, logprobs=3)
    own = directly(server, PROMPT, 24)
    (choice,) = answer.choices
    told = records(choice)
    assert [one["id"] for one in told] == list(own.tokens[0])
    assert [one["exit"] for one in told] == [event.exit or "final" for event in own.events]
    assert {one["exit"] for one in told} > {"final"}, "some token leaves early, or this test shows little"
    assert "".join(one["text"] for one in told) == choice.text
    assert PROMPT + choice.text == server.model.decode([*server.model.tokenizer(PROMPT)["input_ids"], *own.tokens[0]])
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 24 and answer.usage.prompt_tokens > 3
    assert answer.usage.early_exit["tokens_per_exit"] == own.stats.tokens_per_exit
    assert answer.usage.early_exit["mean_depth"] == pytest.approx(own.stats.mean_depth, abs=1e-3)
    probs = choice.logprobs
    assert probs.token_logprobs == pytest.approx([event.logprob for event in own.events], abs=1e-4)
    assert probs.text_offset == [len("".join(probs.tokens[:i])) for i in range(24)]
    for token, logprob, top in zip(probs.tokens, probs.token_logprobs, probs.top_logprobs, strict=True):
        assert len(top) == 3 and max(top.values()) == pytest.approx(logprob, abs=1e-4)
        assert token == max(top, key=top.get), "greedy takes the most likely"


def test_a_stream_is_the_same_answer(client, server) -> None:
    whole = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0.8, seed=5, top_p=0.9)
    chunks = list(
        client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=24, temperature=0.8, seed=5, top_p=0.9, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *middle, last = chunks
    assert "".join(chunk.choices[0].text for chunk in middle) == whole.choices[0].text
    assert [one for chunk in middle for one in records(chunk.choices[0])] == records(whole.choices[0])
    assert middle[-1].choices[0].finish_reason == "length" and len(middle) > 12
    assert not last.choices and last.usage == whole.usage
    own = directly(server, PROMPT, 24, sampling=SamplingParams(False, 0.8, top_p=0.9, seed=5))
    assert [one["id"] for one in records(whole.choices[0])] == list(own.tokens[0])


@pytest.mark.parametrize(
    ("given", "mode", "policy"),
    [
        ({"mode": "full"}, "full", {}),
        ({"mode": "self_speculative", "threshold": 0.05, "num_draft_tokens": 3}, "self_speculative",
         {"threshold": 0.05, "num_draft_tokens": 3}),
        ({"mode": "static_depth", "exits": ["layer6-mlp"]}, "static_depth", {"active": ["layer6-mlp"]}),
        ({"threshold": {"layer3-mlp": 1.0, "layer6-mlp": 0.2, "layer9-mlp": 0.1}}, "early_exit",
         {"threshold": {"layer3-mlp": 1.0, "layer6-mlp": 0.2, "layer9-mlp": 0.1}}),
        ({"threshold": 2.5, "criterion": "entropy"}, "early_exit", {"threshold": 2.5, "criterion": "entropy"}),
    ],
    ids=["full", "self_speculative", "static_depth", "thresholds", "entropy"],
)  # fmt: skip
def test_each_mode(given: dict, mode: str, policy: dict, client, server) -> None:
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=16, temperature=0, extra_body={"early_exit": given}
    )
    own = directly(server, PROMPT, 16, mode=mode, **policy)
    assert [one["id"] for one in records(answer.choices[0])] == list(own.tokens[0])
    assert answer.usage.early_exit["mode"] == mode
    assert answer.usage.early_exit["tokens_per_exit"] == own.stats.tokens_per_exit


def test_chat_is_its_template_s_completion(client) -> None:
    messages = [{"role": "user", "content": "write a test"}]
    kind = {"model": "demo", "temperature": 0}
    chat = client.chat.completions.create(messages=messages, max_tokens=12, logprobs=True, top_logprobs=2, **kind)
    plain = client.completions.create(prompt="# user: write a test\n# assistant:", max_tokens=12, **kind)
    message = chat.choices[0].message
    assert message.content == plain.choices[0].text and message.role == "assistant"
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens
    assert "".join(one.token for one in chat.choices[0].logprobs.content) == message.content
    assert all(len(one.top_logprobs) == 2 for one in chat.choices[0].logprobs.content)
    stream = list(client.chat.completions.create(messages=messages, max_tokens=12, stream=True, **kind))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == message.content
    assert stream[-1].choices[0].finish_reason == "length"
    parts = [{"role": "user", "content": [{"type": "text", "text": "write a test"}]}]
    again = client.chat.completions.create(messages=parts, max_completion_tokens=12, **kind)
    assert again.choices[0].message.content == message.content
    with pytest.raises(openai.BadRequestError, match="system comes first"):
        client.chat.completions.create(messages=[*messages, {"role": "system", "content": "x"}], **kind)


def test_a_template_s_own_failures_stay_in_the_log(url: str, server, monkeypatch) -> None:
    """What a template says on purpose is told (above); what goes wrong in it is not."""

    def fail(*_, **__):
        raise TypeError("/a/path of the machine")

    monkeypatch.setattr(server.model.tokenizer, "apply_chat_template", fail)
    status, answer = post(url, {"messages": [{"role": "user", "content": "x"}]}, "/v1/chat/completions")
    assert status == 400 and answer["error"]["message"] == "the model's chat template fails on these messages"


def test_several_prompts_and_answers(client) -> None:
    """Two prompts with three answers each; the first prompt's are what it gets alone."""

    def ask(n: int, prompt):
        return client.completions.create(model="demo", prompt=prompt, max_tokens=8, n=n, seed=11, temperature=1.5)

    both = ask(3, ["import os\n", [5, 6, 7]])
    texts = [choice.text for choice in sorted(both.choices, key=lambda choice: choice.index)]
    assert len(set(texts[:3])) == 3
    assert texts[:2] == [choice.text for choice in ask(2, "import os\n").choices]
    assert texts == [choice.text for choice in ask(3, ["import os\n", [5, 6, 7]]).choices], "a seed repeats itself"
    assert both.usage.completion_tokens == 48


@pytest.mark.parametrize("seed", [None, 7])
def test_equal_prompts_of_a_request_have_random_numbers_of_their_own(seed, client) -> None:
    kind = {"model": "demo", "max_tokens": 16, "temperature": 1, "seed": seed}
    both = client.completions.create(prompt=[PROMPT, PROMPT], **kind)
    assert both.choices[0].text != both.choices[1].text
    if seed is not None:  # control: the same seed in requests of their own gives the same text
        assert both.choices[0].text == client.completions.create(prompt=PROMPT, **kind).choices[0].text


def test_stop_strings_end_an_answer_and_are_not_in_it(client) -> None:
    whole = client.completions.create(model="demo", prompt=PROMPT, max_tokens=32, temperature=0).choices[0].text
    stop = whole[len(whole) // 2 - 1 : len(whole) // 2 + 4]  # across tokens, most likely
    kept = whole[: whole.index(stop)]
    for stream in (False, True):
        answer = client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=32, temperature=0, stop=["never seen", stop], stream=stream
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == kept
        assert choices[-1].finish_reason == "stop"
        assert "".join(one["text"] for choice in choices for one in records(choice)) == kept


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b"\xff\xfe", 400, "UTF-8"),
        (b'{"prompt": "\\ud800"}', 400, "half a character"),
        (b'{"prompt": ' + b"[" * 100_000, 400, "nested too deeply"),
        (b'{"prompt": "x", "temperature": NaN}', 400, "NaN"),
        (b'{"prompt": "x", "temperature": -Infinity}', 400, "Infinity"),
        (b'{"prompt": "x", "temperature": 1e999}', 400, "too large"),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", 400, "64 bits"),
        (b'{"prompt": "' + b"x" * 1_100_000 + b'"}', 413, "larger than 1048576 bytes"),
        ({**GOOD, "prompt": ""}, 400, "none of them empty"),
        ({**GOOD, "prompt": []}, 400, "none of them empty"),
        ({**GOOD, "prompt": None}, 400, "prompt is needed and not given"),
        ({**GOOD, "prompt": [1, "x"]}, 400, "prompt=[1, 'x'] must be a text, token ids, or a list of either"),
        ({**GOOD, "prompt": [4096]}, 400, "outside the vocabulary 0..4095"),
        ({**GOOD, "prompt": [-1]}, 400, "outside the vocabulary"),
        ({**GOOD, "prompt": "x " * 3000}, 400, "more than the 1024 tokens"),
        ({**GOOD, "prompt": [5] * 1024}, 400, "1024 prompt tokens + max_tokens = 2 are more than the 1024 tokens a "
                                              "sequence may have here; shorten the prompt by at least 1 tokens"),
        ({**GOOD, "prompt": [5] * 1025, "max_tokens": 0, "echo": True}, 400, "the prompt by at least 1 tokens"),
        ({**GOOD, "prompt": [5] * 1020, "max_tokens": 5}, 400, "shorten the prompt or request at most 4 new tokens"),
        ({**GOOD, "max_tokens": 1022}, 200, ""),
        ({**GOOD, "max_tokens": 0}, 400, "max_tokens=0 needs echo = true"),
        ({**GOOD, "max_tokens": -5}, 400, "from 0 to 1024"),
        ({**GOOD, "max_tokens": 1.5}, 400, "whole number"),
        ({**GOOD, "max_tokens": True}, 400, "whole number"),
        ({**GOOD, "temperature": -1}, 400, "from 0 to 2"),
        ({**GOOD, "temperature": 1e-300}, 400, "greedy"),
        ({**GOOD, "top_p": 0}, 400, "top_p"),
        ({**GOOD, "n": 9}, 400, "from 1 to 8"),
        ({**GOOD, "prompt": ["a"] * 5, "n": 2}, 400, "with n=2 is more than 8 answers"),
        ({**GOOD, "stop": [""]}, 400, "stop"),
        ({**GOOD, "stop": 7}, 400, "stop"),
        ({**GOOD, "logprobs": 6}, 400, "from 0 to 5"),
        ({**GOOD, "logit_bias": {"4096": 1}}, 400, "logit_bias: token 4096 outside the vocabulary 0..4095"),
        ({**GOOD, "logit_bias": {"5": 101}}, 400, "logit_bias.5=101 must be a finite number from -100 to 100"),
        ({**GOOD, "stop_token_ids": [4096]}, 400, "stop_token_ids: token 4096 outside the vocabulary"),
        ({**GOOD, "min_tokens": 3}, 400, "min_tokens = 3 is more than max_tokens = 2"),
        ({**GOOD, "promtp": 1}, 400, "did you mean prompt?"),
        ({**GOOD, "model": "gpt-5"}, 404, "does not exist"),
        ({**GOOD, "early_exit": 0.8}, 400, "must be a block with the keys mode, threshold"),
        ({**GOOD, "early_exit": {"mode": "fast"}}, 400, "early_exit.mode='fast' must be one of early_exit"),
        ({**GOOD, "early_exit": {"treshold": 1}}, 400, "did you mean threshold?"),
        ({**GOOD, "early_exit": {"threshold": 1.5}}, 400, "in 0..1"),
        ({**GOOD, "early_exit": {"threshold": -0.1}}, 400, "in 0..1"),
        ({**GOOD, "early_exit": {"threshold": "high"}}, 400, "must be a finite number"),
        ({**GOOD, "early_exit": {"threshold": True}}, 400, "must be a finite number"),
        ({**GOOD, "early_exit": {"threshold": {"layer3-mlp": 0.5}}}, 400, "no number for the active exits"),
        ({**GOOD, "early_exit": {"exits": ["layer4-mlp"]}}, 400, "exits names 'layer4-mlp'"),
        ({**GOOD, "early_exit": {"exits": "layer3-mlp"}}, 400, "early_exit.exits='layer3-mlp' must be a list of"),
        ({**GOOD, "early_exit": {"mode": "static_depth"}}, 400, "reads from one exit"),
        ({**GOOD, "early_exit": {"max_pending_tokens": -1}}, 400, "max_pending_tokens"),
        ({**GOOD, "early_exit": {"mode": "full", "threshold": 0.5}}, 400, "does not use threshold"),
        ({**GOOD, "early_exit": {"threshold": 0.5, "certificate": "a"}}, 400, "a certificate sets all of them"),
        ({**GOOD, "early_exit": {"certificate": "a"}}, 400, "carries no certificate"),
        ({**GOOD, "temperature": -1, "n": 0}, 400, "n=0 must be a whole number from 1 to 8, or null; temperature=-1 "),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_error(body, status: int, words: str, url: str) -> None:
    if status == 200:  # control: the longest request that fits; cut short, for it is long
        body = {**body, "stop": ["e", "s", "i", "o", " ", "\n"]}
    got, answer = post(url, body)
    assert got == status, answer
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert words in answer["error"]["message"] and len(answer["error"]["message"]) < 500


def test_what_is_not_there_and_what_a_web_page_may_not_do(url: str) -> None:
    assert post(url, GOOD, "/v1/embeddings")[0] == 404
    assert post(url, GOOD, "/v1/models")[0] == 405
    assert post(url, GOOD, **{"content-type": "text/plain"})[0] == 415
    status, answer = post(url, GOOD, host="evil.example")
    assert status == 403 and "loopback" in answer["error"]["message"]
    status, answer = post(url, {"model": "demo", "messages": []}, "/v1/chat/completions")
    assert status == 400 and "must be a list of 1 to 1024" in answer["error"]["message"]


def test_a_full_queue_says_429_and_a_client_that_leaves_frees_its_slots(url: str, server) -> None:
    """Eight sequences of 900 tokens fill slots and queue; their clients leave; then the server is free again."""
    long = {"model": "demo", "prompt": "import", "max_tokens": 900, "temperature": 0, "n": 4}
    host, port = url.removeprefix("http://").split(":")
    sockets = []
    for stream in (False, True):
        data = json.dumps({**long, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        own = socket.create_connection((host, int(port)))
        own.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        sockets.append(own)

    def value(name: str) -> float:
        return server.metrics.registry.get_sample_value(name)

    def until(condition) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, server.metrics.text().decode()
            time.sleep(0.01)

    until(lambda: value("nemo_ee_running_sequences") == 4 and value("nemo_ee_queued_sequences") == 4)
    status, answer = post(url, {**GOOD, "n": 2})
    assert status == 429 and answer["error"]["type"] == "rate_limit_error"
    before = value("nemo_ee_cancelled_requests_total")
    for own in sockets:
        own.close()
    until(lambda: value("nemo_ee_running_sequences") == 0 and value("nemo_ee_queued_sequences") == 0)
    assert value("nemo_ee_cancelled_requests_total") == before + 2
    assert post(url, GOOD)[0] == 200


def test_a_client_that_leaves_while_it_sends(url: str, server) -> None:
    host, port = url.removeprefix("http://").split(":")
    kind = {"endpoint": "completions", "status": "499"}
    before = server.metrics.registry.get_sample_value("nemo_ee_requests_total", kind) or 0
    with socket.create_connection((host, int(port))) as own:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        own.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
        time.sleep(0.1)
    end = time.monotonic() + 10
    while (server.metrics.registry.get_sample_value("nemo_ee_requests_total", kind) or 0) == before:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_metrics_and_health(url: str, client) -> None:
    import urllib.request

    def fetch(path: str) -> str:
        return urllib.request.urlopen(url + path).read().decode()

    def tokens() -> float:
        lines = [line for line in fetch("/metrics").splitlines() if line.startswith("nemo_ee_tokens_total{")]
        assert len(lines) == len(EXITS) + 1
        return sum(float(line.split()[-1]) for line in lines)

    before = tokens()
    client.completions.create(model="demo", prompt="x", max_tokens=5, temperature=0, stop=["no such"])
    assert tokens() == before + 5
    assert json.loads(fetch("/health")) == {"status": "ok"}
    text = fetch("/metrics")
    for name in ("pending_tokens", "acceptance_rate", "tokens_per_second", "busy_seconds_total",
                 "request_seconds_bucket", "queued_sequences", "first_token_seconds_bucket",
                 "token_depth_layers_bucket"):  # fmt: skip
        assert f"nemo_ee_{name}" in text
