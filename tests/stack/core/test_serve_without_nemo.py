# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/server.md for a host without NeMo, in an environment that has what they install and no more."""

from __future__ import annotations

import importlib.util
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.served_model import CHAT_TEMPLATE, write_exported_model

ROOT = Path(__file__).parents[3]
ABSENT = ("nemo", "megatron", "lightning", "transformers", "matplotlib")
STARTS_WITHIN = 60.0  # seconds

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ABSENT), reason="for an environment without NeMo and transformers"
)


def documented_commands() -> list[str]:
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    section = page.split("## Serve without NeMo", 1)[1].split("\n## ", 1)[0]
    block = section.split("```bash\n", 1)[1].split("```", 1)[0]
    return [line for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("host")
    export = write_exported_model(folder / "export" / "hf_early_exit")
    (folder / "template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = shlex.split(documented_commands()[-1])
    assert command[1] == "examples/megatron_gpt_early_exit_serve.py" and command[2] == "model=export/hf_early_exit"
    given = [sys.executable, ROOT / command[1], f"model={export}", f"port={port}", "chat_template=template.jinja"]
    # Another folder, and no PYTHONPATH: nemo_ee is the installed one.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    log = folder / "server.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(given, cwd=folder, env=environment, stdout=output, stderr=output) as server,
    ):
        try:
            end = time.monotonic() + STARTS_WITHIN
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    assert server.poll() is None, log.read_text()
                    assert time.monotonic() < end, "the server did not start"
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def test_the_installed_package_is_complete() -> None:
    """The documented installation has no NeMo, and every file that the package needs."""
    assert any(command.endswith("pip install '.[serving]'") for command in documented_commands())
    found = subprocess.run(
        [sys.executable, "-c", "import nemo_ee; print(nemo_ee.__file__)"], cwd="/", capture_output=True, text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert "site-packages" in found.stdout, found.stderr
    assert (Path(found.stdout.strip()).parent / "serving" / "page.html").is_file()


def test_a_chat_is_completed(url: str) -> None:
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="hf_early_exit",
            messages=[{"role": "user", "content": "Write a function that adds two numbers."}],
            max_tokens=8,
            temperature=0,
            extra_body={"early_exit": {"mode": "self_speculative", "threshold": 0.2}},
        )
        full = client.chat.completions.create(
            model="hf_early_exit",
            messages=[{"role": "user", "content": "Write a function that adds two numbers."}],
            max_tokens=8,
            temperature=0,
        )
    assert answer.usage.completion_tokens == 8 and answer.choices[0].message.content
    assert answer.choices[0].message.content == full.choices[0].message.content


def test_the_page_and_the_schema_are_there(url: str) -> None:
    for path in ("/", "/docs", "/openapi.json", "/metrics"):
        assert urllib.request.urlopen(url + path, timeout=10).status == 200
