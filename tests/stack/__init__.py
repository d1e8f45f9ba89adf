# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of what must hold on other versions of the stack; `make test-stack` runs each folder where it applies."""
