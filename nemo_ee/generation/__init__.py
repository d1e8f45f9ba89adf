# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 1: decoding with early exits. Its interface to a model is segments between taps and exit heads to evaluate."""
