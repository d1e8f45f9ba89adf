# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A real small transformer on the engine, against a decoder that recomputes everything at every step."""

from __future__ import annotations

import random

import pytest
import torch

from nemo_ee.exits.config import ExitConfig
from nemo_ee.generation.engine import EarlyExitEngine, Request
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.reference import decode
from nemo_ee.generation.sampling import SamplingParams
from tests.helpers.reference_decoder import PlainTransformer, hidden_by_stop, logits_at
from tests.helpers.stub_models import TinyTransformer, random_probes

ARCHITECTURES = ("embedding", "norm", "mlp", "layer")
EDGES = {"max_probability": (0.2, 0.9), "margin": (0.05, 0.8), "entropy": (0.3, 2.5), "probe": (0.2, 0.8)}


def exit_at(layer, architecture, name=None):
    return ExitConfig(name or f"layer{layer}-{architecture}", layer, architecture, "random", "own")


ALL_KINDS = [exit_at(1, "layer"), exit_at(2, "mlp"), exit_at(2, "norm"), exit_at(3, "embedding"), exit_at(4, "norm")]


def random_case(seed):
    """A model, a policy and ragged prompts."""
    rng = random.Random(seed)
    num_layers = rng.randint(3, 6)
    exits = {}
    for _ in range(rng.randint(1, 5)):
        exit = exit_at(rng.randint(1, num_layers), rng.choice(ARCHITECTURES))
        exits[exit.name] = exit
    model = TinyTransformer(list(exits.values()), num_layers=num_layers, seed=seed)
    model.exits = random_probes(model.exits, model.hidden_size, seed=seed)
    criterion = rng.choice(list(EDGES))
    active = [name for name in exits if rng.random() < 0.8]
    thresholds = {name: rng.uniform(*EDGES[criterion]) for name in active}
    caps = dict.fromkeys(("max_pending_tokens", "num_draft_tokens"), rng.choice([None, None, 0, 1, 3]))
    policy = ExitPolicy(thresholds, criterion=criterion, active=tuple(active), **caps)
    prompts = [[rng.randrange(model.vocab_size) for _ in range(rng.randint(1, 7))] for _ in range(rng.randint(1, 4))]
    return model, policy, prompts, [rng.randint(1, 14) for _ in prompts]


def reference(model, policy, prompt, count, forced=None):
    return decode(
        PlainTransformer(model),
        prompt,
        count,
        thresholds=policy.thresholds,
        criterion=policy.criterion,
        max_pending_tokens=policy.max_pending_tokens,
        forced=forced,
    )


@pytest.mark.parametrize("seed", range(40))
def test_tokens_exits_and_logprobs_equal_the_naive_decoder(seed):
    model, policy, prompts, lengths = random_case(seed)
    result = EarlyExitEngine(model).generate(prompts, max_new_tokens=lengths, policy=policy)
    for index, (prompt, count) in enumerate(zip(prompts, lengths, strict=True)):
        tokens, exits, rows = reference(model, policy, prompt, count)
        events = result.events_of(index)
        assert list(result.tokens[index]) == tokens
        assert [event.exit for event in events] == exits
        expected = [float(row.log_softmax(0)[token]) for row, token in zip(rows, tokens, strict=True)]
        assert [event.logprob for event in events] == pytest.approx(expected, abs=1e-4)


def test_the_random_cases_do_leave_early_at_every_kind_of_exit():
    """The control of the test above: it would prove little if nothing left."""
    left = set()
    for seed in range(40):
        model, policy, prompts, lengths = random_case(seed)
        events = EarlyExitEngine(model).generate(prompts, max_new_tokens=lengths, policy=policy).events
        left |= {event.exit and model.configs[event.exit].architecture for event in events}
    assert left == {None, *ARCHITECTURES}


@pytest.mark.parametrize("seed", range(8))
def test_thresholds_never_met_is_full_greedy_decoding(seed):
    model = TinyTransformer(ALL_KINDS, seed=seed, sharpness=0.5)
    prompts = [[1, 2, 3], [4]]
    full = EarlyExitEngine(model).generate(prompts, max_new_tokens=15, mode="full")
    # With the first, every exit is asked and none is sure; with 1.0 none is even asked.
    for threshold, questions in ((0.9999, 2 * 14), (1.0, 0)):
        early = EarlyExitEngine(model).generate(prompts, max_new_tokens=15, policy=ExitPolicy(threshold))
        assert early.tokens == full.tokens
        assert {event.exit for event in early.events} == {None}
        assert [early.stats.evaluations[exit.name] for exit in ALL_KINDS] == [questions] * len(ALL_KINDS)
    assert list(full.tokens[0]) == decode(PlainTransformer(model), prompts[0], 15, thresholds={})[0]


