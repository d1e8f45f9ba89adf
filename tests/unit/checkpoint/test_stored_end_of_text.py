# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What ends a text of the model in a `.nemo`, by what the file carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_ee.checkpoint.nemo_archive import write_nemo
from nemo_ee.checkpoint.tokenizer_files import stored_end_of_text

TOKENIZER = {"tokenizer_config.json": {"eos_token": "</s>"}, "added_tokens.json": {"</s>": 5}}


def nemo(folder: Path, files: dict[str, Any], config: str = "num_layers: 2\nvocab_size: 32\n") -> Path:
    members = {f"tokenizer/{name}": json.dumps(values) for name, values in files.items()}
    return write_nemo(folder / "a.nemo", {"model_config.yaml": config, **members})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),  # NeMo's own, with another kind of tokenizer
        (TOKENIZER, (5,)),  # of an earlier version
        (TOKENIZER | {"config.json": {"model_type": "llama", "eos_token_id": [3, 40]}}, (3,)),
        (TOKENIZER | {"config.json": {"model_type": "llama"}}, (2,)),
        (TOKENIZER | {"config.json": {"model_type": "gpt2"}}, (5,)),  # 50256 is not in the vocabulary
        (
            TOKENIZER | {"config.json": {"eos_token_id": 3}, "generation_config.json": {"eos_token_id": [0, 12]}},
            (0, 12),
        ),
        (TOKENIZER | {"config.json": {"eos_token_id": 3}, "generation_config.json": {"temperature": 0.6}}, (3,)),
    ],
)
def test_the_file_says_what_ends_a_text(files: dict[str, Any], expected: tuple[int, ...], tmp_path: Path) -> None:
    found = stored_end_of_text(nemo(tmp_path, files))
    assert found.ids == expected and found.tokenizer == (5 if files else None)


def test_the_loaded_tokenizer_s_token_counts_before_that_of_its_files(tmp_path: Path) -> None:
    assert stored_end_of_text(nemo(tmp_path, TOKENIZER), 7).ids == (7,)
    assert stored_end_of_text(nemo(tmp_path, {}), 7).ids == (7,)


def test_a_wrong_value_is_named(tmp_path: Path) -> None:
    path = nemo(tmp_path, TOKENIZER | {"generation_config.json": {"eos_token_id": "12"}})
    with pytest.raises(
        ValueError, match="a.nemo: tokenizer/generation_config.json: eos_token_id='12' must be a token"
    ):
        stored_end_of_text(path)
