# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Every request that these tests send validates against the published schema."""

from __future__ import annotations

import pytest

from tests.helpers.json_schema import check_accepted_requests


@pytest.fixture(autouse=True)
def _the_schema_takes_accepted_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    check_accepted_requests(monkeypatch)
