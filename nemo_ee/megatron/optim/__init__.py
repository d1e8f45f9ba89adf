# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One optimizer, gradient reduction and schedule per exit; needs neither NeMo nor Lightning."""
