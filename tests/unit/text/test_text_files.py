# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of text and of JSON lines: their names, their limits, and the places that messages name."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from nemo_ee.text.text_files import TextError, data_prefix, is_jsonl, read_document, read_json_lines, read_lines


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", True),
        ("a.jsonl.gz", True),
        ("a.b.jsonl", True),
        ("A.JSONL.GZ", True),
        ("notes.jsonl.txt", False),
        ("notes.jsonl.txt.gz", False),
        ("a.jsonl.gz.gz", False),
        ("a.txt", False),
        ("a.gz", False),
        (".gz", False),
        ("jsonl", False),
    ],
)
def test_the_ending_says_it(name: str, expected: bool) -> None:
    assert is_jsonl(Path("folder.jsonl", name)) is expected


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_are_split_at_newlines_alone_and_keep_their_numbers(tmp_path: Path, name: str) -> None:
    values = ["one", "two\u2028of\x85one", "naïve 😀"]
    lines = [json.dumps(value, ensure_ascii=False).encode() for value in values]
    path = written(tmp_path / name, b"\xef\xbb\xbf" + b"\r\n\n  \n".join(lines))
    problems: list[str] = []
    found = list(read_json_lines(path, str, problems=problems))
    assert found == [(f"{path}:{1 + 3 * index}", value) for index, value in enumerate(values)] and not problems
    assert read_document(path) == (b"\r\n\n  \n".join(lines)).decode()


def test_every_bad_line_is_named_and_the_good_ones_are_read(tmp_path: Path) -> None:
    bad = [b'{"text": "cut \\ud83d"}', b"[" * 3000, b"9" * 5000, b"NaN", b'"\xff"', b"{"]
    path = written(tmp_path / "a.jsonl.gz", b"\n".join([b"1", *bad, b"2"]))
    problems: list[str] = []
    assert [value for _, value in read_json_lines(path, int, problems=problems)] == [1, 2]
    reasons = ["holds half", "nested too deeply", "more than 40 digits", "holds NaN", "not UTF-8", "not JSON"]
    for number, (problem, reason) in enumerate(zip(problems, reasons, strict=True), start=2):
        assert problem.startswith(f"{path}:{number}: ") and reason in problem


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_or_document_of_the_limit_is_read_and_a_longer_one_is_not(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, b"123\n12345\n123456\n1\n")
    assert [line for _, line in read_lines(path, 6)] == [b"123\n", b"12345\n", b"123456\n", b"1\n"]
    with pytest.raises(TextError, match=rf"{name}:3: more than 5 bytes, the limit of a line; split it, or raise max_"):
        list(read_lines(path, 5))
    assert len(list(read_lines(path, None))) == 4
    assert len(read_document(path, 19)) == 19
    with pytest.raises(TextError, match=rf"{name}: more than 18 bytes, the limit of a document"):
        read_document(path, 18)


def test_a_small_archive_of_a_huge_line_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b"a" * 2**20)
    for read in (lambda: list(read_lines(path, 2**20)), lambda: read_document(path, 2**20)):
        tracemalloc.start()
        with pytest.raises(TextError, match="more than 1048576 bytes"):
            read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * 2**20, "of 64 MiB"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"absent\.txt: cannot be read: No such file"):
        read_document(tmp_path / "absent.txt")
    cut = written(tmp_path / "cut.jsonl.gz", b"1\n" * 1000)
    cut.write_bytes(cut.read_bytes()[:-12])
    problems: list[str] = []
    list(read_json_lines(cut, int, problems=problems))
    assert len(problems) == 1 and "cannot be read: Compressed file ended" in problems[0]
    with pytest.raises(TextError, match=r"b\.txt: not UTF-8 \(invalid start byte at byte 3\)"):
        read_document(written(tmp_path / "b.txt", b"abc\xff"))


def test_a_prefix_may_be_given_as_one_of_its_files(tmp_path: Path) -> None:
    for name in ("x.bin", "x.idx"):
        assert data_prefix(str(tmp_path / name)) == str(tmp_path / name), "there is no such data"
    for name in ("x.bin", "x.idx"):
        (tmp_path / name).touch()
    for name in ("x", "x.bin", "x.idx"):
        assert data_prefix(str(tmp_path / name)) == str(tmp_path / "x")
    for name in ("x.bin.bin", "x.bin.idx"):  # a prefix of that very name is meant
        (tmp_path / name).touch()
    assert data_prefix(str(tmp_path / "x.bin")) == str(tmp_path / "x.bin")
    assert data_prefix(str(tmp_path / "x.idx")) == str(tmp_path / "x")
