# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The replay buffer: its bound, what it draws, and the microbatch of what was drawn."""

from __future__ import annotations

import json

import pytest
import torch

from nemo_ee.data.replay_buffer import Answer, ReplayBuffer, draft_batches

CPU = torch.device("cpu")


def answers(*lengths: int) -> list[Answer]:
    return [Answer(tuple(range(number, number + size)), ((2, 1),)) for number, size in enumerate(lengths)]


def test_the_newest_answers_stay_within_the_bound() -> None:
    buffer = ReplayBuffer(10)
    for count, answer in enumerate(answers(4, 6, 3, 5, 10, 1), start=1):
        buffer.add(answer)
        assert sum(len(one.tokens) for one in buffer.answers) == buffer.num_tokens <= 10, count
    assert list(buffer.answers) == answers(4, 6, 3, 5, 10, 1)[5:]
    with pytest.raises(ValueError, match="an answer of 11 tokens does not fit into a replay buffer of 10; enlarge"):
        buffer.add(answers(11)[0])
    assert len(buffer.answers) == 1, "refused before others made room"


def test_a_draw_has_no_answer_twice_and_follows_from_the_seed() -> None:
    buffer = ReplayBuffer(100, answers(7, 9, 5, 8, 6, 11))
    drawn = [buffer.draw(20, seed) for seed in range(30)]
    for own in drawn:
        assert 0 < sum(len(one.tokens) for one in own) <= 20 and len(set(own)) == len(own)
    assert drawn == [buffer.draw(20, seed) for seed in range(30)]
    assert len({tuple(own) for own in drawn}) > 10, "other seeds draw others"
    assert len(buffer.draw(1, 0)) == 1, "one at least"
    stored = json.loads(json.dumps(buffer.to_plain()))
    assert ReplayBuffer.from_plain(100, stored).draw(20, 3) == drawn[3]


def test_the_batch_counts_verified_drafts_and_lists_whole_runs() -> None:
    # Position 0 1 2 | 3 4 5 6 7: at 4 and 5 two drafts were verified, at 7 one.
    long = Answer((10, 11, 12, 13, 14, 15, 16, 17), ((4, 2), (7, 1)))
    short = Answer((20, 21, 22, 23, 24, 25, 26), ((2, 2), (5, 2)))
    (found,) = draft_batches([short, long], 3, CPU)
    assert found.batch.tokens.tolist() == [[10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23, 24, 25, 0]]
    assert found.batch.labels.tolist() == [[11, 12, 13, 14, 15, 16, 17], [21, 22, 23, 24, 25, 26, 0]]
    assert found.batch.loss_mask.tolist() == [[0, 0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1, 0]]
    assert found.runs.tolist() == [[3, 4, 5], [6, 14, 14], [8, 9, 10], [11, 12, 14]]
    assert found.num_tokens == 13
    labels = found.batch.labels.flatten()
    assert [labels[run[run < 14]].tolist() for run in found.runs] == [[14, 15, 16], [17], [22, 23, 24], [25, 26]]


def test_padding_is_a_quarter_of_a_batch_at_most() -> None:
    sizes = torch.randint(2, 200, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = answers(*sizes)
    found = draft_batches(drawn, 3, CPU)
    assert 1 < len(found) < 20
    for one in found:
        assert one.num_tokens <= one.batch.tokens.numel() <= 1.25 * one.num_tokens
    assert len(drawn) * (max(sizes) - 1) > 1.25 * sum(one.num_tokens for one in found), "control: not as one batch"
    rows = [row[row > 0].tolist() for one in found for row in one.batch.labels]
    assert sorted(rows) == sorted([token for token in one.tokens[1:] if token] for one in drawn), "each answer once"
    assert sum(len(one.runs) for one in found) == len(drawn)
    again = draft_batches(drawn, 3, CPU)
    assert all(torch.equal(one.batch.tokens, two.batch.tokens) for one, two in zip(found, again, strict=True))


def test_answers_without_drafts_count_nowhere() -> None:
    (found,) = draft_batches([Answer((1, 2, 3), ())], 4, CPU)
    assert found.runs.shape == (0, 4) and not found.batch.loss_mask.any()
