# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Learn then Test on scripted policies, the prompts of a file, and how answers diverge."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch

from nemo_ee.calibration.calibration_prompts import make_prompts, read_entries
from nemo_ee.calibration.calibration_report import policy_table
from nemo_ee.calibration.calibration_request import DEFAULT_GRID
from nemo_ee.calibration.learn_then_test import (
    candidate_problems,
    divergence,
    fastest,
    learn_then_test,
    one_threshold_path,
    pareto_path,
)

N = 100


def scripted(risks, depths, seen=None):
    """A measure by the first threshold: policies have these risks (of 100 binary losses) and depths."""

    def measure(thresholds):
        index = int(thresholds[0])
        if seen is not None:
            seen.append(index)
        losses = torch.zeros(N)
        losses[: round(risks[index] * N)] = 1.0
        return losses, depths[index]

    return measure


PATH = [(0.0,), (1.0,), (2.0,), (3.0,)]


def test_the_fastest_certified_policy_is_chosen_and_a_later_one_is_not_even_if_it_is_safe():
    results = learn_then_test(
        PATH, scripted([0.0, 0.01, 0.3, 0.0], [12, 9, 6, 3]), epsilon=0.1, delta=0.1, all_of_it=True
    )
    assert [one.certified for one in results] == [True, True, False, False]
    assert fastest(results).thresholds == (1.0,)


def test_depth_decides_not_the_place_in_the_path():
    results = learn_then_test(PATH[:3], scripted([0.0] * 3, [12, 5, 7]), epsilon=0.1, delta=0.1, all_of_it=True)
    assert all(one.certified for one in results) and fastest(results).mean_depth == 5


def test_full_depth_is_the_answer_where_the_first_fails():
    results = learn_then_test(PATH, scripted([0.2, 0, 0, 0], [12, 9, 6, 3]), epsilon=0.1, delta=0.1, all_of_it=True)
    assert fastest(results) is None


def test_what_costs_decoding_is_not_measured_after_the_first_failure():
    seen = []
    measure = scripted([0.0, 0.3, 0.0, 0.0], [12, 9, 6, 3], seen)
    assert len(learn_then_test(PATH, measure, epsilon=0.1, delta=0.1, all_of_it=False)) == 2 and seen == [0, 1]


def test_losses_out_of_bounds_are_refused():
    with pytest.raises(ValueError, match="clip and scale"):
        learn_then_test(PATH, lambda t: (torch.tensor([1.5]), 1.0), epsilon=0.1, delta=0.1, all_of_it=True)


def test_paths():
    assert one_threshold_path([0.9, 0.5], 2) == [(0.9, 0.9), (0.5, 0.5)]

    def measure(thresholds):  # leaving at the first exit costs more than at the second
        early, late = (1.0 - value for value in thresholds)
        return torch.tensor([0.6 * early + 0.1 * late]), 12 - 5 * early - 3 * late

    path = pareto_path([0.5, 0.0], 2, 1.0, measure)
    assert path[0] == (1.0, 1.0) and path[-1] == (0.0, 0.0) and path[1] == (1.0, 0.5)
    risks = [measure(one)[0].item() for one in path]
    depths = [measure(one)[1] for one in path]
    assert risks == sorted(risks) and depths == sorted(depths, reverse=True)
    with pytest.raises(ValueError, match="no losses"):
        pareto_path([0.5, 0.0], 2, 1.0, lambda thresholds: (torch.tensor([]), math.nan))


def test_combinations_are_counted():
    assert not list(candidate_problems([0.5, 0.0], 7, 1.0))
    (problem,) = candidate_problems([0.5, 0.0], 8, 1.0)
    assert "for each of 8 exits are 6561 policies, more than 4096; give a grid of at most 1" in problem
    assert not list(candidate_problems([0.5], 8, 1.0)), "as the message says"
    (problem,) = candidate_problems(DEFAULT_GRID["margin"], 3, 1.0)
    assert "26 thresholds" in problem and "give a grid of at most 15, or fewer exits" in problem


