# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What a user may set: the keys of every script's yaml and what each may be, checked before any work (level 1)."""
