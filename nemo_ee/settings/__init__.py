# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 1: user settings. The keys of every script's yaml and their rules, checked before any work."""
