# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`make test` leaves this folder out; `make test-engines` runs it with NEMO_EE_STACK as the folder of its files."""

from __future__ import annotations

import os

collect_ignore_glob = [] if "NEMO_EE_STACK" in os.environ else ["*"]
