# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Run the generation script on two pipeline stages, forked from one process that has imported NeMo.

    python -m tests.functional.generate_program <JSON file: a list of settings for each run> <folder for logs>

The module's top level stays light: Megatron's checkpoint writer imports it again in a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main(settings: Path, logs: Path) -> None:
    """Each run in turn."""
    from nemo_ee import cpu_host

    cpu_host.enable()
    import nemo_ee.commands.generate  # noqa: F401 -- imported before the forks
    from tests.functional.test_generate import run_script
    from tests.helpers.ranks import run_ranks

    for index, changes in enumerate(json.loads(settings.read_text())):

        def work(rank: int, changes: dict = changes) -> None:
            run_script(**changes)

        run_ranks(work, 2, timeout=120, log=str(logs / f"run{index}"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
