# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 0: the arithmetic of early exit. What an exit is, where it sits, how sure it is, how much its loss counts."""
