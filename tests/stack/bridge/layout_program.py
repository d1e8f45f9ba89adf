# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The run of the tuning script on several layouts. Megatron-Bridge is imported once, then ranks are forked.

python -m tests.stack.bridge.layout_program LAYOUTS.json

The file maps a layout's name to {"ranks": number, "settings": the script's config}. The lines of the run's console go
to <name>.txt beside it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.stack.bridge.conftest import import_bridge

import_bridge()

import torch  # noqa: E402  after the CPU host is on

from nemo_ee.bridge.bridge_settings import BridgeTuneSettings  # noqa: E402
from nemo_ee.bridge.tuning_run import run  # noqa: E402
from tests.helpers.ranks import run_ranks  # noqa: E402


def main(file: Path) -> None:
    """Run every layout."""
    torch.set_num_threads(1)
    for name, layout in json.loads(file.read_text(encoding="utf-8")).items():
        lines = file.with_name(f"{name}.txt")

        def tune(rank: int, settings: dict[str, Any] = layout["settings"], lines: Path = lines) -> None:
            os.environ["RANK"] = str(rank)
            found = list(run(BridgeTuneSettings.from_config(settings)))
            if rank == 0:
                lines.write_text("\n".join(found), encoding="utf-8")
            torch.distributed.destroy_process_group()

        run_ranks(tune, layout["ranks"], timeout=300, log=str(file.with_name(name)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
