# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The on-policy script, killed and resumed, and its comparison with offline distillation, with a tiny GGUF model."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")

from nemo_ee.checkpoint.exits_file import stored_exits
from nemo_ee.checkpoint.gguf_source import GgufSource
from tests.helpers.gguf_files import write_gguf
from tests.helpers.gguf_tokenizers import tokenizer_and_metadata
from tests.helpers.huggingface_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
CHAT = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A test of words."}]
SMALL = ["--rounds", "6", "--steps", "2", "--answers", "2", "--tokens-per-step", "256", "--new-tokens", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("on_policy")
    metadata = tokenizer_and_metadata(work / "hf", "qwen")
    sizes = {"num_hidden_layers": 3, "vocab_size": len(metadata["tokenizer.ggml.tokens"])}
    sizes["max_position_embeddings"] = 256
    write_gguf(work / "tiny.gguf", save_tiny_model(work / "hf", "llama", **sizes), tokenizer=metadata)
    return work / "tiny.gguf"


@pytest.fixture(scope="module")
def compared(model: Path) -> Path:
    """The output of the comparison."""
    output = model.parent / "compared"
    output.mkdir()
    for name, count in (("prompts", 12), ("held-out", 2)):
        lines = [json.dumps({"messages": [{**CHAT[0], "content": f"{name} {n}"}, CHAT[1]]}) for n in range(count)]
        (output / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    with gzip.open(model.parent / "documents.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write((json.dumps({"text": "A document of words. " * 40}) + "\n") * 3)
    command = [sys.executable, str(ROOT / "experiments" / "on_policy.py"), "--gguf", str(model), "--documents",
               str(model.parent / "documents.jsonl.gz"), "--output", str(output), "--seeds", "1", *SMALL]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "on_policy_over_offline_accepted" in done.stdout and "target of the first: 1.15" in done.stdout
    return output


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def exit_weights(file: Path, model: Path) -> dict[str, torch.Tensor]:
    with stored_exits(file, GgufSource(model, dequantised=torch.bfloat16)) as (_, weights):
        return {key: weights.read(key, (0,) * len(one.shape), one.shape) for key, one in weights.keys().items()}


def test_the_runs_are_compared_at_equal_tokens(compared: Path) -> None:
    result = json.loads((compared / "result.json").read_text(encoding="utf-8"))
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == ["start", "on_policy", "own_answers", "documents", "imitation"]
    tokens = rows["on_policy"]["tokens"]
    assert tokens == sum(one["tuned_tokens"] for one in rows["on_policy"]["rounds"]) > 0
    for arm in ("own_answers", "documents"):
        assert abs(rows[arm]["tokens"] - tokens) <= 128, "a step at most"
    assert [("expected_accepted" in one) for one in rows["on_policy"]["rounds"]] == [False] * 5 + [True]
    assert not any("expected_accepted" in one for one in rows["imitation"]["rounds"])
    assert rows["imitation"]["rounds"][:5] == rows["on_policy"]["rounds"][:5], "the same until the reward"
    found = {arm: row["accepted"] for arm, row in rows.items()}
    assert found["documents"] and found["start"] != found["on_policy"]
    assert result["on_policy_over_offline_accepted"] == pytest.approx(found["on_policy"] / found["documents"])
    assert result["imitation_over_own_answers"] == pytest.approx(found["imitation"] / found["own_answers"])


def test_a_killed_script_ends_with_the_same_exit(model: Path, compared: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as the first round is kept; the same command then ends as the run of the comparison."""
    values = {
        "source": model, "gguf_dtype": "bfloat16", "exits": compared / "start.nemo", "output": tmp_path / "new.nemo",
        "prompts": compared / "prompts.jsonl", "folder": tmp_path / "rounds", "rounds": 6, "steps_per_round": 2,
        "tokens_per_step": 256, "seed": 1, "answers.prompts_per_round": 2, "answers.max_new_tokens": 6,
        "trainer.accelerator": "cpu", "hydra.run.dir": ".",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "examples" / "megatron_gpt_early_exit_on_policy.py")]
    command += [f"{key}='{value}'" if isinstance(value, Path) else f"{key}={value}" for key, value in values.items()]
    killed = subprocess.Popen(command, env=environment(), cwd=tmp_path, stderr=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE)  # fmt: skip
    end = time.monotonic() + 300
    while not list((tmp_path / "rounds").glob("round-0000[1-9]")) and killed.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "new.nemo").exists()
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "done" in done.stdout.splitlines()[0] and "round 0 of 6" not in done.stdout, done.stdout
    ours, theirs = (exit_weights(file, model) for file in (tmp_path / "new.nemo", compared / "on_policy-1.nemo"))
    start = exit_weights(compared / "start.nemo", model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(not torch.equal(ours[key], start[key]) for key in ours), "control: it was tuned"
    for wrong, message in (("exit=late", "exit=late is not in"), ("rounds=0", "rounds=0 must")):
        done = subprocess.run([*command, wrong], env=environment(), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert message in done.stderr
