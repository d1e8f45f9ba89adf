# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`self_speculative` and `static_depth` over Megatron modules against transformers' `generate` and its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request
from nemo_ee.generation.sampling import SamplingParams
from tests.unit.checkpoint.conftest import megatron  # noqa: F401  (fixture)
from tests.unit.megatron.test_decoding_adapter import (  # noqa: F401  (`directory` is a fixture)
    FAMILIES,
    NEVER_MET,
    build,
    directory,
    engine_of,
    some_prompts,
    whole_sequence_logits,
    whole_sequence_taps,
)

pytestmark = pytest.mark.usefixtures("megatron")

# Copied from the backbone, so that they agree with it now and then: drawn at random they never would.
EXITS = [
    {"name": "mlp1", "layer": 1, "architecture": "mlp"},
    {"name": "layer1", "layer": 1, "architecture": "layer"},
    {"name": "norm2", "layer": 2, "architecture": "norm"},
]
ALWAYS = ExitPolicy(0.0, num_draft_tokens=3)
NUM_NEW = 16


def decode(engine: Any, requests: Sequence[Request], mode: str, policy: ExitPolicy) -> tuple[list[Any], Any]:
    """Events by sequence, and the session, flushed."""
    session = engine.start(requests, mode=mode, policy=policy)
    events: list[list[Any]] = [[] for _ in requests]
    while not session.finished:
        for event in session.step():
            events[event.sequence].append(event)
    session.flush()
    return events, session


def transformers_tokens(model: Any, prompt: Sequence[int], **options: Any) -> list[int]:
    """What `generate` says, cut at the first place where its own choice is undecided (lead below 1e-4)."""
    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    tokens = result.sequences[0, len(prompt) :].tolist()
    leads = [float(first - second) for first, second in (step[0].topk(2).values for step in result.scores)]
    decided = next((index for index, lead in enumerate(leads) if lead < 1e-4), len(leads))
    assert decided > len(leads) // 2, "the reference is undecided almost at once: this would say nothing"
    return tokens[:decided]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_self_speculation_gives_transformers_tokens(family, directory):  # noqa: F811
    tiny = directory(family)
    num_layers = tiny.reference.config.num_hidden_layers
    exits = [exit for exit in EXITS if exit["layer"] < num_layers]
    engine = engine_of(build(tiny.path, exits, drawn=False))
    prompts = some_prompts(engine.model.vocab_size)
    events, session = decode(engine, [Request(tuple(p), NUM_NEW) for p in prompts], "self_speculative", ALWAYS)
    for own, prompt in zip(events, prompts, strict=True):
        expected = transformers_tokens(tiny.reference, prompt, eos_token_id=None)
        assert [event.token for event in own][: len(expected)] == expected
    assert session.stats([event for own in events for event in own]).drafted >= 3 * 11


CASES = {
    "repetition penalty": ({"repetition_penalty": 1.7}, {"eos_token_id": None, "repetition_penalty": 1.7}, {}),
    "end of text": ({}, {"eos_token_id": "third"}, {"stop_tokens": "third"}),
    "end of text, not before": (
        {"repetition_penalty": 1.2},
        {"eos_token_id": "third", "min_new_tokens": 6, "repetition_penalty": 1.2},
        {"stop_tokens": "third", "min_new_tokens": 6},
    ),
}


@pytest.mark.parametrize("mode", ["self_speculative", "early_exit"])
@pytest.mark.parametrize("case", CASES)
def test_penalty_end_and_least_length_are_those_of_transformers(case, mode, directory):  # noqa: F811
    tiny = directory("llama")
    engine = engine_of(build(tiny.path, EXITS, drawn=False))
    policy = ALWAYS if mode == "self_speculative" else ExitPolicy(NEVER_MET)
    sampling, theirs, ours = CASES[case]
    for prompt in some_prompts(133):
        third = transformers_tokens(tiny.reference, prompt, eos_token_id=None, **sampling)[2]
        theirs_now = {key: third if value == "third" else value for key, value in theirs.items()}
        ours_now = {key: frozenset({third}) if value == "third" else value for key, value in ours.items()}
        expected = transformers_tokens(tiny.reference, prompt, **theirs_now)
        request = Request(tuple(prompt), NUM_NEW, SamplingParams(**sampling), **ours_now)
        events, _ = decode(engine, [request], mode, policy)
        assert [event.token for event in events[0]][: len(expected)] == expected
        if case == "end of text":
            assert len(events[0]) <= 3 and events[0][-1].finish_reason == "stop"


