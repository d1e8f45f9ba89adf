# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's GPT data sets with loss masks that belong to one sample each.

Megatron-core 0.13 computes one loss mask, hands it out for every sample and clears in it, for good, the positions
where any sample's label is the padding token. Where padding and end-of-document are one token, as in most tokenizers,
the tokens that count dwindle sample by sample, differently on every rank; and the token itself is replaced by id 0.

May import: megatron.core.
"""

from __future__ import annotations

from typing import Any

from megatron.core.datasets.gpt_dataset import GPTDataset

# No token has this id: only what Megatron pads itself is padding, and it masks that and maps it to id 0.
_NO_TOKEN = -1


def give_each_sample_its_own_mask(dataset: Any) -> None:
    """Set up a data set, blended or plain, in place; None and other kinds are left alone."""
    for part in getattr(dataset, "datasets", None) or [dataset]:
        if isinstance(part, GPTDataset):
            part.masks_and_position_ids_are_cacheable = False
            part._pad_token_id = _NO_TOKEN
        elif part is not dataset:
            give_each_sample_its_own_mask(part)
