# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 1: decoding with early exits. It knows a model only as segments between taps and exit heads to evaluate."""
