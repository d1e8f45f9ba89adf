# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`.nemo` archives: what is read, what is refused, and that writing is whole or not at all."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from nemo_ee.checkpoint.nemo_archive import NemoArchive, write_nemo
from nemo_ee.checkpoint.unpacked import open_nemo, unpacked

CONFIG = "num_layers: 4\nname: tëst\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "model_weights" / "deep").mkdir(parents=True)
    (directory / "model_config.yaml").write_text(CONFIG, encoding="utf-8")
    (directory / "model_weights" / "metadata.json").write_text("{}")
    (directory / "model_weights" / "__0_0.distcp").write_bytes(os.urandom(70_001))
    (directory / "model_weights" / "deep" / "x.bin").write_bytes(b"x" * 512)
    (directory / "tokenizer.model").write_bytes(b"t")
    return directory


@pytest.fixture(params=["w:", "w:gz"])
def archive(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Written the way NeMo writes them (`tar.add(folder, arcname=".")`), plain and compressed."""
    path = tmp_path / "model.nemo"
    with tarfile.open(path, request.param) as tar:
        tar.add(folder, arcname=".")
    return path


def _tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def _files(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def test_reads_config_and_lists_members(archive: Path, folder: Path) -> None:
    for path in (archive, folder):
        with NemoArchive(path) as opened:
            assert opened.config_text() == CONFIG
            assert opened.members() == {name: len(content) for name, content in _files(folder).items()}
            assert opened.has("model_weights") and opened.has("model_weights/metadata.json")
            assert not opened.has("exit_weights") and not opened.has("model_weigh")
            with pytest.raises(KeyError, match="no member 'nope'"):
                opened.open_member("nope")


def test_extracts_only_what_is_wanted(archive: Path, folder: Path, tmp_path: Path) -> None:
    with NemoArchive(archive) as opened:
        opened.extract(tmp_path / "some", prefixes=("model_weights/", "model_config.yaml"))
        opened.extract(tmp_path / "all")
        with pytest.raises(FileExistsError):
            opened.extract(tmp_path / "all")
        with pytest.raises(ValueError, match=r"no 'exit_weights' in it, only model_config.yaml, model_weights"):
            opened.extract(tmp_path / "none", prefixes=("exit_weights",))
    assert _files(tmp_path / "all") == _files(folder)
    assert _files(tmp_path / "some") == {k: v for k, v in _files(folder).items() if k != "tokenizer.model"}


def test_what_was_unpacked_is_removed_and_a_directory_is_kept(archive: Path, folder: Path) -> None:
    with NemoArchive(archive) as opened, unpacked(opened, ("model_weights",)) as directory:
        assert _files(directory / "model_weights") == _files(folder / "model_weights")
        assert not (directory / "model_config.yaml").exists()
    assert not directory.exists()
    with NemoArchive(folder) as opened, unpacked(opened, ("model_weights",)) as directory:
        assert directory == folder
    assert folder.exists()


def test_a_folder_is_read_where_it_lies(archive: Path, folder: Path) -> None:
    """Any part of any file, of a plain archive without unpacking; a compressed one is unpacked for that."""
    whole = (folder / "model_weights" / "__0_0.distcp").read_bytes()
    for path in (archive, folder):
        with open_nemo(path) as opened:
            weights = opened.folder("model_weights")
            assert {name: weights.read(name) for name in weights.names()} == _files(folder / "model_weights")
            assert opened.directory is None or path == folder or path.read_bytes()[:2] == b"\x1f\x8b"
            with weights.open("__0_0.distcp", 10_000, 300) as part:
                assert part.read(7) == whole[10_000:10_007] and part.seek(-3, os.SEEK_END) == 297
                assert part.read() == whole[10_297:10_300] and part.read() == b""
            with pytest.raises(ValueError, match="the file has 70001 bytes, 70002 are needed"):
                weights.open("__0_0.distcp", 70_000, 2)
            with pytest.raises(FileNotFoundError, match="the file is missing"):
                weights.open("nope")
            assert weights.shown("x") == f"{path}: model_weights/x" and not opened.folder("exit_weights").names()


def test_an_archive_that_is_replaced_while_it_is_read(archive: Path, folder: Path) -> None:
    with open_nemo(archive) as opened:
        write_nemo(archive, {"model_config.yaml": "other: 1"})
        assert opened.folder("model_weights").read("deep/x.bin") == b"x" * 512


def test_too_little_disk_space_is_said_before_unpacking(archive: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with NemoArchive(archive) as opened, pytest.raises(ValueError, match="unpacking needs .* point TMPDIR"):
        opened.extract(tmp_path / "to")
    assert not any((tmp_path / "to").iterdir())


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (_special("../outside", tarfile.REGTYPE), "would lie outside"),
        (_special("model_weights/../../outside", tarfile.REGTYPE), "would lie outside"),
        (_special("/absolute", tarfile.REGTYPE), "would lie outside"),
        (_special("C:/windows", tarfile.REGTYPE), "would lie outside"),
        (_special("..\\outside", tarfile.REGTYPE), "would lie outside"),
        (_special("..", tarfile.DIRTYPE), "would lie outside"),
        (_special("model_weights/link", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (_special("model_weights/hard", tarfile.LNKTYPE, "model_config.yaml"), "is a link"),
        (_special("pipe", tarfile.FIFOTYPE), "device or another special file"),
        (_special("device", tarfile.CHRTYPE), "device or another special file"),
        (_special("./model_config.yaml", tarfile.REGTYPE), "comes twice"),
    ],
)
def test_unsafe_members_are_refused(tmp_path: Path, member, message: str) -> None:
    config = tarfile.TarInfo("model_config.yaml")
    path = _tar(tmp_path / "bad.nemo", (config, b"a: 1\n"), member)
    with pytest.raises(ValueError, match=f"refused, member .*{message}"):
        NemoArchive(path)
    NemoArchive(_tar(tmp_path / "good.nemo", (config, b"a: 1\n"))).close()


def test_a_cut_archive_is_refused_wherever_it_is_cut(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    with tarfile.open(path, "w:") as tar:
        tar.add(folder, arcname=".")
        end = tar.offset
        members = tar.getmembers()
    whole = path.read_bytes()
    cuts = {
        0,
        100,
        511,
        end // 2,
        end - 1,
        end,
        *(info.offset for info in members),
        *(info.offset_data for info in members),
    }
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged|truncated"):
            NemoArchive(path)
    path.write_bytes(whole[: end + 1024])
    NemoArchive(path).close()


def test_a_cut_or_corrupt_compressed_archive_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=".")
    whole = path.read_bytes()
    for bad in (whole[:20], whole[: len(whole) // 2], whole[:-4], b"\x1f\x8b" + os.urandom(500)):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged|truncated"):
            NemoArchive(path)


def test_other_files_are_refused_with_a_way_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or directory; give a .nemo"):
        NemoArchive(tmp_path / "absent.nemo")
    (tmp_path / "text.nemo").write_text("no tar at all")
    with pytest.raises(ValueError, match="not a .nemo archive, or damaged"):
        NemoArchive(tmp_path / "text.nemo")
    for legacy in ("mp_rank_00/model_weights.ckpt", "tp_rank_00_pp_rank_000/model_weights.ckpt", "model_weights.ckpt"):
        path = write_nemo(tmp_path / "legacy.nemo", {"model_config.yaml": CONFIG, legacy: b"x"})
        with pytest.raises(ValueError, match="a legacy archive .* is not read; restore it with NeMo"):
            NemoArchive(path)
    nemo_2 = write_nemo(tmp_path / "two.nemo", {"context/model.yaml": "a", "weights/metadata.json": "{}"})
    with pytest.raises(ValueError, match="NeMo 2 checkpoint .* export it to Hugging Face"):
        NemoArchive(nemo_2)
    no_config = write_nemo(tmp_path / "none.nemo", {"a": "b"})
    with NemoArchive(no_config) as opened, pytest.raises(ValueError, match="no model_config.yaml in it"):
        opened.config_text()
    broken = write_nemo(tmp_path / "bytes.nemo", {"model_config.yaml": b"\xff\xfe"})
    with NemoArchive(broken) as opened, pytest.raises(ValueError, match="model_config.yaml is damaged"):
        opened.config_text()


def test_writes_files_folders_bytes_and_members_of_another_archive(
    archive: Path, folder: Path, tmp_path: Path
) -> None:
    exits = tmp_path / "exits"
    exits.mkdir()
    (exits / "e.distcp").write_bytes(b"e" * 5000)
    single = tmp_path / "single"
    single.write_bytes(b"s")
    for source in (archive, folder):
        with NemoArchive(source) as opened:
            written = write_nemo(
                tmp_path / "new" / "ee.nemo",
                {
                    "model_config.yaml": "early_exit: {}\n",
                    "model_weights": opened,
                    "tokenizer.model": opened,
                    "exit_weights": exits,
                    "single": single,
                    "raw": b"r",
                },
            )
        expected = {k: v for k, v in _files(folder).items()} | {
            "model_config.yaml": b"early_exit: {}\n",
            "exit_weights/e.distcp": b"e" * 5000,
            "single": b"s",
            "raw": b"r",
        }
        with NemoArchive(written) as opened, unpacked(opened) as directory:
            assert _files(directory) == expected
        assert list(written.parent.iterdir()) == [written]
    with tarfile.open(written) as tar:
        # NeMo looks for the folder itself, and for names that start with "./".
        assert {".", "./model_weights", "./model_weights/metadata.json"} <= set(tar.getnames())
        assert tar.getmember("./model_weights").isdir()


def test_the_same_entries_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    first = write_nemo(tmp_path / "a.nemo", {"model_weights": folder / "model_weights", "c": "1"})
    os.utime(folder / "model_weights" / "metadata.json", (1, 1))
    second = write_nemo(tmp_path / "b.nemo", {"model_weights": folder / "model_weights", "c": "1"})
    assert first.read_bytes() == second.read_bytes()


def test_a_failed_write_leaves_the_old_file_and_no_partial(folder: Path, tmp_path: Path, monkeypatch) -> None:
    path = write_nemo(tmp_path / "out" / "m.nemo", {"a": b"old"})
    old = path.read_bytes()
    with pytest.raises(ValueError, match="no such file or directory, wanted for 'b'"):
        write_nemo(path, {"a": b"new", "b": tmp_path / "absent"})
    with NemoArchive(folder) as opened, pytest.raises(ValueError, match="no 'exit_weights' in it"):
        write_nemo(path, {"exit_weights": opened})
    for name in ("../a", "/a", "."):
        with pytest.raises(ValueError, match="would lie outside|comes twice or is empty"):
            write_nemo(path, {name: b"new"})
    with pytest.raises(ValueError, match="comes twice"):
        write_nemo(path, {"./a": b"1", "a": b"2"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_nemo(path, {"a": b"new"})
    assert path.read_bytes() == old and list(path.parent.iterdir()) == [path]
