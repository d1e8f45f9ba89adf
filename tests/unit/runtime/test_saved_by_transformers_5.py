# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A model and a tokenizer that transformers 5 itself saved (tests/data/transformers-5) compute the same here."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nemo_ee.runtime.loader import load_model, load_tokenizer
from tests.stack.small_tokenizers import TEXTS
from tests.unit.runtime.test_model import close, whole

FOLDER = Path(__file__).parents[2] / "data" / "transformers-5"


def test_logits_and_ids() -> None:
    expected = json.loads((FOLDER / "expected.json").read_text())
    config = json.loads((FOLDER / "model" / "config.json").read_text())
    assert "rope_parameters" in config and "rope_theta" not in config, "its own spelling"
    logits = whole(load_model(FOLDER / "model"), torch.tensor(expected["tokens"]))[0, -1]
    assert close(logits, torch.tensor(expected["logits"]))
    assert json.loads((FOLDER / "tokenizer" / "tokenizer_config.json").read_text())["backend"] == "tokenizers"
    tokenizer = load_tokenizer(FOLDER / "tokenizer")
    assert [list(tokenizer(text)["input_ids"]) for text in TEXTS] == expected["ids"]
    assert tokenizer.decode(tokenizer(TEXTS[2], add_special_tokens=False)["input_ids"]) == TEXTS[2]
