# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The text and JSONL files that data is made from: their list, and their lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_ee.text.text_files import is_gzipped, read_json_lines

logger = logging.getLogger("nemo_ee.scripts")


def ending(path: Path) -> str:
    """The last suffix, in lower case, below a .gz if there is one."""
    return Path(path.stem if is_gzipped(path) else path.name).suffix.lower()


def find_files(config: Any) -> tuple[list[Path], list[str]]:
    """The input files in order (directories sorted by path), and the problems of the list."""
    known = {name.lower() for name in (*config.jsonl_extensions, *config.text_extensions)}
    rule = f"known endings: {', '.join(sorted(known))}, each also with .gz"
    files: list[Path] = []
    problems: list[str] = []
    for name in config.input:
        path = Path(name)
        if path.is_dir():
            inside = sorted(entry for entry in path.rglob("*") if entry.is_file())
            chosen = [entry for entry in inside if ending(entry) in known]
            if not chosen:
                problems.append(f"input: directory {name} has no file of a known type ({rule})")
            if len(chosen) < len(inside):
                logger.info("%s: %d files of other types left out", name, len(inside) - len(chosen))
            files += chosen
        elif not path.exists():
            problems.append(f"input: {name} does not exist")
        elif ending(path) not in known:
            settings = "text_extensions and jsonl_extensions" if config.text_extensions else "jsonl_extensions"
            problems.append(f"input: {name} has an unknown ending ({rule}); see {settings}")
        else:
            files.append(path)
    return files, problems


def read_fields(
    path: Path, config: Any, setting: str, kind: type, problems: list[str], bar: tqdm
) -> Iterator[tuple[str, Any]]:
    """(file:line, value of one field) of every line of a JSONL file; problems of reading are added to `problems`.

    Args:
        path: the file, possibly .gz.
        config: settings with `max_document_bytes`.
        setting: the setting that names the field.
        kind: type of the field.
        problems: grows.
        bar: moves on by bytes read from disk.
    """
    key = getattr(config, setting)
    with moving(bar, path) as moved:
        yield from read_json_lines(
            path,
            lambda record: _field(record, key, kind, setting),
            max_bytes=config.max_document_bytes,
            moved=moved,
            problems=problems,
        )


@contextmanager
def moving(bar: tqdm, path: Path) -> Iterator[Callable[[int], None]]:
    """A function that moves the bar to a place in the file; afterwards the bar is at the end of the file."""
    seen = 0

    def moved(place: int) -> None:
        nonlocal seen
        bar.update(place - seen)
        seen = place

    yield moved
    moved(path.stat().st_size)


def _field(record: Any, key: str, kind: type, setting: str) -> Any:
    """A field of a line's value.

    Raises:
        ValueError: it is absent, or of another type.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object with the field {key!r}")
    if key not in record:
        fields = ", ".join(sorted(map(repr, record))) or "none"
        raise ValueError(f"no field {key!r} (it has {fields}); name the field with {setting}")
    if not isinstance(record[key], kind):
        wanted = {str: "a string", list: "a list"}[kind]
        raise ValueError(f"field {key!r} is a JSON {type(record[key]).__name__}, not {wanted}")
    return record[key]
