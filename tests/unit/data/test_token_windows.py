# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Windows over a tokenised text: every token predicted once, the same for every layout and batch size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from nemo_ee.data.token_windows import TokenWindows, microbatches, num_batches  # noqa: E402

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]
TEXT = [token for document in DOCUMENTS for token in document]  # 13 tokens, 12 to predict


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "text.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "text.idx"))
    return str(tmp_path / "text")


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 12, 13, 50])
def test_every_token_but_the_first_is_predicted_once(prefix: str, length: int) -> None:
    windows = TokenWindows(prefix, seq_length=length)
    inputs, predicted = [], []
    for index in range(len(windows)):
        tokens, labels, mask = windows[index]
        assert tokens.shape == labels.shape == mask.shape == (length,)
        inputs += tokens[mask > 0].tolist()
        predicted += labels[mask > 0].tolist()
    assert inputs == TEXT[:-1]
    assert predicted == TEXT[1:]
    assert windows.num_tokens == len(TEXT) - 1


def test_max_tokens_keeps_whole_windows_spread_over_the_text(prefix: str) -> None:
    windows = TokenWindows(prefix, seq_length=2, max_tokens=7)
    assert windows.num_tokens == 6
    assert [windows[index][0].tolist() for index in range(len(windows))] == [[5, 6], [9, 10], [13, 14]]
    assert all(windows[index][2].all() for index in range(len(windows)))


def test_max_tokens_larger_than_the_text_is_the_whole_text(prefix: str) -> None:
    assert TokenWindows(prefix, seq_length=5, max_tokens=12).num_tokens == 12
    assert TokenWindows(prefix, seq_length=5, max_tokens=999).num_tokens == 12


@pytest.mark.parametrize(("max_tokens", "kept"), [(11, [0, 1]), (9, [0]), (5, [0])])
def test_a_partial_last_window_is_only_there_when_all_are(prefix: str, max_tokens: int, kept: list[int]) -> None:
    windows = TokenWindows(prefix, seq_length=5, max_tokens=max_tokens)
    assert windows.num_tokens == 5 * len(kept)
    assert [windows[index][0][0] for index in range(len(windows))] == [TEXT[5 * index] for index in kept]


def test_what_is_wrong_is_said(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.bin and .*absent\.idx not found; make the data with"):
        TokenWindows(str(tmp_path / "absent"), seq_length=4)
    with pytest.raises(ValueError, match="max_tokens=3 is less than one window of seq_length=4"):
        TokenWindows(prefix, seq_length=4, max_tokens=3)
    refused = r"text\.bin holds the token 17 \(document 3, position 1\), which is outside .* 0\.\.16; make"
    with pytest.raises(ValueError, match=refused):
        TokenWindows(prefix, seq_length=4, vocab_size=17)
    assert len(TokenWindows(prefix, seq_length=4, vocab_size=18)) == 3
    # Only what is read counts: token 17 lies in the last window, and two windows of three are kept.
    assert len(TokenWindows(prefix, seq_length=4, max_tokens=8, vocab_size=17)) == 2


def test_the_prefix_may_be_given_as_one_of_its_files(prefix: str) -> None:
    whole = TokenWindows(prefix, seq_length=4)
    for name in (f"{prefix}.bin", f"{prefix}.idx"):
        assert TokenWindows(name, seq_length=4).num_tokens == whole.num_tokens


@pytest.mark.parametrize(
    ("micro", "batch", "ranks"), [(1, 1, 1), (2, 4, 1), (1, 4, 2), (2, 4, 2), (1, 8, 4), (4, 8, 2)]
)
def test_ranks_share_the_windows_and_do_equal_work(prefix: str, micro: int, batch: int, ranks: int) -> None:
    windows = TokenWindows(prefix, seq_length=2)  # 6 windows
    per_rank = [
        list(
            microbatches(
                windows, micro_batch_size=micro, global_batch_size=batch, data_rank=rank, data_size=ranks,
                device=torch.device("cpu"),
            )
        )
        for rank in range(ranks)
    ]  # fmt: skip
    shapes = [[[tuple(one.tokens.shape) for one in batch] for batch in batches] for batches in per_rank]
    assert all(shape == shapes[0] for shape in shapes), "a collective would hang"
    assert len(shapes[0]) == num_batches(windows, global_batch_size=batch)
    assert {shape for batch in shapes[0] for shape in batch} == {(micro, 2)}
    predicted = [
        label
        for batches in per_rank
        for batch in batches
        for one in batch
        for label in one.labels[one.loss_mask > 0].tolist()
    ]
    assert sorted(predicted) == sorted(TEXT[1:]), "each window belongs to exactly one rank"
    for batches in per_rank:
        for one in (one for batch in batches for one in batch):
            assert one.position_ids.tolist() == [[0, 1]] * micro


def test_a_rank_without_windows_takes_part_with_mask_zero(prefix: str) -> None:
    windows = TokenWindows(prefix, seq_length=12)  # one window
    batches = list(
        microbatches(windows, micro_batch_size=1, global_batch_size=4, data_rank=1, data_size=2, device="cpu")
    )
    assert [[one.loss_mask.sum().item() for one in batch] for batch in batches] == [[0.0]]
