# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`make demo-chat` up to the server, on a tiny GGUF file with exits of its own; and what it says about wrong files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nemo")
pytest.importorskip("gguf")

from tests.helpers.gguf_files import write_gguf
from tests.helpers.gguf_tokenizers import tokenizer_and_metadata
from tests.helpers.huggingface_models import save_tiny_model
from tests.helpers.megatron_models import user_environment
from tests.helpers.nemo_files import restore

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=user_environment())


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    metadata = tokenizer_and_metadata(folder / "hf", "gpt2")
    # Multiples of 32, the length of the blocks of Q4_1.
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
    model = save_tiny_model(folder / "hf", "llama", vocab_size=len(metadata["tokenizer.ggml.tokens"]), **sizes)
    return write_gguf(folder / "model.gguf", model, kind="Q4_1", tokenizer=metadata)


@pytest.fixture(scope="module")
def exits(gguf: Path) -> Path:
    whole, alone = gguf.with_name("ee.nemo"), gguf.with_name("exits.nemo")
    given = [f"source={gguf}", f"output={whole}", "trainer.accelerator=cpu", "gguf_dtype=bfloat16"]
    given += ["model.early_exit.exits=[{layer: 1, name: mine, output: shared}]", f"hydra.run.dir={gguf.parent}"]
    done = run("megatron_gpt_early_exit_convert.py", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    restore(whole, exits_only=True).save_to(str(alone))
    return alone


def test_the_exits_are_attached_and_exported(gguf: Path, exits: Path, tmp_path: Path) -> None:
    given = ["--output", str(tmp_path), "--gguf", str(gguf), "--exits", str(exits), "--port", "0"]
    done = run("run_demo_chat.py", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    export = tmp_path / "export"
    config = json.loads((export / "hf_early_exit" / "config.json").read_text())
    assert [exit["name"] for exit in config["early_exit"]["exits"]] == ["mine"] and config["torch_dtype"] == "bfloat16"
    before = (export / "manifest.json").stat().st_mtime_ns
    assert run("run_demo_chat.py", *given).returncode == 0
    assert (export / "manifest.json").stat().st_mtime_ns == before, "a second run only serves"


def test_files_that_do_not_fit(gguf: Path, tmp_path: Path) -> None:
    done = run("run_demo_chat.py", "--output", str(tmp_path), "--exits", str(tmp_path / "none.nemo"), "--port", "0")
    assert done.returncode == 1 and "none.nemo does not exist" in done.stderr
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(gguf.read_bytes())
    done = run("run_demo_chat.py", "--output", str(tmp_path), "--exits", str(gguf), "--port", "0")
    assert done.returncode == 1 and "delete it and start again" in done.stderr
