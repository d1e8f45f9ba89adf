# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Mode `self_speculative`, greedy: by script, against a naive decoder, and always the full model's output."""

from __future__ import annotations

import random

import pytest
import torch

from nemo_ee.generation import session as session_module
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.reference import speculate
from nemo_ee.generation.request import Request
from nemo_ee.generation.sampling import SamplingParams
from tests.helpers.reference_decoder import PlainTransformer
from tests.helpers.stub_models import ScriptedModel, TinyTransformer, exit_points
from tests.unit.generation.test_against_reference import ALL_KINDS, random_case

EXITS = exit_points(("a", 2, 3), ("b", 4, 8))


def truth(token, position):
    return (token * 7 + position * 3 + 1) % 50


def scripted(agrees, is_sure=lambda *_: True, exits=EXITS):
    """Early exits say the final exit's token where `agrees(name, token, position)`, another one elsewhere."""

    def script(name, token, position):
        right = name is None or agrees(name, token, position)
        sure = name is None or is_sure(name, token, position)
        return truth(token, position) if right else (truth(token, position) + 1) % 50, 0.9 if sure else 0.1

    return ScriptedModel(6, exits, script)


def decode(model, requests, policy, mode="self_speculative"):
    """Events of a whole session, how many came with each step, and the session, flushed."""
    session = EarlyExitEngine(model).start(requests, mode=mode, policy=policy)
    events, per_step = [], []
    while not session.finished:
        new = session.step()
        per_step.append(len(new))
        events += new
    session.flush()
    return events, per_step, session


def full_tokens(request):
    """Tokens and finish reason of the truth itself."""
    tokens = list(request.prompt)
    while True:
        tokens.append(truth(tokens[-1], len(tokens) - 1))
        if tokens[-1] in request.stop_tokens:
            return tokens[len(request.prompt) :], "stop"
        if len(tokens) == len(request.prompt) + request.max_new_tokens:
            return tokens[len(request.prompt) :], "length"


def test_drafts_that_always_agree_are_all_kept_and_nothing_is_computed_twice():
    model = scripted(lambda *_: True)
    request = Request((1, 2), 12)
    events, per_step, session = decode(model, [request], ExitPolicy(0.5, num_draft_tokens=3))
    assert [event.token for event in events] == full_tokens(request)[0]
    # The prompt's token; three drafts, then a check that gives four; twice; then two drafts and the last token.
    assert per_step == [1, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 3]
    assert [event.exit for event in events] == [None, *["a", "a", "a", None] * 2, "a", "a", None]
    assert model.cache.thrown_away == 0
    stats = session.stats(events)
    assert (stats.drafted, stats.accepted, stats.num_verifications) == (8, 8, 3)
    assert stats.acceptance_rate == 1.0 and stats.mean_accepted_length == pytest.approx(8 / 3)
    assert stats.computed_layers == 13 * 6
    # Each check asks the final exit about every draft and the newest token.
    assert stats.evaluations == {"a": 8, "b": 0, "final": 1 + 4 + 4 + 3}
    waiting = [rows for start, stop, rows in model.cache.rows_per_run if (start, stop) == (3, 8)]
    assert waiting == [2, 4, 4, 3], "what waits runs in one batch"


def test_drafts_that_never_agree_cost_but_change_nothing():
    model = scripted(lambda *_: False)
    request = Request((1, 2), 8)
    events, per_step, session = decode(model, [request], ExitPolicy(0.5, num_draft_tokens=2))
    assert [event.token for event in events] == full_tokens(request)[0]
    assert {event.exit for event in events} == {None}
    assert per_step == [1, *[0, 0, 1] * 5, 0, 1, 1]
    stats = session.stats(events)
    assert (stats.drafted, stats.accepted, stats.acceptance_rate) == (11, 0, 0.0)
    # A check of two drafts takes two rows back from all twelve half layers, one of one draft one.
    assert model.cache.thrown_away == (5 * 2 + 1) * 12
    assert stats.computed_layers == 9 * 6 + model.cache.thrown_away / 2


def test_unsure_drafts_are_not_made():
    model = scripted(lambda *_: False, is_sure=lambda *_: False)
    events, per_step, session = decode(model, [Request((1,), 9)], ExitPolicy(0.5))
    assert per_step == [1] * 9 and session.stats(events).num_verifications == 0 and model.cache.thrown_away == 0


