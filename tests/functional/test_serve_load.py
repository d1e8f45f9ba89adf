# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""200 requests from 16 clients at once, streamed and not, some cancelled, some malformed: none is lost, and each
answer is what the engine gives to that request alone. Also the script itself: it starts, refuses, and ends gracefully.

Tokens and exits are compared exactly; where two answers part, the decision must have hung on less than 1e-4 (batches
round differently), and at most one answer in a hundred may do so.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.generation.session import DecodingSession
from nemo_ee.serving.serve import make_server
from nemo_ee.serving.settings import ServerSettings
from tests.helpers.served_model import ROOT, running, serve_config, write_exported_model

NUM_REQUESTS, NUM_CLIENTS = 200, 16
PROMPTS = ("def test_add(self):\n", "import os", "class A:\n    def __init__(self, x", "for i in range(", "x = [1, ")
MODES = ("early_exit", "early_exit", "self_speculative", "full", "static_depth")


@dataclass(frozen=True)
class Asked:
    """A request that is good."""

    prompt: str
    tokens: int
    mode: str
    threshold: float
    temperature: float
    seed: int

    def body(self) -> dict:
        early_exit: dict = {"mode": self.mode}
        if self.mode in ("early_exit", "self_speculative"):
            cap = "max_pending_tokens" if self.mode == "early_exit" else "num_draft_tokens"
            early_exit |= {"threshold": self.threshold, cap: 4}
        if self.mode == "static_depth":
            early_exit |= {"exits": ["layer9-mlp"]}
        return {"model": "demo", "prompt": self.prompt, "max_tokens": self.tokens, "seed": self.seed,
                "temperature": self.temperature, "extra_body": {"early_exit": early_exit}}  # fmt: skip

    def alone(self, server) -> list[tuple[int, str, float, float]]:
        """(token, exit, confidence, ln p) of each token, from the engine itself."""
        greedy = self.temperature == 0
        sampling = SamplingParams(greedy, 1.0 if greedy else self.temperature, seed=self.seed)
        active = ("layer9-mlp",) if self.mode == "static_depth" else None
        result = EarlyExitEngine(server.model.model).generate(
            [server.model.tokenizer(self.prompt)["input_ids"]],
            max_new_tokens=self.tokens,
            mode=self.mode,
            policy=ExitPolicy(self.threshold, active=active, max_pending_tokens=4, num_draft_tokens=4),
            sampling=sampling,
            stop_tokens=server.model.stop_tokens,
        )
        return [(event.token, event.exit or "final", event.confidence, event.logprob) for event in result.events]


def good_requests(count: int, seed: int) -> list[Asked]:
    chosen = random.Random(seed)
    return [
        Asked(
            chosen.choice(PROMPTS),
            chosen.randint(1, 14),
            chosen.choice(MODES),
            chosen.choice((0.05, 0.1, 0.3)),
            chosen.choice((0, 0, 0.9)),
            chosen.randint(0, 9),
        )
        for _ in range(count)
    ]


def parts(got: list[dict], alone: list[tuple[int, str, float, float]], asked: Asked) -> bool:
    """Whether an answer leaves that of the request alone where a decision was close; anything else fails."""
    for own, (token, exit, confidence, _) in zip(got, alone, strict=False):
        if own["id"] != token or own["exit"] != exit:
            close = abs(own["confidence"] - asked.threshold) < 1e-4 or abs(confidence - asked.threshold) < 1e-4
            assert close or abs(own["logprob"] - dict(own["top"]).get(token, -99.0)) < 1e-4, (asked, own, token, exit)
            return True
    assert len(got) == len(alone), asked
    return False


