# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Unit tests: one folder per folder of nemo_ee, on the CPU, each test under a second where possible."""