def test_the_first_mismatch_cuts_what_follows():
    # Fed positions 1..4 leave at a; the one at 3 is wrong, so two drafts stay and two tokens' work is thrown away.
    model = scripted(lambda name, token, position: position != 3, is_sure=lambda name, t, position: position < 5)
    events, per_step, session = decode(model, [Request((1,), 7)], ExitPolicy(0.5))
    assert per_step == [1, 0, 0, 0, 0, 3, 0, 2, 1]
    assert [event.exit for event in events] == [None, "a", "a", None, "a", None, None]
    assert model.cache.thrown_away == 12 * 2, "positions 4 and 5 ran after the mismatch"
    assert session.stats(events).drafted == 5 and session.stats(events).accepted == 3


@pytest.mark.parametrize("is_real", [True, False])
def test_a_drafted_stop_token_is_checked_before_it_ends_anything(is_real):
    request = Request((1,), 12)
    chain = [1, *full_tokens(request)[0]]
    stop = chain[4] if is_real else (chain[4] + 1) % 50
    assert is_real or stop not in chain
    model = scripted(lambda name, token, position: is_real or position != 3)
    request = Request((1,), 12, stop_tokens=frozenset({stop}))
    events, per_step, session = decode(model, [request], ExitPolicy(0.5))
    assert [event.token for event in events] == full_tokens(request)[0]
    if is_real:
        assert per_step == [1, 0, 0, 0, 3] and events[-1].finish_reason == "stop"
        assert events[-1].exit == "a" and session.stats(events).computed_layers == 4 * 6
    else:
        assert per_step[:5] == [1, 0, 0, 0, 3] and events[3].exit is None and len(events) == 12


def test_ends_is_asked_about_certain_tokens_and_drafts_alike():
    chain = full_tokens(Request((1,), 12))[0]
    seen = []

    def ends(tokens):
        seen.append(list(tokens))
        return tokens[-2:] == chain[5:7]

    for mode in ("self_speculative", "early_exit", "full"):
        model = scripted(lambda *_: True)
        events, _, session = decode(model, [Request((1,), 12, ends=ends)], ExitPolicy(0.5), mode)
        assert [event.token for event in events] == chain[:7] and events[-1].finish_reason == "stop"
        assert all(tokens == chain[: len(tokens)] for tokens in seen)


@pytest.mark.parametrize("mode", ["self_speculative", "early_exit", "full"])
def test_stop_tokens_have_no_probability_before_the_least_length(mode):
    stop = truth(truth(1, 0), 1)  # the second new token
    model = scripted(lambda *_: True)
    free, _, _ = decode(model, [Request((1,), 9, stop_tokens=frozenset({stop}))], ExitPolicy(0.5), mode)
    assert len(free) == 2
    request = Request((1,), 9, stop_tokens=frozenset({stop}), min_new_tokens=5)
    events, _, _ = decode(scripted(lambda *_: True), [request, Request((1,), 3)], ExitPolicy(0.5), mode)
    own = [event for event in events if event.sequence == 0]
    assert len(own) >= 5 and all(event.token != stop for event in own[:4])
    assert [event.token for event in events if event.sequence == 1][1] == stop, "the other one is not held"


def test_an_exit_at_the_very_end_drafts_nothing():
    exits = exit_points(
        ("end", 6, 12),
    )
    model = scripted(lambda *_: False, exits=exits)
    events, per_step, session = decode(model, [Request((1,), 5)], ExitPolicy(0.5))
    assert per_step == [1] * 5 and session.stats(events).evaluations["end"] == 0


