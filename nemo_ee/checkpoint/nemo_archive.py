# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading and writing `.nemo` files: tar archives (older ones gzip-compressed), or the same files in a directory.

Weights are read in place, so nothing large is unpacked except for compressed archives. Only the wanted members are
unpacked, and no member can place a file elsewhere: absolute names, `..`, links, devices and repeated names are
refused. Writing streams members of another archive byte for byte, so a complete early-exit `.nemo` costs one pass over
the source's weights and no memory. The file gets its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import yaml

from nemo_ee.checkpoint.atomic import atomic_file
from nemo_ee.checkpoint.file_folder import FileFolder, Place
from nemo_ee.checkpoint.members import CONFIG_MEMBER

_LEGACY = "a legacy archive (model_weights.ckpt or one mp_rank_*/tp_rank_* folder per rank)"
_BLOCK = 512
_COPY_BYTES = 4 << 20


class NemoArchive:
    """A `.nemo` file, or a directory that holds the same files. Use it as a context manager or call `close()`.

    Args:
        path: `.nemo` file or directory.
        unpacked: directory with the unpacked file, from which members are read; messages name `path`.

    Raises:
        ValueError: the file is absent, damaged, truncated, unsafe, or of an unsupported kind (legacy, NeMo 2).
    """

    def __init__(self, path: str | Path, *, unpacked: Path | None = None) -> None:
        self.path = Path(path)
        self._root = unpacked or self.path
        self._tar: tarfile.TarFile | None = None
        if self._root.is_dir():
            self._members = {
                file.relative_to(self._root).as_posix(): file.stat().st_size
                for file in sorted(self._root.rglob("*"))
                if file.is_file()
            }
            self._infos: dict[str, tarfile.TarInfo] = {}
        elif self.path.is_file():
            self._tar = _open_tar(self.path)
            try:
                self._infos = _checked_members(self._tar, self.path)
            except BaseException:
                self._tar.close()
                raise
            self._members = {name: info.size for name, info in self._infos.items()}
        else:
            raise ValueError(f"{self.path}: no such file or directory; give a .nemo file or an extracted one.")
        try:
            self._refuse_other_kinds()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> NemoArchive:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._tar is not None:
            self._tar.close()

    def members(self) -> dict[str, int]:
        """The archive's files: name without leading `./` -> size in bytes."""
        return dict(self._members)

    def has(self, prefix: str) -> bool:
        """Whether the archive has a file of this name, or any file below a folder of this name."""
        return any(_matches(name, (prefix,)) for name in self._members)

    def config_values(self) -> Any:
        """The values of `model_config.yaml`; in a damaged file they may not be a mapping.

        Raises:
            ValueError: the member is absent, not UTF-8, or not YAML.
        """
        try:
            return yaml.safe_load(self.config_text())
        except yaml.YAMLError as problem:
            message = f"{self.path}: {CONFIG_MEMBER} is damaged ({problem}); fetch or save the file again"
            raise ValueError(message) from problem

    def config_text(self) -> str:
        """The text of `model_config.yaml`.

        Raises:
            ValueError: the member is absent, or not UTF-8.
        """
        if CONFIG_MEMBER not in self._members:
            raise ValueError(f"{self.path}: no {CONFIG_MEMBER} in it, so this is not a NeMo model; give a .nemo file.")
        with self.open_member(CONFIG_MEMBER) as file:
            try:
                return file.read().decode("utf-8")
            except UnicodeDecodeError as problem:
                raise ValueError(f"{self.path}: {CONFIG_MEMBER} is damaged ({problem}); fetch it again.") from problem

    def open_member(self, name: str) -> IO[bytes]:
        """Opens a member for reading bytes.

        Raises:
            KeyError: no such member.
        """
        if name not in self._members:
            raise KeyError(f"{self.path}: no member {name!r}")
        if self._tar is None:
            return open(self._root / name, "rb")
        stream = self._tar.extractfile(self._infos[name])
        assert stream is not None, "every member is a regular file"
        return stream

    @property
    def directory(self) -> Path | None:
        """Directory of the files; None for an archive."""
        return self._root if self._tar is None else None

    @property
    def is_compressed(self) -> bool:
        """Whether members can only be read from the start of the file on, as in a compressed archive."""
        return self._tar is not None and not isinstance(self._tar.fileobj, io.BufferedReader)

    def folder(self, name: str) -> FileFolder:
        """A folder of the archive, to read any part of its files without unpacking while the archive is open.

        Args:
            name: name without a slash at the end; an absent folder has no files.
        """
        assert not self.is_compressed, "see open_nemo in unpacked.py"
        start, places = f"{name}/", {}
        for member, size in self._members.items():
            if member.startswith(start):
                info = self._infos.get(member)
                own = (self._root / member, 0) if info is None else (self._tar.fileobj, info.offset_data)
                places[member.removeprefix(start)] = Place(*own, size)
        return FileFolder(f"{self.path}: {start}", places)

    def extract(self, to: str | Path, prefixes: Sequence[str] | None = None) -> list[Path]:
        """Unpacks files into the directory `to`; existing files are never overwritten.

        Args:
            prefixes: file names and folders to unpack; None for all.

        Returns:
            Paths of the written files.

        Raises:
            ValueError: nothing matches a prefix, not enough disk space, or the archive is damaged.
            FileExistsError: a file already exists.
        """
        to = Path(to)
        for prefix in prefixes or ():
            if not self.has(prefix):
                raise ValueError(f"{self.path}: no {prefix!r} in it, only {', '.join(self._top_level())}.")
        names = [name for name in self._members if prefixes is None or _matches(name, prefixes)]
        to.mkdir(parents=True, exist_ok=True)
        needed, free = sum(self._members[name] for name in names), shutil.disk_usage(to).free
        if needed > free:
            raise ValueError(
                f"{self.path}: unpacking needs {needed / 1e9:.2f} GB in {to}, where {free / 1e9:.2f} GB are free; "
                "point TMPDIR to a larger disk or unpack the file yourself and give the directory."
            )
        written = []
        for name in names:
            target = to / PurePosixPath(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with self.open_member(name) as source, open(target, "xb") as file:
                _copy(source, file, self._members[name], f"{self.path}: {name}")
            written.append(target)
        return written

    def _top_level(self) -> list[str]:
        return sorted({name.split("/")[0] for name in self._members})

    def _refuse_other_kinds(self) -> None:
        top = self._top_level()
        if any(name.startswith(("mp_rank_", "tp_rank_")) or name == "model_weights.ckpt" for name in top):
            raise ValueError(
                f"{self.path}: {_LEGACY} is not read; restore it with NeMo and save it again with a distributed "
                "checkpoint (model.dist_ckpt_format=torch_dist)."
            )
        if "context" in top and "weights" in top and CONFIG_MEMBER not in top:
            raise ValueError(
                f"{self.path}: a NeMo 2 checkpoint (context/ and weights/) is not read; export it to Hugging Face "
                "with nemo.collections.llm.export_ckpt and give that directory."
            )


def write_nemo(output_path: str | Path, entries: Mapping[str, Path | bytes | str | NemoArchive]) -> Path:
    """Writes a `.nemo`: a tar that gets its name only when it is complete and on disk.

    Args:
        output_path: the `.nemo`; see `atomic_file`.
        entries: name in the archive -> content: a file, a directory (with all files below it), bytes, a text, or a
            `NemoArchive`, whose member or folder of the same name is copied byte for byte.

    Returns:
        Path of the written file.

    Raises:
        ValueError: an entry does not exist, or a name is absolute, contains `..` or comes twice.
    """
    output = Path(output_path)
    files = _flatten(entries)
    with atomic_file(output) as partial, tarfile.open(partial, mode="w", format=tarfile.PAX_FORMAT) as tar:
        _add_folders(tar, files)
        for name, source in files.items():
            _add_file(tar, name, source)
    return output


# Source of the bytes of one file: a file on disk, bytes, or a member of another archive.
_FileSource = Path | bytes | tuple[NemoArchive, str]


def _open_tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, mode="r:*")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as problem:
        raise ValueError(f"{path}: not a .nemo archive, or damaged ({problem}); fetch or save it again.") from problem


