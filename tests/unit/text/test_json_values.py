# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The strict JSON reader: what it refuses, at which line, and that it reads everything else as Python does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_ee.text.json_values import MAX_DEPTH, JsonError, check_model_files, parse_json, read_json, read_json_object

DEEP = b"[" * 3000 + b"]" * 3000
LONG = b"9" * 5000
REFUSED = {
    "nested": (b'{"a":\n"[[[",\n"b": ' + DEEP + b"}", 3, "nested too deeply, more than 100 levels"),
    "nested and never closed": (b"[" * 100_000, 1, "nested too deeply"),
    "digits": (
        b'{"a": "999",\n"b": ' + LONG + b"}",
        2,
        f"holds the number {'9' * 40}, which does not fit into 64 bits",
    ),
    "a bit too large": (b"[9223372036854775808]", 1, "does not fit into 64 bits"),
    "infinite": (b'{"b": "1e999",\n"a": -1e999}', 2, "holds the number -1e999, which is too large"),
    "not a number": (b'["NaN",\n\n NaN]', 3, "holds NaN, which is not JSON"),
    "half a character": (b'{"text":\n"cut \\ud83d"}', 2, r"holds half a character (\ud83d"),
    "half a character as a key": (b'{"\\uDC00": 1}', 1, r"holds half a character (\udc00"),
    "half a character as bytes": (
        b'{"text":\n"cut \xed\xa0\xbd"}',
        2,
        "not UTF-8 (invalid continuation byte at byte 5",
    ),
    "no JSON": (b'{"a": 1,\n}', 2, "not JSON ("),
    "two values": (b"{} {}", 1, "not JSON (Extra data at column 4)"),
    "nothing": (b"", 1, "not JSON (Expecting value at column 1)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_reader_should_see_is_refused_with_its_line(what: str, tmp_path: Path) -> None:
    text, line, reason = REFUSED[what]
    with pytest.raises(JsonError) as raised:
        parse_json(text)
    assert reason in str(raised.value) and raised.value.line == line
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(ValueError) as raised:
        read_json(path)
    assert str(raised.value).startswith(f"{path}:{line}: ") and len(str(raised.value)) < len(str(path)) + 200


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -(2**63), 2**63 - 1, 1e308, -0.5, "naïve café 😀", "[{" * 500, "NaN", r"\ud83d",
        {"a": {"b": [1, {}, []]}}, {"text": "x", "more": [[1.5, "é"]] * 200},
    ],
)  # fmt: skip
def test_everything_else_is_read_as_python_reads_it(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert parse_json(text) == parse_json(text.encode()) == json.loads(text)
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(value).encode()) == value, "a byte order mark is no text"


@pytest.mark.parametrize("inside", ["", "1", '"x"'])
def test_the_deepest_value_that_is_read(inside: str) -> None:
    assert parse_json("[" * MAX_DEPTH + inside + "]" * MAX_DEPTH)
    with pytest.raises(JsonError, match="nested too deeply"):
        parse_json("[" * (MAX_DEPTH + 1) + inside + "]" * (MAX_DEPTH + 1))
    assert len(parse_json("[" + ",".join(["{}"] * 500) + "]")) == 500, "many brackets beside one another are no depth"


def test_tokenizers_may_say_no_limit() -> None:
    """transformers writes int(1e30) as `model_max_length`."""
    text = json.dumps({"model_max_length": int(1e30)})
    assert parse_json(text, wide_integers=True) == {"model_max_length": int(1e30)}
    with pytest.raises(JsonError, match="64 bits"):
        parse_json(text)
    with pytest.raises(JsonError, match="more than 40 digits"):
        parse_json(LONG, wide_integers=True)


def test_a_file_has_a_size_and_a_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": "b" * 100}))
    with pytest.raises(JsonError, match=r"x\.json: more than 50 bytes, the limit"):
        read_json(path, max_bytes=50)
    assert read_json_object(path) == read_json(path, max_bytes=path.stat().st_size)
    path.write_text("[]")
    with pytest.raises(JsonError, match=r"x\.json:1: a JSON list, not an object"):
        read_json_object(path)


def test_every_damaged_file_of_a_model_is_named(tmp_path: Path) -> None:
    check_model_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30)}))
    check_model_files(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a":\n' + LONG + b"}")
    (tmp_path / "tokenizer.json").write_bytes(DEEP)
    with pytest.raises(
        ValueError, match=r"/config\.json:2: holds the number 9+, .*/tokenizer\.json:1: nested too deep"
    ):
        check_model_files(tmp_path)
