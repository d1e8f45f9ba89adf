# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The server beside the bare engine, and what long prompts do to the answers that run.

    python benchmarks/serving.py export/hf_early_exit --json serving.json

The model computes in one thread, full depth, greedy. The server is a process of its own; the engine and the clients,
which read streams, take turns in this one. Prompts are the first tokens of held-out files.

    server_over_engine_1, _16       tokens/s of so many clients at once through HTTP over the engine, same prompts;
                                    `loop_ms_per_token_*`: CPU time of the server's event loop, which hardly depends on
                                    other work of the machine
    server_gap_p99_over_median      with eight answers running, time between two tokens of an answer while two prompts
                                    of --long tokens arrive, 99th percentile, over the median of the same tokens where
                                    none arrives; `whole`: the same with prompt_share=null
    first_token_s                   of the long prompts, the median; `whole`: the same with prompt_share=null
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.huggingface import read_prompts  # noqa: E402
from benchmarks.measure import interleaved, median_of_ratios, provenance  # noqa: E402
from nemo_ee.generation.engine import EarlyExitEngine  # noqa: E402
from nemo_ee.runtime.loader import load_model, load_tokenizer  # noqa: E402

CLIENTS, ANSWERS = (1, 16), 8
QUIET = 2.0  # seconds before the first long prompt
TARGETS = dict.fromkeys(("server_over_engine_1", "server_over_engine_16"), 0.95)  # at least


