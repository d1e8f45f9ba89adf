# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A llama with early exits for transformers. Written by nemo_ee's export, as are the files beside it.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    model.generate(**tokenizer(text, return_tensors="pt"), early_exit_threshold=0.8)
"""

from transformers import LlamaConfig

from .early_exit_runtime_auto_model import EarlyExitCausalLM

# transformers copies no files but those that this one names.
from .early_exit_exits_block_reader import __name__ as _
from .early_exit_exits_confidence import __name__ as _
from .early_exit_exits_config import __name__ as _
from .early_exit_generation_checks import __name__ as _
from .early_exit_generation_cost_rule import __name__ as _
from .early_exit_generation_descent import __name__ as _
from .early_exit_generation_engine import __name__ as _
from .early_exit_generation_held_tokens import __name__ as _
from .early_exit_generation_items import __name__ as _
from .early_exit_generation_known_text import __name__ as _
from .early_exit_generation_policy import __name__ as _
from .early_exit_generation_request import __name__ as _
from .early_exit_generation_sampling import __name__ as _
from .early_exit_generation_scoring import __name__ as _
from .early_exit_generation_session import __name__ as _
from .early_exit_generation_speculation import __name__ as _
from .early_exit_generation_stats import __name__ as _
from .early_exit_runtime_attention import __name__ as _
from .early_exit_runtime_config import __name__ as _
from .early_exit_runtime_linear import __name__ as _
from .early_exit_runtime_loader import __name__ as _
from .early_exit_runtime_model import __name__ as _
from .early_exit_runtime_names import __name__ as _
from .early_exit_runtime_norm import __name__ as _
from .early_exit_runtime_rotary import __name__ as _


class EarlyExitConfig(LlamaConfig):
    """The stock config; `early_exit` in it is the table of exits."""


class EarlyExitForCausalLM(EarlyExitCausalLM):
    """See `generate`."""

    config_class = EarlyExitConfig
