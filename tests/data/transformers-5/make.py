# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes a model and a tokenizer with transformers 5, and what it makes of them, beside this file.

    PYTHONPATH=. python tests/data/transformers-5/make.py      with constraints/stack/transformers-5.txt
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from tests.helpers.huggingface_models import reference_logits, save_tiny_model
from tests.stack.small_tokenizers import TEXTS, save_tokenizer

HERE = Path(__file__).parent
TOKENS = torch.tensor([[5, 71, 13, 9, 0, 44, 100, 3]])

model = save_tiny_model(HERE / "model", "llama-llama3", num_attention_heads=4, num_hidden_layers=1)
with tempfile.TemporaryDirectory() as folder:
    save_tokenizer(Path(folder) / "source", "llama3")
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "source")
    tokenizer.save_pretrained(HERE / "tokenizer")
values = {
    "transformers": transformers.__version__,
    "tokens": TOKENS.tolist(),
    "logits": reference_logits(model, TOKENS)[0, -1].tolist(),
    "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
}
(HERE / "expected.json").write_text(json.dumps(values) + "\n")