def _checked_members(tar: tarfile.TarFile, path: Path) -> dict[str, tarfile.TarInfo]:
    members: dict[str, tarfile.TarInfo] = {}
    end = 0
    try:
        for info in tar:
            end = info.offset_data + (-(-info.size // _BLOCK) * _BLOCK if info.isreg() else 0)
            name = _safe_name(info.name, path)
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                kind = "a link" if info.issym() or info.islnk() else "a device or another special file"
                raise ValueError(f"{path}: refused, member {info.name!r} is {kind}; a .nemo holds plain files only.")
            if name in members:
                raise ValueError(f"{path}: refused, member {name!r} comes twice; a .nemo holds each file once.")
            members[name] = info
        # A tar ends in blocks of zeros. Without them it was truncated, even if the cut is between two members.
        assert tar.fileobj is not None
        tar.fileobj.seek(end)
        whole = tar.fileobj.read(_BLOCK) == bytes(_BLOCK)
        while tar.fileobj.read(_COPY_BYTES):  # gzip checks its checksum at the end
            pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as problem:
        raise ValueError(f"{path}: damaged or truncated ({problem}); fetch or save it again.") from problem
    if not whole:
        raise ValueError(f"{path}: truncated (no end mark after {len(members)} members); fetch or save it again.")
    return members


def _safe_name(name: str, path: Path | str) -> str:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or (parts and parts[0].endswith(":")):
        raise ValueError(f"{path}: refused, member {name!r} would lie outside of the directory it is unpacked to.")
    return PurePosixPath(*parts).as_posix()


def _matches(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix.rstrip("/") or name.startswith(prefix.rstrip("/") + "/") for prefix in prefixes)


def _flatten(entries: Mapping[str, Path | bytes | str | NemoArchive]) -> dict[str, _FileSource]:
    """One item per file; repeated names and names outside the archive are refused before writing."""
    files: dict[str, _FileSource] = {}

    def add(name: str, source: _FileSource) -> None:
        name = _safe_name(name, "entries")
        if name in files or name == ".":
            raise ValueError(f"entries: {name!r} comes twice or is empty; name each file once.")
        files[name] = source

    for name, source in entries.items():
        if isinstance(source, str):
            add(name, source.encode("utf-8"))
        elif isinstance(source, bytes):
            add(name, source)
        elif isinstance(source, NemoArchive):
            wanted = [member for member in source.members() if _matches(member, (name,))]
            if not wanted:
                raise ValueError(f"{source.path}: no {name!r} in it.")
            for member in wanted:
                add(member, (source, member))
        elif source.is_dir():
            for file in sorted(source.rglob("*")):
                if file.is_file():
                    add(f"{name}/{file.relative_to(source).as_posix()}", file)
        elif source.is_file():
            add(name, source)
        else:
            raise ValueError(f"{source}: no such file or directory, wanted for {name!r}.")
    return files


def _add_folders(tar: tarfile.TarFile, files: Mapping[str, object]) -> None:
    # NeMo writes "./"-names and recognises a distributed checkpoint by its folder entry, so folders are members too.
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    for folder in sorted(folders):
        info = tarfile.TarInfo("." if folder == "." else f"./{folder}")
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(info)


def _add_file(tar: tarfile.TarFile, name: str, source: _FileSource) -> None:
    info = tarfile.TarInfo(f"./{name}")
    info.mode = 0o644
    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes):
            info.size, stream = len(source), io.BytesIO(source)
        elif isinstance(source, Path):
            stream = stack.enter_context(open(source, "rb"))
            info.size = os.fstat(stream.fileno()).st_size
        else:
            archive, member = source
            stream = stack.enter_context(archive.open_member(member))
            info.size = archive.members()[member]
        try:
            tar.addfile(info, stream)
        except (tarfile.TarError, EOFError, OSError, zlib.error) as problem:
            origin = source[0].path if isinstance(source, tuple) else "it"
            raise ValueError(f"cannot copy {name!r} of {origin} into the archive ({problem}).") from problem


def _copy(source: IO[bytes], target: IO[bytes], size: int, what: str) -> None:
    copied = 0
    try:
        while block := source.read(_COPY_BYTES):
            target.write(block)
            copied += len(block)
    except (tarfile.TarError, EOFError, zlib.error) as problem:
        raise ValueError(f"{what}: damaged or truncated ({problem}); fetch or save it again.") from problem
    if copied != size:
        raise ValueError(f"{what}: {copied} of {size} bytes are there; the file is truncated, fetch or save it again.")
