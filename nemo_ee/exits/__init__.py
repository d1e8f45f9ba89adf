# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 0: early exits: their settings, their place in the model, their confidence, and the weights of their
losses."""
