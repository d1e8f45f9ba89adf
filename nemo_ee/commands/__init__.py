# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 4: the commands behind the example scripts. Importing the package imports no module of it."""
