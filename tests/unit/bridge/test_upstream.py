# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A missing or other Megatron-Bridge is named before anything of it is imported."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

import pytest


def _versions(monkeypatch: pytest.MonkeyPatch, found: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delitem(sys.modules, "nemo_ee.bridge.upstream", raising=False)


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"megatron-core": "0.13.1"}, "megatron-bridge 0.6 is needed, found none; megatron-core 0.19 is needed"),
        ({"megatron-bridge": "0.5.2", "megatron-core": "0.19.2"}, "megatron-bridge 0.6 is needed, found 0.5.2: pip"),
        ({"megatron-bridge": "0.6.2", "megatron-core": "0.18.0"}, "megatron-core 0.19 is needed, found 0.18.0: pip"),
    ],
)
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, found: dict[str, str], named: str) -> None:
    _versions(monkeypatch, found)
    with pytest.raises(ImportError, match=named):
        importlib.import_module("nemo_ee.bridge.upstream")


def test_settings_need_no_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    _versions(monkeypatch, {})
    monkeypatch.delitem(sys.modules, "nemo_ee.bridge.bridge_settings", raising=False)
    assert importlib.import_module("nemo_ee.bridge.bridge_settings").BridgeTuneSettings
