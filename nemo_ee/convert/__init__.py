# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""From a base checkpoint to an early-exit checkpoint (level 4)."""
