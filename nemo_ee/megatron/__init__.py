# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The early-exit GPT on Megatron-core: heads, taps, losses, tuning schedule, decoding adapter (level 1).

Importing it checks Megatron-core's version.
"""

from nemo_ee.megatron.versions import refuse_unsupported_version

refuse_unsupported_version()
