# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Five steps have the losses that Megatron-core 0.13.1 had on one rank, on this version and under every layout.

1e-5 relative, fp32. The stored losses: python -m tests.stack.megatron.test_tuning
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.stack.megatron.tuning_program import LAYOUTS, STEPS, WAYS

STORED = Path(__file__).resolve().parents[2] / "data" / "stack" / "megatron_losses.json"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_megatron_core_0_13(tuned: SimpleNamespace, layout: str, way: str) -> None:
    found = json.loads((tuned.output / f"{layout}.json").read_text())[way]
    expected = json.loads(STORED.read_text())[way]
    assert len(found) == len(expected) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    first, last = expected[0], expected[-1]
    assert all(last[name] < first[name] * (1 - 1e-4) for name in first), "control: the steps change the losses"


if __name__ == "__main__":
    # Writes the stored losses, with Megatron-core 0.13.1.
    import tempfile

    from tests.helpers.huggingface_models import save_tiny_model
    from tests.stack.megatron import tuning_program

    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(Path(folder, "backbone"), "llama-llama3")
        tuning_program.main(f"{folder}/backbone", f"{folder}/tuned")
        STORED.parent.mkdir(exist_ok=True)
        STORED.write_text(Path(folder, "tuned", "one.json").read_text())
