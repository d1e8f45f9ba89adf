# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The NeMo model: overrides of `MegatronGPTModel`, trainer, optimizers, save and restore (level 3).

Importing it sets NeMo's Apex guards when the CPU host is switched on.
"""

import os

from nemo_ee import cpu_host

# Megatron's checkpoint writer forks; the tokenizer library warns at every fork unless its threads are off.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
cpu_host.adapt_nemo()
