# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""scripts/data/collect_debian_texts.py: the texts in made-up packages, unpacked as dpkg-deb would."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "conf" / "collect_debian_texts.yaml"
LONG = "A paragraph of a text that is long enough to be kept. " * 10


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts" / "data"))
    try:
        import collect_debian_texts

        yield collect_debian_texts
    finally:
        sys.path.remove(str(ROOT / "scripts" / "data"))


@pytest.fixture
def archive(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """package -> {path: content}; what `download` finds."""
    packages: dict[str, dict[str, bytes]] = {}

    def download(package: str, folder: Path) -> str | None:
        for name, content in packages.get(package, {}).items():
            path = folder / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return "1.0" if package in packages else None

    monkeypatch.setattr(script, "download", download)
    return packages


def collect(script: ModuleType, folder: Path, **changed: Any) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """(training texts, held-out texts by source; the list of sources)."""
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIG))
    mapping = {key: value for key, value in defaults.items() if key not in ("hydra", "defaults")}
    changed = {"output": str(folder / "out.jsonl"), "held_out_share": 0.0, **changed}
    report = script.collect(script.CollectSettings.from_config({**mapping, **changed}))
    assert json.loads((folder / "out.jsonl.sources.json").read_text()) == report
    files = [(folder / name).read_text().splitlines() for name in ("out.jsonl", "out.held-out.jsonl")]
    train, held_out = ({row["source"]: row["text"] for row in map(json.loads, lines)} for lines in files)
    return train, held_out, report


def test_what_becomes_text(script: ModuleType, archive: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    page = (
        "<html><head><title>No</title></head><body><nav>No</nav><h1>Head&amp;er</h1><p>One\n  line<br>two</p>"
        f"<script>No</script><pre>a\n  b</pre><ul><li>{LONG}</li></ul></body></html>"
    )
    archive["pages"] = {
        "doc/en-US/a.html": page.encode(),
        "doc/de-DE/a.html": page.replace("One", "Eins").encode(),
        "doc/genindex.html": page.replace("One", "Index").encode(),
        "doc/copy.html": page.encode(),
        "doc/a.txt": f"the same as plain text {LONG}".encode(),
        "doc/picture.png": b"\x89PNG",
    }
    archive["plain"] = {
        "doc/a.txt.gz": gzip.compress(f"plain\r\n{LONG}".encode()),
        "doc/short.txt": b"short",
        "doc/latin.txt": b"\xe9" + LONG.encode(),
        "perl/x.pod": f"=head1 NAME\n\n=over 4\n\n=item B<bold>\n\nSee L<perlfaq> C<< a >>. {LONG}\n\n=cut\n".encode(),
        "games/fortunes/wise": f"one\n%\ntwo {LONG}\n".encode(),
        "dictd/f.dict.dz": gzip.compress(f"word\n\n  a {{term}} {LONG}\n".encode()),
    }
    train, held_out, report = collect(script, tmp_path, packages=["pages", "plain", "absent"])
    long = LONG.strip()
    assert train == {
        "doc/copy.html": f"Head&er\n\nOne line\ntwo\n\na\n  b\n\n{long}",
        "doc/a.txt.gz": f"plain\n{long}",
        "perl/x.pod": f"NAME\n\nbold\n\nSee perlfaq a. {long}",
        "games/fortunes/wise": f"one\n\ntwo {long}",
        "dictd/f.dict.dz": f"word\n\n  a term {long}",
    }
    assert held_out == {} and report["missing"] == ["absent"]
    assert report["training"]["pages"] == {
        "version": "1.0", "documents": 1, "characters": len(train["doc/copy.html"]),
    }  # fmt: skip


def test_pieces_of_a_file_stay_together(
    script: ModuleType, archive: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    texts = {f"{index}.txt": "\n\n".join(f"{index} {part} {LONG}" for part in range(4)) for index in range(40)}
    archive["plain"] = {name: text.encode() for name, text in texts.items()}
    changed = {"packages": ["plain"], "max_document_characters": 1200, "held_out_share": 0.3}
    train, held_out, report = collect(script, tmp_path, **changed)
    assert train.keys() | held_out.keys() == texts.keys() and not train.keys() & held_out.keys()
    assert 4 <= len(held_out) <= 22
    assert report["training"]["plain"]["documents"] == 2 * len(train)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert max(len(json.loads(line)["text"]) for line in lines) <= 1200


def test_wrong_input_is_one_error_and_nothing_is_written(
    script: ModuleType, archive: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    archive["plain"] = {"a.txt": LONG.encode()}
    for changed, message in (
        ({"packages": ["absent", "plain"], "skip_missing": False}, "finds no absent"),
        ({"packages": ["absent"]}, "no package had a text"),
        ({"packages": ["plain"], "excluded": ["("]}, "regular expressions"),
        ({"packages": ["plain"], "output": str(tmp_path / "out.txt")}, "must end in .jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            collect(script, tmp_path, **changed)
    assert list(tmp_path.iterdir()) == []


def test_without_debian_the_message_names_another_way(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get is missing.*preprocess_text"):
        script.download("plain", tmp_path)


def test_a_failed_download_is_no_missing_package(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "apt-get"
    for said, code in (("E: Unable to locate package plain", None), ("E: Could not resolve", "Could not resolve")):
        tool.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 100\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        if code is None:
            assert script.download("plain", tmp_path) is None
        else:
            with pytest.raises(ValueError, match=f"plain cannot be downloaded or unpacked: E: {code}"):
                script.download("plain", tmp_path)
