# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The reference model exported with its tokenizer, and `benchmarks/huggingface.py` on it: the numbers arrive.

What they are is not looked at, but for the tokens, which are the same whoever decodes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nemo")

from nemo_ee.runtime.loader import load_tokenizer
from tests.functional.test_export_huggingface import export
from tests.helpers.megatron_models import (
    REFERENCE_MODEL,
    ROOT,
    exit_entry,
    model_from_hugging_face,
    user_environment,
)

EXIT = exit_entry(9, "mlp")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    model = model_from_hugging_face(REFERENCE_MODEL, [EXIT])
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    model.bundled_files = {f"tokenizer/{name}": REFERENCE_MODEL / name for name in names}
    model.save_to(str(folder / "model.nemo"))
    return export(folder / "model.nemo", folder / "out", dtype="bfloat16")


def test_every_directory_has_the_tokenizer(exported: Path) -> None:
    text = "def main(path):\n    return 1\n"
    expected = load_tokenizer(REFERENCE_MODEL)(text)["input_ids"]
    for folder in exported.glob("hf_*"):
        tokenizer = load_tokenizer(folder)
        assert tokenizer(text)["input_ids"] == expected and tokenizer.decode(expected) == text


def test_its_numbers_are_printed_and_written(exported: Path, tmp_path: Path) -> None:
    file = tmp_path / "huggingface.json"
    sizes = "--prompts 2 --prompt-tokens 12 --new-tokens 8".split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "huggingface.py"), str(exported), *sizes, "--json", str(file)],
        capture_output=True, text=True, timeout=300, env=user_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found, text = json.loads(file.read_text()), (ROOT / "docs" / "benchmarks.md").read_text()
    assert {"cpu", "commit", "new_tokens", "generate.tokens_per_cpu_s"} <= found.keys()
    for name in ("runtime_over_generate", "loop_over_generate", f"assisted.{EXIT['name']}"):
        assert found[name] > 0 and found[f"{name}.same_tokens"] == 1.0 and f"{name} {found[name]:.2f}" in done.stdout
    assert 1 <= found[f"assisted.{EXIT['name']}.tokens_per_pass"] <= 5
    assert all(f"`{name}`" in text for name in ("runtime_over_generate", "loop_over_generate", "assisted.<exit>"))
