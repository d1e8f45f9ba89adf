# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Loss masks of Megatron's data sets do not leak from one sample into the next."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from tests.helpers import megatron_models  # noqa: F401 -- switches the CPU host on

import torch  # isort: skip  # after the CPU host is on
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemo_ee.models.datasets import give_each_sample_its_own_mask

END = 5  # end of document and padding, as in most tokenizers; not id 0


def build(folder: Path):
    """A blend of one data set with an end-of-document token every 7 tokens, and one short document at the end."""
    import numpy

    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=numpy.uint16)
    for document in range(40):
        tokens = torch.arange(6) + 10 + document
        builder.add_document(torch.cat((tokens, torch.tensor([END]))), [7])
    builder.finalize(str(folder / "data.idx"))
    tokenizer = SimpleNamespace(pad=END, eod=END, unique_identifiers={"name": "test"})
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=16, blend=([str(folder / "data")], None), split="1,0,0",
        path_to_cache=str(folder / "cache"), tokenizer=tokenizer, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(GPTDataset, [30, 1, 1], lambda: True, config).build()[0]


def counted(dataset) -> list[float]:
    return [float(dataset[index]["loss_mask"].sum()) for index in range(len(dataset))]


def test_every_token_of_every_sample_counts_however_often_it_is_read(tmp_path: Path) -> None:
    dataset = build(tmp_path)
    give_each_sample_its_own_mask(dataset)
    assert counted(dataset) == counted(dataset) == [16.0] * len(dataset)
    sample = dataset[0]
    assert (sample["tokens"] == END).any(), "the end-of-document token stays what it is"
    assert not (sample["tokens"] == 0).any()


def test_the_data_set_needs_it(tmp_path: Path) -> None:
    """Control: Megatron's own masks dwindle."""
    dataset = build(tmp_path)
    assert counted(dataset)[-1] < 16.0
