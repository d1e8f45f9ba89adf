# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A scoring request says everything that a generation request asks for."""

from __future__ import annotations

import pytest

from nemo_ee.evaluation.scoring_request import model_settings, scoring_request


def settings(path, **changes):
    return {
        "mode": "early_exit", "criterion": "margin", "threshold": 0.5, "exits": None, "max_pending_tokens": None,
        "add_BOS": None, "batch_size": 1, "trainer": {"devices": 1, "num_nodes": 1, "precision": 32},
        "model": model_settings(str(path), None, 1),
    } | changes  # fmt: skip


def test_it_needs_no_prompts(tmp_path):
    path = tmp_path / "model.nemo"
    path.touch()
    request = scoring_request(settings(path))
    assert request.prompts == () and request.policy.thresholds == 0.5
    with pytest.raises(ValueError, match="mode='fast' must be one of"):
        scoring_request(settings(path, mode="fast"))