@pytest.mark.parametrize("seed", range(60))
def test_random_scripts_caps_and_batches(seed):
    """The truth's tokens; at most once but for what is thrown away (asserted by the model); a batch = alone."""
    rng = random.Random(seed)
    share, right = rng.random(), rng.random()

    def happens(kind, probability):
        return lambda *key: random.Random(f"{seed}/{kind}/{key}").random() < probability

    def model():
        return scripted(happens("agrees", right), happens("sure", share))

    policy = ExitPolicy(
        0.5, active=tuple(n for n in "ab" if rng.random() < 0.8), num_draft_tokens=rng.choice([None, 0, 1, 4])
    )
    requests = [
        Request(
            tuple(rng.randrange(50) for _ in range(rng.randint(1, 5))),
            rng.randint(1, 16),
            stop_tokens=frozenset({13, 21} if rng.random() < 0.5 else ()),
        )
        for _ in range(rng.randint(1, 4))
    ]
    batch = model()
    events, _, session = decode(batch, requests, policy)
    computed = batch.cache.computed
    expected = {(i, p) for i, own in enumerate(requests) for p in range(len(own.prompt))}
    expected |= {(event.sequence, event.position) for event in events if event.finish_reason is None}
    assert all(done == expected for done in computed.values()), "the cache ends as a full run's"
    stats = session.stats(events)
    assert stats.computed_layers == (12 * len(expected) + batch.cache.thrown_away) / 2
    assert stats.accepted == sum(event.exit is not None for event in events) <= stats.drafted
    for index, request in enumerate(requests):
        own = [event for event in events if event.sequence == index]
        assert ([event.token for event in own], own[-1].finish_reason) == full_tokens(request)
        alone, _, _ = decode(model(), [request], policy)
        assert [(e.position, e.token, e.exit) for e in alone] == [(e.position, e.token, e.exit) for e in own]


def agreeing_case(seed):
    """`random_case`, but the exits share the final output and the layers change little, so that they often agree."""
    model, policy, prompts, lengths = random_case(seed)
    for layer in (*model.layers, *model.exit_layers.values()):
        for weight in (layer.output, layer.down):
            weight *= random.Random(seed).choice([0.3, 0.6])
    model.outputs = dict.fromkeys(model.outputs, model.outputs[None])
    return model, policy, prompts, lengths


@pytest.mark.parametrize("seed", range(30))
def test_tokens_drafts_and_acceptance_equal_the_naive_decoder(seed):
    model, policy, prompts, lengths = agreeing_case(seed)
    stop = seed % 37
    requests = [Request(tuple(p), n, stop_tokens=frozenset({stop})) for p, n in zip(prompts, lengths, strict=True)]
    events, _, session = decode(model, requests, policy)
    totals = []
    for index, request in enumerate(requests):
        tokens, exits, checks = speculate(
            PlainTransformer(model),
            request.prompt,
            request.max_new_tokens,
            thresholds=policy.thresholds,
            criterion=policy.criterion,
            num_draft_tokens=policy.num_draft_tokens,
            stop_token=stop,
        )
        own = [event for event in events if event.sequence == index]
        assert [event.token for event in own] == tokens and [event.exit for event in own] == exits
        totals += checks
    stats = session.stats(events)
    assert (stats.num_verifications, stats.drafted, stats.accepted) == (
        len(totals),
        *map(sum, zip(*totals or [(0, 0)], strict=True)),
    )
    full, _, _ = decode(model, requests, policy, "full")
    key = lambda event: (event.sequence, event.position)  # noqa: E731
    for ours, theirs in zip(sorted(events, key=key), sorted(full, key=key), strict=True):
        assert (ours.token, ours.finish_reason) == (theirs.token, theirs.finish_reason)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4), "the final exit's, whoever drafted"


@pytest.mark.slow_unit
def test_the_random_cases_accept_and_reject():
    """The control of the test above."""
    drafted = accepted = 0
    for seed in range(30):
        model, policy, prompts, lengths = agreeing_case(seed)
        requests = [Request(tuple(p), n) for p, n in zip(prompts, lengths, strict=True)]
        events, _, session = decode(model, requests, policy)
        drafted += session.stats(events).drafted
        accepted += session.stats(events).accepted
    assert accepted > 50 and drafted - accepted > 50


