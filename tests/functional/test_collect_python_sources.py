# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""scripts/data/collect_python_sources.py on made-up distributions: what is taken is what their licences allow."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "conf" / "collect_python_sources.yaml"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts" / "data"))
    try:
        import collect_python_sources

        yield collect_python_sources
    finally:
        sys.path.remove(str(ROOT / "scripts" / "data"))


def code(name: str, lines: int = 20) -> str:
    return "".join(f"def {name}_{'x' * i}(value):\n    return value\n" for i in range(lines))


def distribution(folder: Path, name: str, metadata: list[str], files: dict[str, str | bytes]) -> None:
    """A distribution as an installer leaves it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    header = ["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *metadata]
    (info / "METADATA").write_text("\n".join(header) + "\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where made-up distributions are the installed ones."""
    folder = tmp_path / "site-packages"
    finder = importlib.metadata.MetadataPathFinder
    context = importlib.metadata.DistributionFinder.Context(path=[str(folder)])
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: finder.find_distributions(context))
    return folder


def collect(script: ModuleType, folder: Path, **changed: Any) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """(records of the training texts by source, the list of sources)."""
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIG))
    mapping = {key: value for key, value in defaults.items() if key not in ("hydra", "defaults")}
    output = folder / "out.jsonl"
    changed = {"output": str(output), "library": False, "excluded": [], **changed}
    report = script.collect(script.CollectConfig.from_config({**mapping, **changed}))
    assert json.loads((folder / "out.jsonl.sources.json").read_text()) == report
    assert not list(folder.glob("*.partial"))
    return {record["source"]: record for record in map(json.loads, output.read_text().splitlines())}, report


@pytest.mark.parametrize(
    ("metadata", "taken"),
    [
        (["License-Expression: MIT"], True),
        (["License-Expression: Apache-2.0 WITH LLVM-exception AND (BSD-2-Clause OR ISC)"], True),
        (["License-Expression: MPL-2.0 AND MIT"], False),
        (["Classifier: License :: OSI Approved :: BSD License", "License: see LICENSE"], True),
        (["Classifier: License :: OSI Approved :: MIT License", "Classifier: License :: OSI Approved :: GPL"], False),
        (["License: 3-Clause BSD License"], True),
        (["License: MIT License", "License-Expression: GPL-3.0-only"], False),
        (["License: MPL-2.0 AND MIT"], False),
        (["Classifier: License :: OSI Approved"], False),
        ([], False),
    ],
)
def test_every_licence_must_be_on_the_list(
    script: ModuleType, environment: Path, tmp_path: Path, metadata: list[str], taken: bool
) -> None:
    distribution(environment, "one", metadata, {"one/a.py": code("a")})
    records, report = collect(script, tmp_path)
    assert list(records) == (["one/a.py"] if taken else []) and list(report["training"]) == (["one"] if taken else [])
    if taken:
        size = len(code("a").encode())
        assert records["one/a.py"]["text"] == code("a") and records["one/a.py"]["distribution"] == "one"
        assert report["training"]["one"] == {"licence": records["one/a.py"]["licence"], "files": 1, "bytes": size}


def test_what_is_left_out_of_a_distribution(script: ModuleType, environment: Path, tmp_path: Path) -> None:
    excluded = tmp_path / "held_out.jsonl"
    excluded.write_text(json.dumps({"text": code("held")}) + "\n")
    files = {
        "one/kept.py": code("kept"),
        "one/copy.py": code("kept"),
        "one/held.py": code("held"),
        "one/windows.py": code("held").replace("\n", "\r\n"),
        "one/_vendor/theirs.py": code("theirs"),
        "one/x_pb2.py": code("x"),
        "one/made.py": "# This file was automatically generated from b.py\n" + code("made"),
        "one/table.py": "T = [\n" + "    1234, 5678,\n" * 50 + "]\n",
        "one/long.py": f"x = '{'y' * 500}'\n" + code("long"),
        "one/short.py": "x = 1\n",
        "one/latin.py": code("latin").encode() + b"# \xe9\n",
        "one/data.txt": code("data"),
        "one/gone.py": code("gone"),
    }
    distribution(environment, "one", ["License-Expression: MIT"], files)
    (environment / "one" / "gone.py").unlink()
    records, report = collect(script, tmp_path, excluded=[str(excluded)])
    assert list(records) in (["one/kept.py"], ["one/copy.py"])
    assert report["left_out"] == {
        "duplicate or held out": 3, "generated": 2, "table": 1, "long lines": 1, "size": 1, "not UTF-8, or absent": 2,
    }  # fmt: skip


def test_whole_distributions_are_held_out_and_big_ones_are_cut(
    script: ModuleType, environment: Path, tmp_path: Path
) -> None:
    files = {f"big/m{i}.py": code(f"f{'y' * i}") for i in range(20)}
    distribution(environment, "big", ["License-Expression: MIT"], files)
    distribution(environment, "My.Package", ["License-Expression: MIT"], {"my/a.py": code("mine")})
    limit = 5 * len(code("fyyyyy").encode())
    records, report = collect(script, tmp_path, held_out=["my_package"], max_distribution_bytes=limit)
    assert 3 <= len(records) <= 6 and report["training"]["big"]["bytes"] <= limit
    assert report["left_out"] == {"beyond max_distribution_bytes": 20 - len(records)}
    assert list(report["held_out"]) == ["My.Package"] and "my/a.py" not in records
    assert json.loads((tmp_path / "out.held-out.jsonl").read_text())["text"] == code("mine")
    again, _ = collect(script, tmp_path, held_out=["my_package"], max_distribution_bytes=limit, overwrite=True)
    assert list(again) == list(records)


def test_the_library_comes_without_its_tests(script: ModuleType, environment: Path, tmp_path: Path) -> None:
    records, report = collect(script, tmp_path, library=True, max_distribution_bytes=None)
    assert "argparse.py" in records and list(report["training"]) == ["CPython"]
    folders = {part for source in records for part in source.split("/")[:-1]}
    assert "json" in folders and not folders & {"test", "tests", "idlelib", "site-packages"}


def test_problems_are_reported_together(script: ModuleType, environment: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(ValueError) as error:
        collect(script, tmp_path, licences=[], min_file_bytes=0, excluded=["nowhere"])
    assert "licences=[] must be a list of one or more texts" in str(error.value)
    for part in ("min_file_bytes=0", "nowhere does not exist", "exist already"):
        assert part in str(error.value)
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    with pytest.raises(ValueError, match="must end in .jsonl"):
        collect(script, tmp_path, output=str(tmp_path / "out.txt"))
