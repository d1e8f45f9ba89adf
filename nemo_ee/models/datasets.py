# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's GPT data sets with loss masks that belong to one sample each.

Megatron-core 0.13 computes one loss mask, returns it for every sample and clears in it, for good, the positions where
any sample's label is the padding token. Where padding and end-of-document are one token, as in most tokenizers, fewer
tokens count from sample to sample, differently on every rank; and the token itself is replaced by id 0.

Chat data (scripts/data/preprocess_chat.py) is `<prefix>.bin/.idx` with the tokens and `<prefix>.mask.bin/.idx` with 1
for every token of an answer and 0 for the others. Where the second pair is there, only answers count:

    loss_mask[t] = megatron's loss_mask[t] * mask[t + 1]        position t predicts token t + 1

The masks are read through the same sample, document and shuffle indices as the tokens, so order, resuming and data
parallelism are Megatron's own.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch.utils.data import Dataset

from nemo_ee.data.token_files import MASK_SUFFIX
from nemo_ee.models.sample_index import content_keyed_index

logger = logging.getLogger(__name__)

# No token has this id: only the tokens that Megatron itself pads with are padding. It masks them and maps them to id
# 0.
_NO_TOKEN = -1


class DatasetHooks:
    """Mixin in front of `MegatronGPTModel`."""

    def build_train_valid_test_datasets(self) -> None:
        """NeMo's data sets, with sample indices made from the content of this data. Every sample has a loss mask of
        its own; for chat data only answers count. Every rank must call it.

        Raises:
            ValueError: see `content_keyed_index` and `prepare_dataset`.
        """
        with content_keyed_index(self.cfg, self.vocab_size):
            built = super().build_train_valid_test_datasets()
        self._train_ds, self._validation_ds, self._test_ds = map(prepare_dataset, built)


def prepare_dataset(dataset: Any) -> Any:
    """A data set for training: every sample has a loss mask of its own; where the data has a mask, only answers count.

    Args:
        dataset: blended or plain; None and other kinds come back as they are.

    Returns:
        The data set, or one around it.

    Raises:
        ValueError: a mask beside the data that does not belong to it.
    """
    give_each_sample_its_own_mask(dataset)
    return _with_answer_masks(dataset)


def give_each_sample_its_own_mask(dataset: Any) -> None:
    """Set up a data set, blended or plain, in place; None and other kinds are left alone."""
    for part in getattr(dataset, "datasets", None) or [dataset]:
        if isinstance(part, GPTDataset):
            part.masks_and_position_ids_are_cacheable = False
            part._pad_token_id = _NO_TOKEN
        elif part is not dataset:
            give_each_sample_its_own_mask(part)


def _with_answer_masks(dataset: Any) -> Any:
    if isinstance(dataset, GPTDataset):
        mask = find_mask(dataset.dataset_path, dataset.dataset)
        return dataset if mask is None else AnswersOnly(dataset, mask)
    if getattr(dataset, "datasets", None):
        dataset.datasets = [_with_answer_masks(part) for part in dataset.datasets]
    return dataset


def find_mask(prefix: str, tokens: IndexedDataset) -> IndexedDataset | None:
    """The mask beside `<prefix>.bin/.idx`, or None where there is none.

    Raises:
        ValueError: half a mask, or one of other documents.
    """
    files = [Path(f"{prefix}{MASK_SUFFIX}{ending}") for ending in (".bin", ".idx")]
    found = [file.is_file() for file in files]
    if not any(found):
        return None
    way_out = "make both with scripts/data/preprocess_chat.py, or remove the mask to train on every token"
    if not all(found):
        raise ValueError(f"{files[found.index(True)]} is there, {files[found.index(False)]} is not; {way_out}")
    mask = IndexedDataset(prefix + MASK_SUFFIX)
    if not numpy.array_equal(mask.sequence_lengths, tokens.sequence_lengths):
        raise ValueError(f"{prefix}{MASK_SUFFIX}.idx belongs to other documents than {prefix}.idx; {way_out}")
    logger.info(f"{prefix}: only the answers count in the loss (mask: {prefix}{MASK_SUFFIX}.bin)")
    return mask


def documents_and_tokens(prefix: str, share: tuple[float, float] = (0.0, 1.0)) -> tuple[int, int]:
    """Number of documents and tokens of a data set on disk between two shares of its documents, as Megatron splits.

    Raises:
        ValueError: a mask beside the data that does not belong to it.
    """
    dataset = IndexedDataset(prefix)
    find_mask(prefix, dataset)
    lengths = dataset.sequence_lengths  # a view of the memory of `dataset`, which must live as long
    begin, end = (int(round(bound * len(lengths))) for bound in share)
    counts = end - begin, int(lengths[begin:end].sum(dtype=numpy.int64))
    del lengths, dataset
    return counts


class AnswersOnly(Dataset):
    """A GPT data set in whose samples only the tokens of answers count.

    Args:
        tokens: the data set.
        mask: the same documents with 1 for an answer's token and 0 for any other.
    """

    def __init__(self, tokens: GPTDataset, mask: IndexedDataset) -> None:
        self.tokens = tokens
        self._mask = copy.copy(tokens)  # the same indices over other values
        self._mask.dataset = mask

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int | None) -> dict[str, torch.Tensor]:
        """Megatron's sample; None is a sample that pads a batch."""
        sample = self.tokens[index]
        counts, _ = self._mask._query_document_sample_shuffle_indices(index or 0)  # [s + 1], or [s]
        of_labels = numpy.append(counts[1:] > 0, False)[: len(sample["labels"])]
        return {**sample, "loss_mask": sample["loss_mask"] * torch.from_numpy(of_labels)}
