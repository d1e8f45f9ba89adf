# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The members of a `.nemo` by name; names of folders have no slash at the end."""

from nemo_ee.exits.criteria import PROBES_FILE

CONFIG_MEMBER = "model_config.yaml"
MODEL_WEIGHTS = "model_weights"
EXIT_WEIGHTS = "exit_weights"
LORA_WEIGHTS = "lora_weights"  # low-rank updates of the backbone that were not merged into it
TOKENIZER_FOLDER = "tokenizer"
CERTIFICATES = "certificates"
PROBES = PROBES_FILE

# In a folder of weights: the index of all chunks of all tensors.
METADATA_FILE = ".metadata"

# NeMo bundles the files that these keys of the tokenizer's block name; the config then has `nemo:<member>`.
TOKENIZER_ARTIFACTS = ("model", "vocab_file", "merge_file")
IN_ARCHIVE = "nemo:"
