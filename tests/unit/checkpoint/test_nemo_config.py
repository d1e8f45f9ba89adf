# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The description of a model: what an importer says of it is what an exporter reads in the `.nemo`."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_ee.checkpoint.huggingface import read_backbone
from nemo_ee.checkpoint.nemo_config import nemo_config, read_architecture
from tests.helpers.huggingface_models import TINY_MODELS, save_tiny_model


@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_is_written_for_nemo_is_read_again(name: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, name)
    backbone = read_backbone(tmp_path)
    read = read_architecture(nemo_config(backbone), stored_rows=1, max_positions=None, erf_gelu=True)
    assert list(read.differences(backbone.completed())) == []
    other = nemo_config(backbone) | {"layernorm_epsilon": 0.5}
    assert read_architecture(other, stored_rows=1, max_positions=None, erf_gelu=True).norm_epsilon != (
        backbone.norm_epsilon
    ), "control"
