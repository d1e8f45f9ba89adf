# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The console and the log file of a script.

| where | what |
|---|---|
| standard output | results: `show` |
| standard error | progress bars, messages of nemo_ee (rank 0; warnings and errors of every rank), tracebacks |
| log file | the above without generated text and bars; debug messages of nemo_ee; output and logs of libraries |

Inside `console`, `sys.stdout` and `sys.stderr` are the log file: prints and log handlers
of every library go there. Code of nemo_ee names the console instead. Without a log file
the console is `sys.stdout` and `sys.stderr`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

_console: tuple[TextIO, TextIO] | None = None  # standard output and error, while a log file replaces them

_log_files: dict[Path, TextIO] = {}  # they stay open: libraries keep them for their later messages


def results() -> TextIO:
    """The stream of a script's results: the console's standard output."""
    return _console[0] if _console else sys.stdout


def messages() -> TextIO:
    """The stream of progress bars and messages: the console's standard error."""
    return _console[1] if _console else sys.stderr


def show(text: str, *, end: str = "\n", log: bool = True) -> None:
    """Print a result, on rank 0; with `log` to the log file too."""
    if not rank():
        _write(text + end, results(), *([sys.stdout] if log else []))


def complain(text: str) -> None:
    """Print an error, also to the log file."""
    _write(text, messages(), sys.stderr)


def _write(text: str, *streams: TextIO) -> None:
    for stream in dict.fromkeys(streams):
        stream.write(text)
        stream.flush()


def rank() -> int:
    """Rank of this process, by the variables of torchrun, Slurm or Lightning; 0 of a process alone."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), 0))


class _Messages(logging.Handler):
    """Writes messages to the console, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.levelname.lower()
        try:
            text = self.format(record) if kind == "info" else f"{kind}: {self.format(record)}"
            tqdm.write(f"rank {rank()}: {text}" if rank() else text, file=messages())
        except Exception:  # of a closed console: the work goes on
            self.handleError(record)


@contextlib.contextmanager
def console(log_file: Path | None) -> Iterator[None]:
    """Show the messages of nemo_ee and of the web server, and send the output of libraries to a log file.

    Args:
        log_file: file to append to; None: the output of libraries is not redirected.

    Raises:
        OSError: the file cannot be written.
    """
    global _console
    ours, web, everyone = (logging.getLogger(name) for name in ("nemo_ee", "uvicorn", None))
    levels, streams = (ours.level, everyone.level), (_console, sys.stdout, sys.stderr)
    to_console = _Messages(logging.WARNING if rank() else logging.INFO)
    to_file = logging.NullHandler()
    if log_file:
        log = _log_files.get(log_file) or _opened(log_file)
        to_file = logging.StreamHandler(log)
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        everyone.setLevel(logging.INFO)
        _console, sys.stdout, sys.stderr = (sys.stdout, sys.stderr), log, log
    ours.setLevel(logging.DEBUG if log_file else logging.INFO)
    ours.addHandler(to_console)
    web.addHandler(to_console)
    everyone.addHandler(to_file)
    try:
        yield
    finally:
        if log_file and sys.stdout is log:  # not of a console that ended before one inside it
            _console, sys.stdout, sys.stderr = streams
        web.removeHandler(to_console)
        for logger, level, handler in zip((ours, everyone), levels, (to_console, to_file), strict=True):
            logger.setLevel(level)
            logger.removeHandler(handler)


def _opened(path: Path) -> TextIO:
    """A new log file, which only its owner reads: it may hold prompts and answers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _log_files[path] = open(
        path, "a", encoding="utf-8", errors="backslashreplace", buffering=1, opener=lambda *args: os.open(*args, 0o600)
    )
    return _log_files[path]
