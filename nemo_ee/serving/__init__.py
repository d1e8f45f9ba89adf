# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Level 5: an OpenAI-compatible HTTP server over the decoding engine, with early exit as a request field."""
