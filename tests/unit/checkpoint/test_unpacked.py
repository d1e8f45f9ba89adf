# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What is unpacked goes away with its process, also with a killed one; errors about it name the archive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nemo_ee.checkpoint.nemo_archive import NemoArchive, write_nemo
from nemo_ee.checkpoint.unpacked import PREFIX, temporary_folder, unpacked

ROOT = Path(__file__).parents[3]
HOLD = """
import sys
from nemo_ee.checkpoint.unpacked import temporary_folder
with temporary_folder() as folder:
    (folder / "weights").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    sys.stdin.read()
"""


def _holder(directory: Path) -> tuple[subprocess.Popen, Path]:
    """A process that has unpacked something, and where."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], env={**os.environ, "TMPDIR": str(directory), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, Path(process.stdout.readline().strip())


def test_the_next_start_removes_what_a_killed_process_left(tmp_path: Path, monkeypatch) -> None:
    """And nothing of a process that lives, of another program, or behind a link."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "nemo_ee-other").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "target")
    kept = {"nemo_ee-other", "target", f"{PREFIX}link"}
    killed, left = _holder(tmp_path)
    alive, used = _holder(tmp_path)
    try:
        assert left.parent == used.parent == tmp_path and left.name.startswith(PREFIX)
        killed.send_signal(signal.SIGKILL)
        killed.wait(timeout=60)
        assert (left / "weights").is_file() and (used / "weights").is_file(), "control"
        with temporary_folder() as own:
            assert {path.name for path in tmp_path.iterdir()} == kept | {used.name, own.name}
        alive.communicate("", timeout=60)
        assert alive.returncode == 0 and {path.name for path in tmp_path.iterdir()} == kept
    finally:
        killed.kill()
        alive.kill()


def test_a_folder_that_vanishes_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made, real = [], tempfile.mkdtemp

    def vanishing(**options: str) -> str:
        made.append(real(**options))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", vanishing)
    with temporary_folder() as folder:
        assert str(folder) == made[1] and folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_archive_and_not_where_it_was_unpacked(tmp_path: Path) -> None:
    path = write_nemo(tmp_path / "m.nemo", {"tokenizer/tokenizer.json": b"{"})
    with NemoArchive(path) as archive:
        with pytest.raises(ValueError) as caught, unpacked(archive) as folder:
            raise RuntimeError(f"cannot parse {folder}/tokenizer/tokenizer.json, see {folder}")
        expected = f"{path}: a file in it cannot be used (cannot parse tokenizer/tokenizer.json, see it); "
        assert str(caught.value) == f"{expected}fetch or save it again."
        with pytest.raises(RuntimeError, match="^another$"), unpacked(archive):
            raise RuntimeError("another")
