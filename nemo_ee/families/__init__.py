# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 0: model families. One file per family; `registry.py` lists them."""