def test_after_rollbacks_the_cache_is_transformers(directory):  # noqa: F811
    tiny = directory("llama")
    engine = engine_of(build(tiny.path, EXITS, drawn=False))
    prompts = some_prompts(133, (6, 2))
    requests = [Request(tuple(p), NUM_NEW, SamplingParams(repetition_penalty=1.7)) for p in prompts]
    events, session = decode(engine, requests, "self_speculative", ALWAYS)
    stats = session.stats([event for own in events for event in own])
    assert 0 < stats.accepted < stats.drafted, f"{stats}: this says too little about rollbacks"
    for index, (prompt, own) in enumerate(zip(prompts, events, strict=True)):
        fed = [*prompt, *(event.token for event in own)][:-1]
        reference = tiny.reference(torch.tensor([fed]), use_cache=True).past_key_values
        for layer, (keys, values) in enumerate(reference, start=1):
            assert int(session.cache.valid(layer)[index].sum()) == len(fed)
            found = session.cache.keys(layer)[index, :, : len(fed)], session.cache.values(layer)[index, :, : len(fed)]
            torch.testing.assert_close(found[0], keys[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[1], values[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("exit", EXITS, ids=lambda exit: exit["name"])
def test_static_depth_is_what_a_whole_sequence_pass_says(exit, directory):  # noqa: F811
    model = build(directory("llama").path, EXITS)
    engine = engine_of(model)
    policy = ExitPolicy(1.0, active=(exit["name"],))
    sampling = SamplingParams(greedy=False, temperature=2.0, seed=3)
    prompts = some_prompts(133, (5, 1))
    requests = [Request(tuple(p), NUM_NEW, sampling) for p in prompts]
    events, session = decode(engine, requests, "static_depth", policy)
    for prompt, own in zip(prompts, events, strict=True):
        stage, mask = whole_sequence_taps(model, [[*prompt, *(event.token for event in own)]])
        logits = whole_sequence_logits(model, exit["name"], stage, mask)[0].log_softmax(-1)
        for event in own:
            assert event.exit == exit["name"] and event.layer == exit["layer"]
            assert event.logprob == pytest.approx(float(logits[event.position - 1, event.token]), abs=1e-4)
    assert not session.cache.valid(exit["layer"] + 1).any(), "a layer below the exit has run"


def test_a_norm_exit_at_static_depth_is_a_shorter_llama(directory):  # noqa: F811
    """Against transformers itself, with layers taken off its top."""
    from transformers import LlamaForCausalLM

    tiny = directory("llama")
    engine = engine_of(build(tiny.path, EXITS, drawn=False))
    short = LlamaForCausalLM.from_pretrained(tiny.path, num_hidden_layers=2).eval()
    policy = ExitPolicy(1.0, active=("norm2",))
    for prompt in some_prompts(133):
        events, _ = decode(engine, [Request(tuple(prompt), NUM_NEW)], "static_depth", policy)
        expected = transformers_tokens(short, prompt, eos_token_id=None)
        assert [event.token for event in events[0]][: len(expected)] == expected
    # The control: the whole model says something else.
    assert transformers_tokens(tiny.reference, prompt, eos_token_id=None)[:4] != expected[:4]


def test_sequences_come_and_go_over_megatron_modules(directory):  # noqa: F811
    """In two slots, in three modes: each gets what it gets alone."""
    engine = engine_of(build(directory("llama").path, EXITS, drawn=False))
    modes = [("self_speculative", ALWAYS), ("static_depth", ExitPolicy(0.0, active=("layer1",))), ("full", None)]
    requests = [
        Request(tuple(prompt), 4 + 3 * index, mode=modes[index % 3][0], policy=modes[index % 3][1])
        for index, prompt in enumerate(some_prompts(133, (5, 3, 7, 2, 4)))
    ]
    session = engine.start([], mode="full", exits=("mlp1", "layer1", "norm2"), num_slots=2, max_length=24)
    to_come, events = list(requests), []
    while to_come or not session.finished:
        if to_come and session.num_free_slots:
            session.add(to_come.pop(0))
        events += session.step()
    for index, request in enumerate(requests):
        (alone,), _ = decode(engine, [request], "full", None)
        together = [event for event in events if event.sequence == index]
        assert [(e.token, e.exit) for e in alone] == [(e.token, e.exit) for e in together]
