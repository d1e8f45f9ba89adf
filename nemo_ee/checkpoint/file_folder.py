# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A folder whose files are read in place: on disk, or as members of a `.nemo` that is not unpacked.

Errors name a file by its place in the user's file: `tuned.nemo: exit_weights/__0_0.distcp`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class Place:
    """Place of the bytes of a file.

    Attributes:
        file: path of a file, or an open file. An open file is read even if its name belongs to another file by now.
        offset: its first byte in `file`.
        size: number of bytes.
    """

    file: Path | BinaryIO
    offset: int
    size: int


class FileFolder:
    """Files by name.

    Args:
        name: name of the folder in messages.
        places: file name, relative to the folder -> place of its bytes.
    """

    def __init__(self, name: str, places: Mapping[str, Place]) -> None:
        self.name, self._places = name, dict(places)

    @classmethod
    def on_disk(cls, directory: str | Path) -> FileFolder:
        """A directory with all files below it; a directory that does not exist has no files."""
        directory = Path(directory)
        files = (file for file in sorted(directory.rglob("*")) if file.is_file())
        places = {file.relative_to(directory).as_posix(): Place(file, 0, file.stat().st_size) for file in files}
        return cls(f"{directory}/", places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        """Names of the files."""
        return list(self._places)

    def shown(self, name: str) -> str:
        """Name of a file for a message."""
        return f"{self.name}{name}"

    def open(self, name: str, offset: int = 0, size: int | None = None) -> FileSlice:
        """Opens a file, or `size` bytes of it from `offset` on.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is too short.
        """
        if name not in self._places:
            raise FileNotFoundError("the file is missing")
        place = self._places[name]
        size = place.size - offset if size is None else size
        if offset < 0 or size < 0 or offset + size > place.size:
            raise ValueError(f"the file has {place.size} bytes, {offset + size} are needed")
        return FileSlice(Place(place.file, place.offset + offset, size))

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises as `open`."""
        with self.open(name) as file:
            return file.readall()


class FileSlice(io.RawIOBase):
    """A part of a file as a file object; unbuffered, since tensors are read whole into their memory."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place, self._at = place, 0
        self._own = open(place.file, "rb", buffering=0) if isinstance(place.file, Path) else None  # noqa: SIM115
        self._file = self._own or place.file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._place.size}[whence]
        if start + offset < 0:
            raise OSError(f"cannot seek to {start + offset}")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Read as any file does; a size past the end, as in a damaged zip, costs no memory."""
        left = max(0, self._place.size - self._at)
        return super().read(left if size is None or size < 0 else min(size, left))

    def readinto(self, buffer) -> int:  # noqa: ANN001
        wanted, done = min(len(buffer), max(0, self._place.size - self._at)), 0
        with memoryview(buffer) as view:
            while done < wanted:  # one call reads 2 GiB at most
                with view[done:wanted] as rest:
                    count = os.preadv(self._file.fileno(), [rest], self._place.offset + self._at + done)
                if not count:
                    break
                done += count
        self._at += done
        return done

    def close(self) -> None:
        if self._own is not None:
            self._own.close()
        super().close()
