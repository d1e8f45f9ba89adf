# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Requests by themselves: what is refused, and that a body made of problems costs and returns little."""

from __future__ import annotations

import difflib
import time

import pytest
import torch

from nemo_ee.exits.criteria import CRITERIA
from nemo_ee.exits.probe import ExitProbe
from nemo_ee.generation.decoding_model import ExitPoint, with_probes
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.serving.errors import MAX_MESSAGE, ApiError
from nemo_ee.serving.exit_choice import ExitChoice, exit_choice
from nemo_ee.serving.protocol import EarlyExit, Limits, read_request
from nemo_ee.serving.request_fields import MAX_PROBLEMS
from nemo_ee.settings.user_input import read

LIMITS = Limits(max_new_tokens=64, max_choices=4)


def refused(body: dict, *, chat: bool = False) -> str:
    with pytest.raises(ApiError) as caught:
        read_request(body, chat=chat, limits=LIMITS)
    assert caught.value.status == 400 and len(caught.value.message) <= MAX_MESSAGE
    return caught.value.message


def message(**changes) -> dict:
    return {"messages": [{"role": "user", "content": "x", **changes}]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (message(tool_calls=[{"id": "a"}]), "messages[0].tool_calls=[{'id': 'a'}] is not supported"),
        (message(name=7), "messages[0].name=7 must be a text"),
        (message(tool_call_id="a"), "messages[0].tool_call_id='a' is not supported"),
        (message(contents="x"), "did you mean content?"),
        (message(content=[{"type": "text", "text": "x", "cache": {}}]), "messages[0].content[0].cache={} is"),
        (message(content=[{"type": "image_url", "image_url": {}}]), "content[0].type='image_url' must be text"),
        ({**message(), "stream": True, "stream_options": {"include_usages": True}}, "did you mean include_usage?"),
        ({"messages": [{"role": "user", "content": "x"}] * 1025}, "has 1025 entries; 1024 are allowed"),
        (message(content=[{"type": "text", "text": "x"}] * 65), "messages[0].content=[{'type': 'text'"),
        ({**message(), "early_exit": {"exits": ["a"] * 257}}, "has 257 entries; 256 are allowed"),
        ({**message(), "early_exit": {"threshold": {str(i): 1 for i in range(257)}}}, "early_exit.threshold={'0': 1"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused(body: dict, words: str) -> None:
    assert words in refused(body, chat=True)


def test_control_an_answer_can_be_sent_back_as_it_came() -> None:
    call = read_request(message(role="assistant", refusal=None, tool_calls=None), chat=True, limits=LIMITS)
    assert call.conversation.messages == ({"role": "assistant", "content": "x"},)


@pytest.mark.parametrize(
    "body",
    [
        {f"promptt{number}": 1 for number in range(50_000)},
        {"p" * 1_000_000: 1},
        {"prompt": [None] * 200_000},
        {"prompt": [[]] * 4, "model": [["x" * 100_000] * 10] * 2, "stop": ["x" * 300] * 1000},
        {"prompt": "x", "stop": ["x"] * 200_000},
        {"prompt": "x", "early_exit": {f"treshold{number}": 1 for number in range(50_000)}},
        {"prompt": "x", "early_exit": {"t" * 1_000_000: 1}},
        {"prompt": [[]] * 300_000},
        {"messages": [{"role": "user", "content": [1] * 64}] * 1024},
        {"messages": [{"role": "assistant", "tool_calls": [{"a": 1}] * 128}] * 1024},
        {"messages": [0] * 400_000},
    ],
    ids=["names", "long-name", "prompts", "values", "stops", "keys", "long-key", "lists", "parts", "calls", "entries"],
)
def test_a_large_body_of_problems_costs_little(body: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    real = difflib.get_close_matches
    monkeypatch.setattr(
        difflib, "get_close_matches", lambda name, *a, **k: looked_at.append(name) or real(name, *a, **k)
    )
    start = time.monotonic()
    refused(body, chat="messages" in body)
    assert time.monotonic() - start < 8, "a tenth of a second alone; every problem in words takes 20 s"
    assert len(looked_at) <= MAX_PROBLEMS and all(len(name) <= 60 for name in looked_at)


def test_messages_of_nothing_but_problems() -> None:
    assert (
        refused({"messages": [{"role": f"no-{number}"} for number in range(1000)]}, chat=True).count("; ")
        <= 2 * MAX_PROBLEMS
    )


EXITS = (ExitPoint("a", 2, 4), ExitPoint("b", 4, 8))


class Model:
    """As much of a model as a choice of exits looks at."""

    exits, num_layers = EXITS, 8


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("usual", [ExitPolicy(0.9), ExitPolicy(2.5, "entropy"), ExitPolicy({"a": 0.5, "b": 0.5})])
def test_a_mode_without_thresholds_takes_any_criterion(criterion: str, usual: ExitPolicy) -> None:
    default = ExitChoice("early_exit", usual)
    for given in ({"mode": "full"}, {"mode": "static_depth", "exits": ["b"]}):
        choice = exit_choice(read(EarlyExit, {**given, "criterion": criterion}), Model, default, {})
        assert choice.mode == given["mode"] and choice.policy.criterion == criterion
    with pytest.raises(ApiError, match="criterion needs a threshold"):  # control: where thresholds count
        exit_choice(read(EarlyExit, {"criterion": criterion}), Model, default, {})


def test_drafts_by_value_use_no_threshold() -> None:
    default, given = ExitChoice("early_exit", ExitPolicy(0.9)), {"mode": "self_speculative", "draft_rule": "value"}
    choice = exit_choice(read(EarlyExit, {**given, "criterion": "margin"}), Model, default, {})
    assert choice.policy.draft_rule == "value" and choice.policy.criterion == "margin"
    with pytest.raises(ApiError, match="draft_rule 'value' does not use threshold; leave one of them out"):
        exit_choice(read(EarlyExit, {**given, "threshold": 0.5}), Model, default, {})
    assert exit_choice(read(EarlyExit, {"mode": "self_speculative", "threshold": 0.5}), Model, default, {})


def test_a_probe_is_a_criterion_of_exits_that_have_one() -> None:
    default, given = ExitChoice("early_exit", ExitPolicy(0.9)), {"criterion": "probe", "threshold": 0.5}
    with pytest.raises(ApiError, match="early_exit: .*'probe': a, b have no probe; fit probes with") as caught:
        exit_choice(read(EarlyExit, given), Model, default, {})
    assert caught.value.status == 400

    class Probed(Model):
        exits = with_probes(EXITS, {"a": ExitProbe(torch.zeros(4), 0.0)})

    choice = exit_choice(read(EarlyExit, {**given, "exits": ["a"]}), Probed, default, {})
    assert choice.policy == ExitPolicy(0.5, "probe", ("a",))
    with pytest.raises(ApiError, match="b has no probe"):
        exit_choice(read(EarlyExit, given), Probed, default, {})


def test_names_that_are_no_exits_are_told_shortly() -> None:
    default = ExitChoice("early_exit", ExitPolicy(0.9))
    for key, value in (("exits", ["x" * 1_000_000]), ("threshold", {"x" * 1_000_000: 0.5})):
        with pytest.raises(ApiError, match=f"early_exit.{key} names 'xxx") as caught:
            exit_choice(read(EarlyExit, {key: value}), Model, default, {})
        assert len(caught.value.message) < 300