class Clients:
    """What 16 clients do and how it ends."""

    def __init__(self, url: str, expected: dict[Asked, list]) -> None:
        self.expected, self.outcomes, self.seconds = expected, Counter(), []
        self.lock = threading.Lock()
        self.clients = [openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) for _ in range(NUM_CLIENTS)]

    def do(self, number: int, asked: Asked) -> None:
        client, kind = self.clients[number % NUM_CLIENTS], number % 10
        started = time.monotonic()
        if kind == 7:
            outcome = self.malformed(client, asked, number)
        elif kind == 3:
            outcome = self.cancelled(client, asked)
        else:
            outcome = self.good(client, asked, stream=kind % 2 == 0)
        with self.lock:
            self.outcomes[outcome] += 1
            if outcome in ("same", "close"):
                self.seconds.append(time.monotonic() - started)

    def good(self, client, asked: Asked, stream: bool) -> str:
        answer = client.completions.create(**asked.body(), stream=stream, logprobs=5)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        told = [one for choice in choices for one in choice.early_exit["tokens"]]
        logprobs = [value for choice in choices for value in choice.logprobs.token_logprobs]
        assert "".join(choice.text for choice in choices) == "".join(one["text"] for one in told)
        ids = {one["text"]: one["id"] for one in told}
        top = [{ids.get(text, -1): value for text, value in own.items()} for choice in choices
               for own in choice.logprobs.top_logprobs]  # fmt: skip
        got = [one | {"logprob": value, "top": tuple(own.items())}
               for one, value, own in zip(told, logprobs, top, strict=True)]  # fmt: skip
        return "close" if parts(got, self.expected[asked], asked) else "same"

    def cancelled(self, client, asked: Asked) -> str:
        stream = client.completions.create(**asked.body() | {"max_tokens": 500}, stream=True)
        next(iter(stream))
        stream.close()
        return "cancelled"

    def malformed(self, client, asked: Asked, number: int) -> str:
        wrong = [{"temperature": -1}, {"max_tokens": 0}, {"prompt": ""}, {"extra_body": {"early_exit": {"mode": "x"}}}]
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**asked.body() | wrong[number // 10 % len(wrong)])
        return "refused"


def test_200_requests_from_16_clients(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_exported_model(tmp_path / "hf_early_exit")
    server = make_server(ServerSettings.from_config(serve_config(model, num_slots=6, max_queue=NUM_REQUESTS)))
    distinct = good_requests(40, seed=1)
    expected = {asked: asked.alone(server) for asked in distinct}
    assert len({exit for own in expected.values() for _, exit, _, _ in own}) == 4, "every exit is used"
    control = expected[distinct[0]] != expected[next(a for a in distinct if a.prompt != distinct[0].prompt)]
    assert control, "different requests have different answers"
    together: Counter[int] = Counter()
    step = DecodingSession.step

    def counted(session, max_prompt_tokens=None):
        together[6 - session.num_free_slots] += 1
        return step(session, max_prompt_tokens)

    monkeypatch.setattr(DecodingSession, "step", counted)
    with running(server) as url:
        clients = Clients(url, expected)
        with ThreadPoolExecutor(NUM_CLIENTS) as threads:
            tasks = [threads.submit(clients.do, n, distinct[n % len(distinct)]) for n in range(NUM_REQUESTS)]
            for task in tasks:
                task.result()
        end = time.monotonic() + 20
        while server.metrics.registry.get_sample_value("nemo_ee_running_sequences"):
            assert time.monotonic() < end, "a cancelled sequence still runs"
            time.sleep(0.01)
    assert max(together) == 6 and together[1] < together.total(), "sequences run together, or this shows little"
    assert clients.outcomes.total() == NUM_REQUESTS
    assert clients.outcomes["cancelled"] == clients.outcomes["refused"] == 20
    assert clients.outcomes["close"] <= NUM_REQUESTS // 100
    value = server.metrics.registry.get_sample_value
    good = value("nemo_ee_requests_total", {"endpoint": "completions", "status": "200"})
    assert good + value("nemo_ee_requests_total", {"endpoint": "completions", "status": "400"}) == NUM_REQUESTS
    p50, p95 = (statistics.quantiles(clients.seconds, n=100)[i] for i in (49, 94))
    with capsys.disabled():
        sys.stdout.write(f"\n[{dict(clients.outcomes)}, p50 {p50:.2f} s, p95 {p95:.2f} s] ")


def test_the_script_starts_refuses_and_ends_gracefully(tmp_path: Path) -> None:
    """SIGTERM while an answer is streamed: the answer comes to its end, then the process ends with 0."""
    script = ROOT / "examples" / "megatron_gpt_early_exit_serve.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "OMP_NUM_THREADS": "1"}

    def command(*overrides: str) -> list[str]:
        return [sys.executable, str(script), *overrides]

    refused = subprocess.run(
        command("model=tuned.nemo", "host=0.0.0.0"), env=environment, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "export_huggingface.py" in refused.stderr and "no API key" in refused.stderr
    model = write_exported_model(tmp_path / "hf_early_exit")
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command(f"model={model}", "port=0"), env=environment, stdout=output, stderr=output)
    try:
        end = time.monotonic() + 120
        while "running on" not in (text := log.read_text()).lower():
            assert process.poll() is None and time.monotonic() < end, text
            time.sleep(0.1)
        url = next(word for word in text.split() if word.startswith("http://"))
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(
                model="hf_early_exit", prompt="import", max_tokens=300, temperature=0, stream=True
            )
            chunks = [next(iter(stream))]
            process.send_signal(signal.SIGTERM)
            chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
