# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The server's config: what is read, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_ee.serving.settings import ServerSettings, is_loopback
from tests.helpers.served_model import serve_config

KEY = "sixteen-letters-x"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMO_EE_API_KEYS", raising=False)


def test_the_yaml_is_what_is_read(tmp_path: Path) -> None:
    settings = ServerSettings.from_config(serve_config(tmp_path))
    assert settings.host == "127.0.0.1" and settings.api_keys == () and settings.default.mode == "early_exit"
    unnamed = ServerSettings.from_config(serve_config(tmp_path, name=None))
    assert unnamed.name == tmp_path.name


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"# who has them\n{KEY}1\n\n {KEY}2\n", encoding="utf-8")
    monkeypatch.setenv("NEMO_EE_API_KEYS", f"{KEY}3, {KEY}1")
    settings = ServerSettings.from_config(serve_config(tmp_path, host="0.0.0.0", api_keys_file=str(file)))
    assert sorted(settings.api_keys) == [f"{KEY}1", f"{KEY}2", f"{KEY}3"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", "0"])
def test_beyond_loopback_a_key_is_needed(host: str, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="no API key is set"):
        ServerSettings.from_config(serve_config(tmp_path, host=host))
    monkeypatch.setenv("NEMO_EE_API_KEYS", "short")
    with pytest.raises(ValueError, match="shorter than 16"):
        ServerSettings.from_config(serve_config(tmp_path, host=host))
    monkeypatch.setenv("NEMO_EE_API_KEYS", KEY)
    assert ServerSettings.from_config(serve_config(tmp_path, host=host)).host == host


def test_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "LOCALHOST"))
    assert not any(is_loopback(host) for host in ("", "0.0.0.0", "127.0.0.1.example.org", "localhost.example.org"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, "model=None must be hf_early_exit/ of an export"),
        ({"model": "no/such"}, "is not a directory"),
        ({"model": "tuned.nemo"}, "export_huggingface.py checkpoint=tuned.nemo"),
        ({"port": 70000}, "from 0 to 65535"),
        ({"num_slots": 0}, "num_slots=0 must be a whole number of at least 1"),
        ({"max_queue": True}, "max_queue=True"),
        ({"prompt_share": 0}, "prompt_share=0 must be a number above 0 and below 1, or null"),
        ({"prompt_share": 1.0}, "prompt_share=1.0 must be a number above 0"),
        ({"prompt_share": "half"}, "prompt_share='half'"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_queue": 0, "num_slots": 2, "max_choices": 3}, "max_choices=3 answers of one request never fit"),
        ({"exits": 5}, "exits=5 must be a list of exits' names"),
        ({"request_timeout": float("inf")}, "request_timeout=inf"),
        ({"mode": "fast"}, "mode='fast' must be one of early_exit"),
        ({"threshold": 2}, "threshold = 2.0 must be a number in 0..1"),
        ({"chat_template": "no/such.jinja"}, "cannot be read"),
        ({"api_keys_file": "no/such"}, "cannot be read"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_is_refused(changes: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        ServerSettings.from_config(serve_config(tmp_path, **changes))
    assert words in str(caught.value)


def test_a_whole_export_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "hf_early_exit").mkdir()
    with pytest.raises(ValueError, match="is a whole export; give .*hf_early_exit"):
        ServerSettings.from_config(serve_config(tmp_path))


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        ServerSettings.from_config(serve_config(tmp_path, port=-1, mode="x", host="0.0.0.0"))
    assert str(caught.value).count("\n") == 3
