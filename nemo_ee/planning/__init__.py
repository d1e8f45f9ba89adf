# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 1: the cost of a run: cost model and its measurement, layer split over stages, estimates."""
