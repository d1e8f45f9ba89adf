# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Retired names of settings, request fields and arguments, and their new names. Stored files may use both."""

from __future__ import annotations

import sys
from collections.abc import Iterable

RENAMED_KEYS = {"max_waiting": "max_pending_tokens (in mode self_speculative: num_draft_tokens)"}


def renamed_key(name: str) -> str | None:
    """What to use instead of a retired name; None for every other name."""
    return RENAMED_KEYS.get(name)


def refuse_renamed_overrides(overrides: Iterable[str] | None = None) -> None:
    """Check Hydra overrides (None: this process's arguments), which would otherwise end in Hydra's own message.

    Raises:
        SystemExit: one of them sets a retired key; the message names the new one.
    """
    for override in sys.argv[1:] if overrides is None else overrides:
        name = override.partition("=")[0].lstrip("+~").rpartition(".")[2]
        if name in RENAMED_KEYS:
            raise SystemExit(f"error: {override}: {name} is now {RENAMED_KEYS[name]}")
