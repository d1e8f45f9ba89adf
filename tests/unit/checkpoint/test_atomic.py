# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Files and directories that are whole or not there: after problems, kills, and beside another writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_ee.checkpoint.atomic import atomic_directory, atomic_file, own_folder, write_json

ROOT = Path(__file__).resolve().parents[3]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.bin"
    with atomic_file(path) as partial:
        partial.write_bytes(b"new")
        assert not path.exists()
    path.chmod(0o640)
    with atomic_file(path) as partial:
        partial.write_bytes(b"newer")
        assert path.read_bytes() == b"new"
    assert path.read_bytes() == b"newer" and path.stat().st_mode & 0o777 == 0o640
    assert names(path.parent) == ["x.bin"]


@pytest.mark.parametrize("problem", [OSError("disk full"), KeyboardInterrupt()])
def test_a_problem_leaves_the_old_file(problem: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(problem)), atomic_file(path) as partial:
        partial.write_bytes(b"half")
        raise problem
    assert path.read_bytes() == b"old" and names(tmp_path) == ["x.bin"]


WRITER = """
import sys
from pathlib import Path
from nemo_ee.checkpoint.atomic import atomic_file

with atomic_file(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"the other's, longer")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_one_process_writes_a_file_at_a_time_and_a_killed_one_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    other = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert other.stdout.readline() == "writing\n"
    with pytest.raises(ValueError, match=r"x\.bin is being written already; wait"), atomic_file(path):
        raise AssertionError("it was not refused")
    assert names(tmp_path) == ["x.bin.partial"], "control: the other's file is left alone"
    other.send_signal(signal.SIGKILL)
    other.wait(timeout=60)
    with atomic_file(path) as partial:
        partial.write_bytes(b"ours")
    assert path.read_bytes() == b"ours" and names(tmp_path) == ["x.bin"]


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "out.partial").mkdir()
    (tmp_path / "new" / "out.partial" / "left").write_text("of a killed process")
    with atomic_directory(path, 10) as partial:
        (partial / "inside").mkdir()
        (partial / "inside" / "file").write_text("x")
        assert not path.exists()
    assert names(tmp_path / "new") == ["out"] and [file.name for file in path.rglob("*")] == ["inside", "file"]


@pytest.mark.parametrize(
    ("problem", "raised"), [(OSError(28, "No space left"), ValueError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_problem_removes_a_directory_and_the_folders_made_for_it(
    problem: BaseException, raised: type[BaseException], tmp_path: Path
) -> None:
    with pytest.raises(raised), atomic_directory(tmp_path / "new" / "deeper" / "out", 10) as partial:
        (partial / "file").write_text("x")
        raise problem
    assert names(tmp_path) == []


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"needs .* GB, .* GB are free there"),
        atomic_directory(tmp_path / "x", 1 << 60),
    ):
        raise AssertionError("it was not refused")
    assert names(tmp_path) == []


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), (1, 2)]}, indent=1)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, [1, 2]]}


def test_what_a_killed_writer_left_leaves_no_trace(tmp_path: Path) -> None:
    path, partial = tmp_path / "x.bin", tmp_path / "x.bin.partial"
    partial.write_bytes(b"0" * 50)
    partial.chmod(0o600)
    fresh = tmp_path / "fresh"
    fresh.touch()
    with atomic_file(path) as target, open(target, "r+b") as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode == fresh.stat().st_mode


def test_a_partial_file_that_its_writer_has_renamed_is_not_locked(tmp_path: Path, monkeypatch) -> None:
    """The other writer ends between the opening and the lock; without the check two would write one file."""
    path = tmp_path / "x.bin"

    def lock_late(*_: object) -> None:
        (tmp_path / "x.bin.partial").rename(path)

    monkeypatch.setattr("nemo_ee.checkpoint.atomic.fcntl.flock", lock_late)
    with pytest.raises(ValueError, match="is being written already"), atomic_file(path):
        pytest.fail("a second writer")


def test_a_folder_is_of_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with own_folder(folder):
        assert folder.is_dir()
        with own_folder(tmp_path / "other"):
            pass
        with pytest.raises(ValueError, match="folder is used by another run; wait for its end"), own_folder(folder):
            pass
        with pytest.raises(ValueError, match="is used by another run"), own_folder(folder):
            pass  # the refused one left the lock where it was
    with own_folder(folder):
        assert names(folder) == [], "nothing is left in it"
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file cannot be used .*; name another folder"), own_folder(tmp_path / "file"):
        pass
