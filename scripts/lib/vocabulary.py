# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of data: its ids against those of the model in its directory, and their type on disk."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from lib.preprocess_settings import DTYPES, PreprocessError
from nemo_ee.text.json_values import JsonError, read_json


def load_tokenizer(directory: str) -> Any:
    """The Hugging Face tokenizer in a local directory; nothing is downloaded and no code from the directory runs.

    Raises:
        PreprocessError: no directory, or no tokenizer in it.
    """
    if not Path(directory).is_dir():
        raise PreprocessError([f"tokenizer: {directory} is not a local directory; nothing is downloaded"])
    from nemo_ee.runtime import loader

    try:
        return loader.load_tokenizer(directory)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PreprocessError([f"tokenizer: cannot load one from {directory}: {error}"]) from error


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The token ids of a tokenizer against those of the model it lies beside.

    Attributes:
        largest: the tokenizer's largest id.
        size: ids of the model, by its config.json; None where the tokenizer has no id beyond them, or nothing says.
    """

    tokenizer: Any
    config: Path
    largest: int
    size: int | None

    @classmethod
    def of(cls, tokenizer: Any, directory: str) -> Vocabulary:
        """The vocabulary of the tokenizer in a directory."""
        largest, config, size = max(tokenizer.get_vocab().values()), Path(directory, "config.json"), None
        with contextlib.suppress(OSError, JsonError):
            values = read_json(config)
            size = values.get("vocab_size") if isinstance(values, dict) else None
        return cls(tokenizer, config, largest, size if isinstance(size, int) and 0 < size <= largest else None)

    def problem(self, tokens: Sequence[int]) -> str | None:
        """The problem of the tokens of a document, or None."""
        if self.size is None or max(tokens, default=0) < self.size:
            return None
        token = next(token for token in tokens if token >= self.size)
        return (
            f"the tokenizer gives token {token} ({self.tokenizer.convert_ids_to_tokens(token)!r}), which is outside "
            f"the model's vocabulary 0..{self.size - 1} ({self.config}); leave that text out, or give the model more "
            "rows"
        )


def choose_dtype(name: str, vocab_size: int) -> tuple[str, list[str]]:
    """The token type on disk for a vocabulary, and the problem of the choice.

    Args:
        name: auto, uint16 or int32.
        vocab_size: largest token id + 1.
    """
    if name == "auto":
        # 65500, not 65536: the limit Megatron-core itself draws.
        return ("uint16" if vocab_size < 65500 else "int32"), []
    largest = int(numpy.iinfo(DTYPES[name]).max)
    if vocab_size - 1 > largest:
        return name, [f"dtype: {name} holds ids to {largest}, the tokenizer has {vocab_size - 1}; use int32 or auto"]
    return name, []
