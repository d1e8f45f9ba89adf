# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""experiments/smollm2_on_gpu.py on the CPU, with a tiny GGUF model: numbers, and exits that load with the model."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gguf")

from nemo_ee.checkpoint.exits_file import stored_exits
from nemo_ee.checkpoint.gguf_source import GgufSource
from tests.helpers.gguf_files import write_gguf
from tests.helpers.gguf_tokenizers import tokenizer_and_metadata
from tests.helpers.huggingface_models import save_tiny_model
from tests.helpers.megatron_models import write_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run, the model beside it."""
    work = tmp_path_factory.mktemp("smollm2")
    metadata = tokenizer_and_metadata(work / "hf", "qwen")
    sizes = {"num_hidden_layers": 6, "vocab_size": len(metadata["tokenizer.ggml.tokens"])}
    write_gguf(work / "tiny.gguf", save_tiny_model(work / "hf", "llama", **sizes), tokenizer=metadata)
    for name in ("documents", "held-out"):
        write_data(work / name, [[5, 71, 13, 9, 0, 44] * 12] * 4)
    output = work / "out"
    output.mkdir()
    turns = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A test of words. " * 6}]
    with gzip.open(output / "chats.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write((json.dumps({"messages": turns}) + "\n") * 30)
    command = [sys.executable, str(ROOT / "experiments" / "smollm2_on_gpu.py"), "--gguf", str(work / "tiny.gguf"),
               "--documents", str(work / "documents"), "--held-out", str(work / "held-out"), "--output", str(output),
               "--device", "cpu", "--quick"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


def test_every_exit_has_numbers_on_both_texts(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["quick"] and result["steps"] == 2 and result["tokens"] == 2 * 2 * 16
    rows = {(row["run"], row["text"], row["name"]): row for row in result["rows"]}
    names = {"layer5-norm", "layer5-mlp", "layer5-layer"}
    texts = ("chats", "documents")
    assert rows.keys() == {(run, text, name) for run in texts for text in texts for name in names}
    assert all(row["loss"] != row["loss_before"] for row in rows.values()), "steps were made"
    assert len({row["full_loss"] for row in rows.values()}) == 2, "one for each text"


@pytest.mark.parametrize("name", ["chats", "documents"])
def test_the_exits_are_tuned_and_those_of_the_model(folder: Path, name: str) -> None:
    """`stored_exits` refuses exits of another backbone; a tuned one is no longer a copy."""
    source = GgufSource(folder.parent / "tiny.gguf")
    with stored_exits(folder / f"{name}.nemo", source) as (block, exits):
        assert [exit["name"] for exit in block["exits"]] == ["layer5-norm", "layer5-mlp", "layer5-layer"]
        info = exits.keys()["layer5-mlp.mlp.linear_fc2.weight"]
        tuned = exits.read("layer5-mlp.mlp.linear_fc2.weight", (0, 0), info.shape)
        copied = source.read("decoder.layers.mlp.linear_fc2.weight", (4, 0, 0), (1, *info.shape))[0]
        assert tuned.shape == copied.shape and not tuned.equal(copied)
        assert (tuned - copied).abs().max() < 0.02