class RunningServer(AbstractContextManager):
    """`megatron_gpt_early_exit_serve.py` on a free port.

    Args:
        model: the directory.
        overrides: of the script.
    """

    def __init__(self, model: Path, *overrides: str) -> None:
        self._log = tempfile.TemporaryFile("w+")
        script = ROOT / "examples" / "megatron_gpt_early_exit_serve.py"
        self._process = subprocess.Popen(
            [sys.executable, script, f"model='{model.resolve()}'", "name=model", "port=0", "mode=full",
             "num_threads=1", "max_new_tokens=8192", f"num_slots={max(CLIENTS)}", *overrides],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=self._log, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            self.port = self._wait()
        except BaseException:
            self.__exit__()
            raise

    def _wait(self) -> int:
        end = time.monotonic() + 300
        while time.monotonic() < end and self._process.poll() is None:
            self._log.seek(0)
            for line in self._log:
                if "http://127.0.0.1:" in line:
                    return int(line.split("http://127.0.0.1:")[1].split("/")[0].split()[0].rstrip(".,;"))
            time.sleep(0.1)
        self._log.seek(0)
        raise RuntimeError(f"the server did not start: {self._log.read()[-2000:]}")

    def loop_seconds(self) -> float:
        """CPU time of the event loop, the main thread of the process, so far."""
        task = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/schedstat")
        return int(task.read_text().split()[0]) / 1e9

    def token_times(self, prompt: Sequence[int], new_tokens: int) -> list[float]:
        """When each piece of an answer arrived.

        Raises:
            RuntimeError: the answer ended early.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        body = {"model": "model", "prompt": list(prompt), "max_tokens": new_tokens, "temperature": 0, "stream": True,
                "ignore_eos": True, "stream_options": {"include_usage": True}}  # fmt: skip
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        times, used = [], 0
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if chunk["choices"]:
                    times += [time.perf_counter()] * len(chunk["choices"][0]["early_exit"]["tokens"])
                used = (chunk.get("usage") or {}).get("completion_tokens", used)
        connection.close()
        if used != new_tokens or len(times) != new_tokens:
            raise RuntimeError(f"{used} tokens, {len(times)} times, of {new_tokens}")
        return times

    def answer_all(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
        """`token_times` of several clients at once."""
        times: list[list[float]] = [[] for _ in prompts]

        def read(index: int) -> None:
            times[index] = self.token_times(prompts[index], new_tokens)

        threads = [threading.Thread(target=read, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not all(times):
            raise RuntimeError("a client got no answer")
        return times

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._log.close()


def against_engine(
    server: RunningServer, model: Path, prompts: Sequence[Sequence[int]], new_tokens: int, rounds: int
) -> dict[str, float]:
    """`server_over_engine_*`."""
    engine = EarlyExitEngine(load_model(model))
    values = {}
    for clients in CLIENTS:
        own = prompts[:clients]
        sides = {
            "server": partial(server.answer_all, own, new_tokens),
            "engine": partial(engine.generate, own, max_new_tokens=new_tokens, mode="full"),
        }
        interleaved(sides, rounds=0)  # the warm-up, so that every token below counts
        before = server.loop_seconds()
        times = interleaved(sides, rounds=rounds, warmup=0)
        spent = server.loop_seconds() - before
        values[f"loop_ms_per_token_{clients}"] = 1000 * spent / (rounds * clients * new_tokens)
        values[f"server_over_engine_{clients}"] = median_of_ratios(times["engine"], times["server"])
        for name, taken in times.items():
            values[f"{name}_tokens_per_second_{clients}"] = clients * new_tokens / median(taken)
    return values


def gaps(
    server: RunningServer, prompts: Sequence[Sequence[int]], long: Sequence[Sequence[int]], new_tokens: int
) -> dict[str, float]:
    """Times between tokens of running answers while long prompts arrive, and of the same tokens where none does."""
    waits, span = [], [0.0, 0.0]

    def arrive() -> None:
        time.sleep(QUIET)
        span[0] = time.perf_counter()
        for prompt in long:
            begin = time.perf_counter()
            waits.append(server.token_times(prompt, 1)[0] - begin)
        span[1] = time.perf_counter()

    quiet = server.answer_all(prompts[:ANSWERS], new_tokens)
    arriving = threading.Thread(target=arrive)
    arriving.start()
    answers = server.answer_all(prompts[:ANSWERS], new_tokens)
    arriving.join()
    if len(waits) != len(long) or min(own[-1] for own in answers) < span[1]:
        raise RuntimeError("an answer ended before the last long prompt; give more --gap-tokens")
    without, beside = [], []
    for alone, own in zip(quiet, answers, strict=True):
        for index in range(1, new_tokens):
            if span[0] < own[index] and own[index - 1] < span[1]:
                beside.append(own[index] - own[index - 1])
                without.append(alone[index] - alone[index - 1])
    return {
        "gap_median_s": median(without),
        "gap_p99_without_prompts_s": quantiles(without, n=100, method="inclusive")[98],
        "gap_median_beside_prompts_s": median(beside),
        "gap_p99_s": quantiles(beside, n=100, method="inclusive")[98],
        "gap_longest_s": max(beside),
        "first_token_s": median(waits),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers, flat."""
    tokenizer = load_tokenizer(options.model)
    prompts = read_prompts(tokenizer, max(CLIENTS), options.prompt_tokens)
    long = read_prompts(tokenizer, 2, options.long)
    values: dict[str, Any] = {"machine": provenance(), "lengths": {
        name: getattr(options, name) for name in ("prompt_tokens", "new_tokens", "long", "gap_tokens", "rounds")
    }}  # fmt: skip
    with RunningServer(options.model) as server:
        values |= against_engine(server, options.model, prompts, options.new_tokens, options.rounds)
        found = gaps(server, prompts, long, options.gap_tokens)
    with RunningServer(options.model, "prompt_share=null") as server:
        whole = gaps(server, prompts, long, options.gap_tokens)
    values["server_gap_p99_over_median"] = found["gap_p99_s"] / found["gap_median_s"]
    values["server_gap_p99_over_median.whole"] = whole["gap_p99_s"] / whole["gap_median_s"]
    return {**values, **found, **{f"{name}.whole": value for name, value in whole.items()}}


def main() -> None:
    """Measure, print, and with --json write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a directory that the server takes")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--long", type=int, default=2000, help="tokens of a long prompt")
    parser.add_argument("--gap-tokens", type=int, default=600, help="tokens of the answers beside long prompts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    values = measure(options)
    print(json.dumps(values, indent=2))
    for name, target in TARGETS.items():
        clients = name.rsplit("_", 1)[1]
        server, engine = (values[f"{side}_tokens_per_second_{clients}"] for side in ("server", "engine"))
        met = "met" if values[name] >= target else "MISSED"
        print(
            f"{name} {values[name]:.3f}, target >= {target}, {met} (server {server:.1f}, engine {engine:.1f} tokens/s)"
        )
    if options.json:
        options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
