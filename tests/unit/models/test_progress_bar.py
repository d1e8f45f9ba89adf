# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What fits behind the progress bar of tuning. The bar on a real run: tests/functional/test_tune.py."""

from __future__ import annotations

import pytest

pytest.importorskip("nemo")

from nemo_ee.models.progress_bar import losses_that_fit

LOSSES = {f"layer{layer}-mlp": layer + 0.12345 for layer in range(1, 9)}


def test_losses_are_shown_in_the_order_of_the_config_as_far_as_they_fit() -> None:
    assert losses_that_fit(LOSSES, 200) == {name: f"{loss:.3f}" for name, loss in LOSSES.items()}
    for columns in range(0, 200, 7):
        shown = losses_that_fit(LOSSES, columns)
        more = shown.pop("more", "0 in the log file")
        assert list(shown) == list(LOSSES)[: len(shown)] and more == f"{8 - len(shown)} in the log file"
        assert sum(len(f"{name}={loss}, ") for name, loss in shown.items()) <= max(columns, 18)
    assert losses_that_fit({}, 0) == {}
