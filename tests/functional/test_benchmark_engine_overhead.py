# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/engine_overhead.py` with few tokens: the numbers arrive. What they are is not looked at.

Its baseline decodes what transformers decodes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.plain_decoding import REFERENCE_MODEL, PlainDecoder

ROOT = Path(__file__).parents[2]


def test_its_numbers_are_printed_and_written(tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "engine_overhead.py"), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    names = [name for name in found if name.endswith("_us")]
    assert len(names) == 10 and {"cpu", "commit", "vocab_size", "full_share", "plain_loop_us"} <= found.keys()
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in names:
        assert found[name] > 0 and f"{name} {found[name]:.1f}" in done.stdout
    assert "benchmarks/engine_overhead.py" in text


def test_the_plain_loop_is_the_reference_model() -> None:
    """Token for token `generate` of transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(REFERENCE_MODEL, torch_dtype=torch.float32)
    prompt = [300, 17, 982, 5]
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    decoder, tokens = PlainDecoder(), list(prompt)
    tokens.append(decoder.next_token(prompt, 0))
    while len(tokens) < len(prompt) + 24:
        tokens.append(decoder.next_token(tokens[-1:], len(tokens) - 1))
    assert tokens == ids[0].tolist() and len(set(tokens)) > 8
