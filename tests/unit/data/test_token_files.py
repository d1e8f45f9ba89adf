# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The check of tokenised data against a vocabulary, against a search through Megatron's own reader."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from nemo_ee.data import token_files
from nemo_ee.data.token_files import clean_prefixes, listed_prefixes, vocabulary_problem


def write(prefix: Path, documents: list[list[int]], dtype: type = numpy.uint16) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("chunk", [3, 1 << 23])
@pytest.mark.parametrize("dtype", [numpy.uint16, numpy.int32, numpy.int64])
def test_the_first_token_outside_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype, chunk: int) -> None:
    monkeypatch.setattr(token_files, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(0, 4100, (length,), generator=generator).tolist() for length in (5, 1, 9, 30, 2)]
    prefix = write(tmp_path / "x", documents, dtype)
    data = IndexedDataset(prefix)
    for limit in (4100, 4000, 3000, 2000, 1):
        places = [(d, p) for d in range(len(data)) for p, token in enumerate(data[d]) if token >= limit]
        problem = vocabulary_problem(prefix, limit)
        if not places:
            assert problem is None and limit == 4100
            continue
        document, position = places[0]
        assert problem.startswith(
            f"{prefix}.bin holds the token {data[document][position]} (document {document}, position {position}), "
            f"which is outside the model's vocabulary 0..{limit - 1}; make the data with the model's own tokenizer"
        )


def test_only_what_is_read_is_looked_at(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2, 3], [4, 99, 5]])
    assert vocabulary_problem(prefix, 90, [(0, 4), (5, 6)]) is None
    assert "token 99 (document 1, position 1)" in vocabulary_problem(prefix, 90, [(0, 2), (3, 6)])
    assert vocabulary_problem(prefix, None) is None and vocabulary_problem(prefix, 100) is None
    assert vocabulary_problem(prefix, 1 << 20) is None, "16 bits cannot hold such a token"


def test_negative_ids_and_shortened_files_are_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, -7, 3]], numpy.int32)
    assert "holds the token -7 (document 0, position 1)" in vocabulary_problem(prefix, 100)
    Path(f"{prefix}.bin").write_bytes(b"1234")
    assert vocabulary_problem(prefix, None) == (
        f"{prefix}.bin has 4 bytes and {prefix}.idx describes 12; make the data anew"
    )


def test_prefixes_of_a_config(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1]])
    given = {"train": [0.3, f"{prefix}.bin", "0.7", "other"], "validation": [f"{prefix}.idx"], "test": None}
    clean = clean_prefixes(given)
    assert clean == {"train": [0.3, prefix, "0.7", "other"], "validation": [prefix], "test": None}
    assert listed_prefixes(clean) == [prefix, "other"] == listed_prefixes(clean["train"])
