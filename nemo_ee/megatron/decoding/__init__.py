# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoding engine's view of a Megatron model, on one stage or several."""
