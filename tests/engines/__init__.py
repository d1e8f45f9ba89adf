# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests on real engines; `make test-engines` runs them, each folder in an environment of its own."""
