# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The NeMo host restores exits that Megatron-Bridge saved; tests/stack/bridge/write_exits.py wrote the file."""

from __future__ import annotations

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import ROOT, exit_logits, random_tokens
from tests.helpers.nemo_files import restore

import torch  # isort: skip  # after the CPU host is on

BASE = ROOT / "tests" / "data" / "earlier" / "complete.nemo"
FILE = ROOT / "tests" / "data" / "stack" / "bridge_exits.nemo"


def test_the_exits_are_those_of_the_base() -> None:
    ours = restore(FILE, backbone_path=str(BASE), verify="full")
    tokens = random_tokens(ours, length=16)
    found = exit_logits(ours, tokens)
    base = restore(BASE)
    theirs = exit_logits(base, tokens)
    assert found.keys() == theirs.keys() and len(found) == 3
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)
    assert ours.cfg.early_exit == base.cfg.early_exit
    assert not torch.equal(*list(found.values())[:2]), "control: two exits differ"
