# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/stack/bridge_exits.nemo: the exits of tests/data/earlier/complete.nemo, saved by Megatron-Bridge.

python -m tests.stack.bridge.write_exits        in the environment of constraints/stack/bridge.txt
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.stack.bridge.conftest import import_bridge


def main() -> None:
    """Write the file."""
    import_bridge()
    from nemo_ee.checkpoint.exits_file import save, stored_exits
    from nemo_ee.checkpoint.huggingface import HuggingFaceSource
    from tests.stack.bridge.bridge_models import COMPLETE, ROOT, build, export

    with tempfile.TemporaryDirectory() as folder:
        source = HuggingFaceSource(export(COMPLETE, Path(folder, "export"), "full") / "hf_full")
        with stored_exits(COMPLETE, source) as (block, exits):
            model, provider = build(source.directory, block, exits)
        file = ROOT / "tests" / "data" / "stack" / "bridge_exits.nemo"
        multiple = provider.make_vocab_size_divisible_by
        save(model, provider.exit_config, file, source, vocab_multiple=multiple)


if __name__ == "__main__":
    main()
