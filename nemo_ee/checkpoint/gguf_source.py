# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a Megatron checkpoint, as `huggingface.HuggingFaceSource` is one of a Hugging Face directory.

The tensors are read under llama.cpp's names, in the rows of the family's table. `write_model_files` makes what a
Hugging Face directory has besides its weights: config.json, generation_config.json and the tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nemo_ee.checkpoint.gguf_file import SUFFIX, GgufFile
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.families.architecture import Architecture
from nemo_ee.families.gguf_metadata import ROPE_FACTORS
from nemo_ee.families.registry import FAMILIES, read_gguf
from nemo_ee.families.tensors import Names
from nemo_ee.text.gguf_tokenizer import special_ids, tokenizer_files
from nemo_ee.text.special_tokens import CONFIG, GENERATION_CONFIG


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file."""
    return Path(path).suffix == SUFFIX


class GgufSource(HuggingFaceSource):
    """A `WeightSource` over a GGUF file.

    Args:
        path: the file.
        sequence_length: see `read_backbone`.
        dequantised: see `GgufFile`.

    Attributes:
        config: the values of its config.json.

    Raises:
        ValueError: see `GgufFile`; a model or tokenizer that is not supported; missing or unread tensors.
    """

    described_by = "metadata"

    def __init__(
        self, path: str | Path, sequence_length: int | None = None, dequantised: torch.dtype = torch.float32
    ) -> None:
        self.file = GgufFile(path, dequantised)
        super().__init__(path, sequence_length)

    def write_model_files(self, directory: Path) -> None:
        """See `HuggingFaceSource`."""
        ids, ends = special_ids(self.file.metadata)
        generation = {**ids, "eos_token_id": ends if len(ends) > 1 else ids["eos_token_id"]}
        configs = {CONFIG: {**self.config, **ids}, GENERATION_CONFIG: generation}
        for name, values in {**configs, **self._tokenizer_files}.items():
            (directory / name).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _opened(self, sequence_length: int | None) -> tuple[Architecture, GgufFile, Names]:
        file = self.file
        try:
            factors = None
            if ROPE_FACTORS in file.names():
                factors = file.read(ROPE_FACTORS, ((0, file.shape(ROPE_FACTORS)[0]),)).tolist()
            backbone, self.config = read_gguf(file.metadata, file.shapes, factors, sequence_length)
            self._tokenizer_files = tokenizer_files(file.metadata, backbone.vocab_size)
        except ValueError as problem:
            raise ValueError(f"{file.path}: cannot be used. {problem}.") from None
        return backbone, file, FAMILIES[backbone.family].gguf.names
