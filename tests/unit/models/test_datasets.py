# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Loss masks of Megatron's data sets do not leak from one sample into the next; of chat data only answers count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import megatron_models  # noqa: F401 -- switches the CPU host on

import torch  # isort: skip  # after the CPU host is on
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemo_ee.models.datasets import give_each_sample_its_own_mask, prepare_dataset

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


# -- chat data --------------------------------------------------------------------------------------------------------


def write_mask(prefix: Path, documents: list[list[int]]) -> None:
    import numpy

    builder = IndexedDatasetBuilder(f"{prefix}.mask.bin", dtype=numpy.uint8)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.mask.idx")


def odd(folder: Path) -> None:
    """A mask under which exactly the odd tokens of `build` count."""
    write_mask(folder / "data", [[token % 2 for token in [*range(10 + n, 16 + n), END]] for n in range(40)])


@pytest.mark.parametrize("blended", [False, True])
def test_only_what_the_mask_says_counts(tmp_path: Path, blended: bool) -> None:
    """Samples run over documents and epochs in Megatron's order; the mask follows the labels everywhere."""
    odd(tmp_path)
    plain = build(tmp_path)
    dataset = SimpleNamespace(datasets=[plain, plain]) if blended else plain
    prepared = prepare_dataset(dataset)
    part = prepared.datasets[1] if blended else prepared
    assert len(part) == len(plain) >= 30
    for index in (*range(len(part)), 3):
        sample = part[index]
        assert torch.equal(sample["tokens"], plain[index]["tokens"])
        assert torch.equal(sample["loss_mask"], (sample["labels"] % 2).float() * plain[index]["loss_mask"])
    assert len({float(part[index]["loss_mask"].sum()) for index in range(len(part))}) > 1
    assert part[None]["loss_mask"].sum() == 0, "a sample that pads a batch"


def test_without_a_mask_every_token_counts(tmp_path: Path) -> None:
    dataset = build(tmp_path)
    assert prepare_dataset(dataset) is dataset and prepare_dataset(None) is None
    assert dataset[0]["loss_mask"].sum() == 16


def test_a_mask_of_other_data_is_refused(tmp_path: Path) -> None:
    write_mask(tmp_path / "data", [[1] * 6] * 40)
    with pytest.raises(ValueError, match=r"data\.mask\.idx belongs to other documents than .*data\.idx; make both"):
        prepare_dataset(build(tmp_path))
    (tmp_path / "data.mask.bin").unlink()
    with pytest.raises(ValueError, match=r"data\.mask\.idx is there, .*data\.mask\.bin is not"):
        prepare_dataset(build(tmp_path))
