# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The text generator on a model that answers by script: where answers end, sums of statistics, answers that fail."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import megatron_models  # noqa: F401  (switches the CPU host on before NeMo is imported)
from tests.helpers.stub_models import ScriptedModel, exit_points


class Letters:
    """One token per character; `$` ends a text."""

    bos_id, eos_id = None, ord("$")

    def text_to_ids(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def ids_to_text(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def scripted(**changes: Any):
    """A generator over a model that wants to end at once and would otherwise say `b`."""
    from nemo_ee.commands.generate import TextGenerator
    from nemo_ee.commands.generation_request import GenerationRequest

    request = GenerationRequest.model_construct(
        **{
            "mode": "early_exit", "threshold": 0.5, "criterion": "max_probability", "exits": None,
            "max_pending_tokens": None, "num_draft_tokens": None, "cost_rule": "none", "cost_table": None,
            "draft_rule": "fixed", "greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0,
            "repetition_penalty": 1.0, "end_strings": (), "min_tokens_to_generate": 0, "tokens_to_generate": 6,
            "add_BOS": None, "stop_on_eos": True, "batch_size": 2, **changes,
        }
    )  # fmt: skip
    model = ScriptedModel(4, exit_points(("early", 2, 4)), lambda exit, token, position: (ord("$"), 0.9), 128)
    return TextGenerator(model, Letters(), request)


def test_the_end_of_text_token_ends_an_answer():
    answers = list(scripted().generate(["ab", "c", "d"]))
    assert [answer.text for answer in answers] == ["$", "$", "$"]
    assert [answer.finish_reason for answer in answers] == ["stop"] * 3
    assert [answer.text for answer in scripted(stop_on_eos=False).generate(["ab"])] == ["$" * 6]


def test_an_answer_is_not_shorter_than_asked_for():
    answers = list(scripted(min_tokens_to_generate=4).generate(["ab", "c", "d"]))
    for answer in answers:
        assert "$" not in answer.text[:4] and answer.text[4:] == "$", "four tokens, then the end"
        assert len(answer.events) == 5 and answer.finish_reason == "stop"


@pytest.mark.parametrize("mode", ["early_exit", "self_speculative", "full"])
def test_the_cost_rule_measures_and_answers(mode):
    """On this model the text does not depend on where a token leaves; whether exits pay is the machine's business."""
    plain, ruled = (
        scripted(mode=mode, cost_rule=rule, tokens_to_generate=24, stop_on_eos=False) for rule in ("none", "fallback")
    )
    prompts = ["ab", "c", "d"]
    assert [own.text for own in ruled.generate(prompts)] == [own.text for own in plain.generate(prompts)]


def test_drafts_by_value_keep_the_text():
    full, by_value = (
        scripted(mode=mode, draft_rule=rule, tokens_to_generate=24, stop_on_eos=False)
        for mode, rule in (("full", "fixed"), ("self_speculative", "value"))
    )
    prompts = ["ab", "c", "d"]
    assert [own.text for own in by_value.generate(prompts)] == [own.text for own in full.generate(prompts)]


@pytest.mark.parametrize("mode", ["early_exit", "self_speculative", "static_depth", "full"])
def test_an_end_string_ends_an_answer_which_keeps_it(mode):
    """The model counts up: 'ab' goes on with 'cdef...'."""
    generator = scripted(mode=mode, tokens_to_generate=9, end_strings=("hi", "de"))
    generator.model.script = lambda exit, token, position: (token + 1, 0.9)
    answers = list(generator.generate(["ab", "c", "e"]))
    assert [answer.text for answer in answers] == ["cde", "de", "fghi"]
    assert {answer.finish_reason for answer in answers} == {"stop"}


def test_stats_are_summed_over_batches():
    generator = scripted(stop_on_eos=False)
    shown = []
    answers = [
        *generator.generate(["ab", "c"], on_token=shown.append),
        *generator.generate(["d"], on_token=shown.append),
    ]
    assert generator.stats.num_tokens == 18 == sum(len(answer.events) for answer in answers) == len(shown)
    assert generator.stats.tokens_per_exit == {"early": 15, "final": 3}
    assert generator.stats.mean_depth == pytest.approx((15 * 2 + 3 * 4) / 18)
    assert generator.stats.num_prompt_tokens == 4


# -- what fails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_answer_that_fails_does_not_end_the_others(batch_size):
    """The model counts up from the prompt; after `z` its logits are not numbers."""
    generator = scripted(batch_size=batch_size)
    generator.model.script = lambda exit, token, position: (token + 1, float("nan") if token == ord("z") else 0.9)
    answers = list(generator.generate(["ab", "x", "d"]))
    assert [answer.text for answer in answers] == ["cdefgh", "yz", "efghij"]
    assert [answer.finish_reason for answer in answers] == ["length", "error", "length"]
    assert "the logits for position 3 from the final exit are not numbers" in answers[1].error
    assert answers[1].to_mapping()["error"] == answers[1].error and "error" not in answers[0].to_mapping()
    assert generator.num_failed == 1 and generator.stats.num_tokens == 14


def test_tokens_the_model_does_not_have_are_refused_together():
    generator, shown = scripted(), []
    with pytest.raises(ValueError) as caught:
        next(generator.generate(["ab", "é", "c", "€"], on_token=shown.append))
    assert "prompt 1: token 233 outside the vocabulary 0..127" in str(caught.value) and not shown
    assert "prompt 3: token 8364 outside" in str(caught.value)