@pytest.mark.parametrize("seed", range(12))
def test_after_flush_the_cache_is_that_of_a_full_depth_run(seed):
    model, policy, prompts, lengths = random_case(seed + 100)
    requests = [Request(tuple(p), n) for p, n in zip(prompts, lengths, strict=True)]
    session = EarlyExitEngine(model).start(requests, policy=policy)
    texts = [list(p) for p in prompts]
    while not session.finished:
        for event in session.step():
            texts[event.sequence].append(event.token)
    session.flush()
    # The last token of a sequence never runs.
    full = EarlyExitEngine(model).start([Request(tuple(own[:-1]), 1) for own in texts], mode="full")
    full.step()
    for layer in range(1, model.num_layers + 1):
        valid = full.cache.valid(layer)
        assert torch.equal(session.cache.valid(layer)[:, : valid.shape[1]], valid)
        assert session.cache.valid(layer).sum() == valid.sum() == sum(len(own) - 1 for own in texts)
        for kind in ("keys", "values"):
            ours, theirs = getattr(session.cache, kind)(layer), getattr(full.cache, kind)(layer)
            ours = ours[:, :, : valid.shape[1]].transpose(1, 2)[valid]
            torch.testing.assert_close(ours, theirs.transpose(1, 2)[valid], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_a_batch_gives_each_sequence_what_it_gets_alone(seed, greedy):
    model, policy, prompts, lengths = random_case(seed + 200)
    prompts, lengths = [*prompts, prompts[0]], [*lengths, 9]
    sampling = [SamplingParams(greedy=greedy, seed=i, top_p=0.9, repetition_penalty=1.2) for i in range(len(prompts))]
    engine = EarlyExitEngine(model)
    batch = engine.generate(prompts, max_new_tokens=lengths, policy=policy, sampling=sampling, stop_tokens=[3])
    for index, prompt in enumerate(prompts):
        alone = engine.generate(
            [prompt], max_new_tokens=lengths[index], policy=policy, sampling=sampling[index], stop_tokens=[3]
        )
        assert alone.tokens[0] == batch.tokens[index]
        assert alone.finish_reasons[0] == batch.finish_reasons[index]
        assert [e.exit for e in alone.events] == [e.exit for e in batch.events_of(index)]


def test_sampled_tokens_depend_on_the_seed_and_exits_on_the_distribution_only():
    model = TinyTransformer(ALL_KINDS, seed=3, sharpness=2.0)
    engine, policy = EarlyExitEngine(model), ExitPolicy(0.3)
    results = [
        engine.generate([[1, 2]], max_new_tokens=12, policy=policy, sampling=SamplingParams(greedy=False, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert results[0].events == results[1].events and results[0].tokens != results[2].tokens
    # The second token is read after different first tokens only if those differ; the first is read at the same place.
    assert results[0].events[0].confidence == results[2].events[0].confidence


@pytest.mark.parametrize("seed", range(25))
def test_scoring_equals_feeding_the_text_token_by_token(seed):
    model, policy, prompts, lengths = random_case(seed + 300)
    rng = random.Random(seed)
    texts = [
        own + [rng.randrange(model.vocab_size) for _ in range(n)] for own, n in zip(prompts, lengths, strict=True)
    ]
    contexts = [len(own) for own in prompts]
    result = EarlyExitEngine(model).score(texts, contexts, policy=policy)
    for index, (text, context) in enumerate(zip(texts, contexts, strict=True)):
        scored = text[context:]
        _, exits, rows = reference(model, policy, text[:context], len(scored), forced=scored)
        assert list(result.exits[index]) == exits
        expected = [float(row.log_softmax(0)[token]) for row, token in zip(rows, scored, strict=True)]
        assert list(result.logprobs[index]) == pytest.approx(expected, abs=1e-4)
        assert list(result.is_greedy[index]) == [int(row.argmax()) == t for row, t in zip(rows, scored, strict=True)]
    assert [e.token for e in result.events] == [t for own, c in zip(texts, contexts, strict=True) for t in own[c:]]


@pytest.mark.parametrize("seed", range(10))
def test_scoring_generated_text_gives_its_events(seed):
    model, policy, prompts, lengths = random_case(seed + 400)
    engine = EarlyExitEngine(model)
    generated = engine.generate(prompts, max_new_tokens=lengths, policy=policy)
    texts = [own + list(new) for own, new in zip(prompts, generated.tokens, strict=True)]
    scored = engine.score(texts, [len(own) for own in prompts], policy=policy)
    for index in range(len(prompts)):
        for ours, theirs in zip(
            [e for e in scored.events if e.sequence == index], generated.events_of(index), strict=True
        ):
            assert (ours.position, ours.token, ours.exit, ours.layer) == (
                theirs.position,
                theirs.token,
                theirs.exit,
                theirs.layer,
            )
            assert (ours.logprob, ours.confidence) == pytest.approx((theirs.logprob, theirs.confidence), abs=1e-4)
            assert ours.finish_reason == theirs.finish_reason
    assert all(all(own) for own in scored.is_greedy)
    assert scored.stats.tokens_per_exit == generated.stats.tokens_per_exit


def test_scoring_in_small_questions_changes_nothing(monkeypatch):
    model, policy, prompts, _ = random_case(7)
    texts = [own + [1, 2, 3, 4, 5, 6] for own in prompts]
    whole = EarlyExitEngine(model).score(texts, 1, policy=policy)
    monkeypatch.setattr("nemo_ee.generation.teacher_forcing.LOGITS_PER_CALL", 2 * model.vocab_size)
    pieces = EarlyExitEngine(model).score(texts, 1, policy=policy)
    assert pieces.exits == whole.exits and pieces.stats == whole.stats
    assert sum(pieces.logprobs, ()) == pytest.approx(sum(whole.logprobs, ()), abs=1e-5)


def test_the_reference_itself_reads_every_exit_from_the_right_stop():
    """The control of the reference: output an exit one stop off gives other logits."""
    model = TinyTransformer(ALL_KINDS, seed=0)
    states = hidden_by_stop(model, [1, 2, 3])
    for exit in ALL_KINDS:
        shifted = list(states)
        shifted[exit.stop] = states[exit.stop - 1]
        assert not torch.allclose(logits_at(model, exit.name, states), logits_at(model, exit.name, shifted), atol=1e-2)