@pytest.mark.parametrize("seed", range(8))
def test_after_rollbacks_the_cache_is_that_of_a_full_run(seed):
    model = TinyTransformer(ALL_KINDS, seed=seed)
    policy = ExitPolicy(0.15, num_draft_tokens=4)
    requests = [Request((1, 2, 3), 14), Request((9,), 10)]
    events, _, session = decode(model, requests, policy)
    assert session.stats(events).drafted > session.stats(events).accepted, "nothing was rolled back"
    texts = [[*own.prompt, *(e.token for e in events if e.sequence == i)] for i, own in enumerate(requests)]
    full = EarlyExitEngine(model).start(
        [Request(tuple(own[:-1]), 1) for own in texts], mode="full", exits=[exit.name for exit in ALL_KINDS]
    )
    full.step()
    for layer in range(1, model.num_layers + 1):
        valid = full.cache.valid(layer)
        assert torch.equal(session.cache.valid(layer)[:, : valid.shape[1]], valid)
        for kind in ("keys", "values"):
            ours, theirs = getattr(session.cache, kind)(layer), getattr(full.cache, kind)(layer)
            ours = ours[:, :, : valid.shape[1]].transpose(1, 2)[valid]
            torch.testing.assert_close(ours, theirs.transpose(1, 2)[valid], rtol=1e-5, atol=1e-5)


def test_a_repetition_penalty_is_applied_to_draft_and_check_alike():
    model = TinyTransformer(ALL_KINDS, seed=2)
    requests = [Request((1, 2, 3), 20, SamplingParams(repetition_penalty=1.5))]
    outputs = [
        decode(model, requests, ExitPolicy(0.15, num_draft_tokens=4), mode) for mode in ("self_speculative", "full")
    ]
    ours, theirs = ([event.token for event in events] for events, _, _ in outputs)
    assert ours == theirs
    assert 0 < outputs[0][2].stats(outputs[0][0]).accepted
    plain, _, _ = decode(model, [Request((1, 2, 3), 20)], None, "full")
    assert theirs != [event.token for event in plain]


@pytest.mark.parametrize("criterion", ["max_probability", "margin", "entropy"])
def test_every_criterion_drafts(criterion):
    """A threshold in the middle of the criterion's range; the output is the full model's."""
    model, _, prompts, _ = agreeing_case(3)
    requests = [Request(tuple(p), 15) for p in prompts]
    policy = ExitPolicy(2.0 if criterion == "entropy" else 0.1, criterion=criterion)
    events, _, session = decode(model, requests, policy)
    full, _, _ = decode(model, requests, policy, "full")
    tokens = [sorted((e.sequence, e.position, e.token) for e in own) for own in (events, full)]
    assert tokens[0] == tokens[1] and session.stats(events).drafted > 0


def test_scores_are_the_full_models():
    model = TinyTransformer(ALL_KINDS, seed=1)
    scores = [
        EarlyExitEngine(model).score([[1, 2, 3, 4, 5]], 2, mode=mode, policy=ExitPolicy(0.0)).logprobs
        for mode in ("self_speculative", "full", "early_exit")
    ]
    assert scores[0] == scores[1] != scores[2]


def test_a_check_that_keeps_everything_is_noticed(monkeypatch):
    """The control: without the check the output is not the full model's."""

    def keeps(logits, drafts, params, position, previous, num_prompt):
        return iter([(draft.token, True) for draft in drafts])

    monkeypatch.setattr(session_module, "verify", keeps)
    request = Request((1, 2), 8)
    events, _, _ = decode(scripted(lambda *_: False), [request], ExitPolicy(0.5, num_draft_tokens=2))
    assert [event.token for event in events] != full_tokens(request)[0]


def test_no_copy_of_the_text_is_made_where_nobody_reads_it(monkeypatch):
    """A long context costs nothing per token but where a penalty looks at it."""
    choose, verify, lengths = session_module.choose, session_module.verify, []

    def choosing(logits, params, positions, previous, *others):
        lengths.extend(map(len, previous))
        return choose(logits, params, positions, previous, *others)

    def checking(logits, drafts, params, position, previous, num_prompt):
        lengths.append(len(previous))
        return verify(logits, drafts, params, position, previous, num_prompt)

    monkeypatch.setattr(session_module, "choose", choosing)
    monkeypatch.setattr(session_module, "verify", checking)
    for settings, longest in (
        ({}, 0),
        ({"min_p": 0.1, "logit_bias": ((3, 1.0),)}, 0),
        ({"repetition_penalty": 1.1}, 42),
        ({"presence_penalty": 0.5}, 42),
        ({"frequency_penalty": 0.5}, 42),
    ):
        lengths.clear()
        for greedy in (True, False):
            request = Request((1,) * 40, 4, SamplingParams(greedy=greedy, **settings))
            decode(scripted(lambda *_: True), [request], ExitPolicy(0.5))
        assert max(lengths) >= longest and (longest or not any(lengths))