def test_divergence_counts_positions_of_the_longer_answer():
    found = divergence([[1, 2, 3], [1, 2], [4]], [[1, 2, 3], [1, 5], [4, 6, 7]])
    assert found == {"num_prompts": 3, "identical": 1 / 3, "differing": 3 / 8, "first_difference": 1.0}
    assert divergence([[1]], [[1]])["first_difference"] is None


def test_the_table_ends_soon_after_the_first_failure():
    policies = [
        {"thresholds": {"a": 1 - i / 10}, "risk": i / 10, "p_value": 0.01, "mean_depth": 12 - i, "certified": i < 2,
         "chosen": i == 1} for i in range(9)
    ]  # fmt: skip
    text = policy_table({"policies": policies, "num_layers": 12})
    assert len(text.splitlines()) == 2 + 2 + 3
    assert "chosen" in text.splitlines()[3] and "8.3%" in text.splitlines()[3]


# -- prompts --------------------------------------------------------------------------------------------------------


def ids(text):
    return [1, *(int(word) for word in text.split())]


def prompts(entries, **changes):
    given = {"bos": 1, "prompt_tokens": 5, "prompts_per_document": 1, "num_prompts": None, "longest": 8, "seed": 0}
    return make_prompts(entries, ids, **{**given, "facts": {}, **changes})


def test_documents_give_pieces_of_themselves(tmp_path):
    file = tmp_path / "x.jsonl.gz"
    lines = [{"text": " ".join(map(str, range(10 * i, 10 * i + 9)))} for i in range(1, 6)] + [{"text": "7 8"}]
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    entries, _ = read_entries(file)
    found = prompts(entries)
    assert found.facts["num_prompts"] == 5 and found.facts["documents_too_short"] == 1 and found.facts["independent"]
    for own in found.ids:
        assert len(own) == 5 and own[0] == 1 and list(own[1:]) == list(range(own[1], own[1] + 4))
    assert len({own[1] // 10 for own in found.ids}) == 5, "one of each document"
    twice = prompts(entries, prompts_per_document=2)
    assert len(twice.ids) == 10 and not twice.facts["independent"]
    assert len({token for own in twice.ids for token in own[1:]}) == 40, "pieces do not overlap"
    assert prompts(entries, seed=1).ids != found.ids == prompts(entries).ids
    assert len(prompts(entries, num_prompts=3).ids) == 3
    with pytest.raises(ValueError, match="num_prompts=6, but the data gives 5 prompts .1 documents are shorter"):
        prompts(entries, num_prompts=6)


def test_prompts_are_taken_whole_and_problems_name_their_place(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "5 6", "answer": "7"}\n\n{"prompt": "8"}\n')
    entries, digest = read_entries(file)
    found = prompts(entries)
    assert sorted(zip(found.ids, found.answers, strict=True), key=str) == [((1, 5, 6), "7"), ((1, 8), None)]
    assert len(digest) == 64 and found.facts["cut"] == "a line each"
    with pytest.raises(ValueError, match="prompt 0 has 3 tokens; it may have 1 to 2"):
        prompts(entries, longest=2)
    with pytest.raises(ValueError, match=r"prompt 1: token 8 outside the vocabulary 0\.\.7; use the tokenizer"):
        prompts(entries, vocab_size=8)
    for ending in (".bin", ".idx"):
        (tmp_path / f"tokens{ending}").touch()
    for name in ("tokens", "tokens.bin", "tokens.idx"):
        with pytest.raises(ValueError, match=rf"/{name} is tokenised data .*tokens\.bin and .*; give the text it was"):
            read_entries(tmp_path / name)
    file.write_text('{"prompt": 1}\n{"text": "x", "answer": 3}\n{')
    with pytest.raises(ValueError) as caught:
        read_entries(file)
    message = str(caught.value)
    assert ":1: must be an object" in message and ':2: "answer" is 3' in message and ":3: not JSON" in message
    text = tmp_path / "x.txt"
    text.write_text("1 2 3 4 5 6")
    assert read_entries(text)[0][0].is_document
    text.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_entries(text)
    with pytest.raises(ValueError, match="cannot be read"):
        read_entries(tmp_path / "absent.jsonl")
