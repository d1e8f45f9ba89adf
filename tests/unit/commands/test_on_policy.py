# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""On-policy tuning of a tiny model: draft runs, rising acceptance, bound, resuming, and refusals. fp32, bitwise."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nemo_ee.commands.on_policy_settings import OnPolicySettings
from nemo_ee.generation.stats import TokenEvent
from tests.helpers.core_models import core_model, snapshot
from tests.helpers.huggingface_models import save_tiny_model

YAML = Path(__file__).parents[3] / "conf" / "megatron_gpt_early_exit_on_policy.yaml"
EXIT = {"name": "early", "layer": 1, "architecture": "mlp", "init": "random"}


def settings_of(tmp_path: Path, lr: float = 1e-2, **changes: Any) -> OnPolicySettings:
    """The yaml's, small; `answers__x` reaches into a block."""
    values = OmegaConf.to_container(OmegaConf.load(YAML))
    del values["hydra"], values["defaults"]
    for key in ("source", "exits", "prompts"):
        values[key] = str(tmp_path / key)
        (tmp_path / key).touch()
    small = {
        "folder": str(tmp_path / "rounds"), "output": str(tmp_path / "new.nemo"), "rounds": 6, "imitation_share": 0.5,
        "steps_per_round": 6, "tokens_per_step": 60, "buffer_tokens": 120, "answers__prompts_per_round": 4,
        "answers__max_prompt_tokens": 8,
        "answers__max_new_tokens": 12, "answers__num_draft_tokens": 3, "trainer__precision": "32",
        "model__optim": values["model"]["optim"] | {"lr": lr},
    }  # fmt: skip
    for key, value in (small | changes).items():
        block, _, rest = key.partition("__")
        if rest:
            values[block][rest] = value
        else:
            values[block] = value
    return OnPolicySettings.from_config(values)


def tuner_of(tmp_path: Path, **changes: Any) -> Any:
    from nemo_ee.commands.on_policy_tuner import OnPolicyTuner

    folder = tmp_path / "model"
    if not folder.exists():
        save_tiny_model(folder, "llama")
    core = core_model(folder, [EXIT], early_exit={"objective": "distillation", "distillation": {"top_k": 16}})
    prompts = torch.randint(2, core.vocab_size, (6, 4), generator=torch.Generator().manual_seed(2)).tolist()
    settings = settings_of(tmp_path, **changes)
    return OnPolicyTuner(
        core.model, core.early_exit, core.placements, prompts=prompts, stop_tokens=(), settings=settings
    )


# -- draft runs --


def event(position: int, exit: str | None, rejected: str | None = None) -> TokenEvent:
    return TokenEvent(0, position, 7, exit, 1, 0.5, -1.0, rejected=rejected)


def test_draft_runs_of_events() -> None:
    from nemo_ee.commands.on_policy_tuner import draft_runs

    events = [
        event(5, None),  # the first token
        event(6, "a"), event(7, "a"), event(8, None, "a"),  # two accepted, the third rejected
        event(9, None),  # not drafted
        event(10, "a"), event(11, None),  # one accepted, then the final exit's own
        event(12, None, "a"),  # rejected at once
        event(13, "a"), event(14, "a"),  # the last token is a draft
    ]  # fmt: skip
    assert draft_runs(events) == ((6, 3), (10, 1), (12, 1), (13, 2))
    assert draft_runs(events[:1]) == ()


def test_runs_hold_as_many_tokens_as_the_engine_counts(tmp_path: Path) -> None:
    tuner = tuner_of(tmp_path)
    own = tuner.settings.answers
    result = tuner.engine.generate(
        tuner.prompts, max_new_tokens=own.max_new_tokens, mode="self_speculative", policy=tuner.policy
    )
    from nemo_ee.commands.on_policy_tuner import draft_runs

    runs = [run for index in range(len(tuner.prompts)) for run in draft_runs(result.events_of(index))]
    rejected = sum(event.rejected is not None for event in result.events)
    assert rejected and len(runs) == result.stats.num_verifications
    assert sum(verified for _, verified in runs) == result.stats.accepted + rejected <= result.stats.drafted


# -- rounds --


@pytest.mark.parametrize("share", [1.0, 0.3, 0.0], ids=["imitation", "both", "reward"])
def test_rounds_raise_the_accepted_tokens_of_a_verification(tmp_path: Path, share: float) -> None:
    tuner = tuner_of(tmp_path, imitation_share=share, rounds=10)
    backbone = {name: value.clone() for name, value in tuner.tuner.context.model.backbone_named_parameters()}
    for numbers in tuner.rounds():
        assert tuner.buffer.num_tokens <= tuner.settings.buffer_tokens
        assert ("expected_accepted" in numbers) == (numbers["round"] > 10 * share)
    first, last = (tuner.log[index]["accepted_per_verification"] for index in (0, -1))
    assert last > first + 0.3, (first, last)
    for name, value in tuner.tuner.context.model.backbone_named_parameters():
        assert torch.equal(value, backbone[name]), name


def test_with_steps_too_small_to_matter_nothing_rises(tmp_path: Path) -> None:
    """Control of the test above."""
    still = tuner_of(tmp_path, lr=1e-6, rounds=10)
    assert max(one["accepted_per_verification"] for one in still.rounds()) < 0.3


def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = tuner_of(tmp_path, folder=str(tmp_path / "whole"))
    assert len(list(whole.rounds())) == 6
    for stop in (1, 3, 5):
        folder = tmp_path / f"killed{stop}"
        killed = tuner_of(tmp_path, folder=str(folder))
        list(itertools.islice(killed.rounds(), stop))
        killed.answer(), killed.tune()  # work of a round that never ended
        (folder / "round-00099.partial").mkdir()
        again = tuner_of(tmp_path, folder=str(folder))
        again.resume()
        assert again.round == stop and len(list(again.rounds())) == 6 - stop
        assert again.log == whole.log
        assert [path.name for path in folder.iterdir() if path.suffix != ".partial"] == ["round-00006"]
        ours, theirs = (snapshot(one.tuner.context.model) for one in (again, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = tuner_of(tmp_path, folder=str(tmp_path / "other"), seed=5)
    assert [one["loss"] for one in other.rounds()] != [one["loss"] for one in whole.log], "control"


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    list(itertools.islice(tuner_of(tmp_path).rounds(), 1))
    other = tuner_of(tmp_path, seed=99, steps_per_round=7)
    with pytest.raises(ValueError, match=r"holds a run with other settings \(steps_per_round, seed\); restore them"):
        other.resume()


# -- rewards --


def test_a_step_on_answers_without_drafts_changes_no_more_than_the_decay(tmp_path: Path) -> None:
    from nemo_ee.data.replay_buffer import Answer

    tuner = tuner_of(tmp_path, imitation_share=0.0, steps_per_round=1, lr=1e-6)
    before = snapshot(tuner.tuner.context.model)
    tuner.buffer.add(Answer((3, 4, 5, 6), ()))
    assert tuner.tune()["expected_accepted"] == 0.0
    for name, value in snapshot(tuner.tuner.context.model).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-7)


def test_answers_without_drafts_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_ee.commands import on_policy_tuner

    of = on_policy_tuner.draft_runs
    monkeypatch.setattr(on_policy_tuner, "draft_runs", lambda events: () if events[0].sequence == 0 else of(events))
    tuner = tuner_of(tmp_path)
    tuner.answer()
    assert len(tuner.buffer.answers) == 3 and all(answer.runs for answer in tuner.buffer.answers)


def test_the_share_of_imitation_is_whole_rounds(tmp_path: Path) -> None:
    assert 0.55 * 100 > 55, "floating point"
    tuner = tuner_of(tmp_path, imitation_share=0.55, rounds=100, steps_per_round=1)
    tuner.answer()
    for round, rewards in ((54, False), (55, True)):
        tuner.round = round
        assert ("expected_accepted" in tuner.tune()) == rewards


def test_only_imitation_runs_the_final_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_ee.megatron.pipeline.teacher_channel import TeacherChannel

    def fail(*_: Any) -> None:
        raise AssertionError("asked for the final exit")

    monkeypatch.setattr(TeacherChannel, "after_forward", fail)
    reward = tuner_of(tmp_path, imitation_share=0.0)
    reward.answer()
    assert reward.tune()["expected_accepted"] > 0
    imitation = tuner_of(tmp_path, imitation_share=1.0)
    imitation.answer()
    with pytest.raises(AssertionError, match="asked for the final exit"):
        imitation.tune()


# -- refusals --


def test_a_threshold_that_nothing_passes_is_named(tmp_path: Path) -> None:
    tuner = tuner_of(tmp_path, answers__threshold=0.9999)
    with pytest.raises(ValueError, match=r"no token was drafted in round 1, .* answers.threshold=0.9999; lower it"):
        list(tuner.rounds())
    assert not (tmp_path / "rounds").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source": "nowhere"}, "source='nowhere' does not exist; check the name"),
        ({"buffer_tokens": 59}, "buffer_tokens=59 must be at least tokens_per_step=60"),
        ({"answers__max_new_tokens": 113}, "prompt and answer may have 121 tokens, buffer_tokens=120; raise it"),
        ({"answers__max_new_tokens": 1}, "at least 2, since the first token is never drafted"),
        ({"answers__threshold": 1.0}, "must be below 1, because no token would be drafted"),
        ({"imitation_share": 1.5}, "imitation_share=1.5 must"),
        (
            {"answers__greedy": False, "answers__temperature": 0.7},
            "must be sampled at temperature 1 where they are rewarded, because the reward is that of drafts at "
            "temperature 1; set answers.temperature=1.0 instead of 0.7, or imitation_share=1.0",
        ),
        ({"roundz": 3}, "roundz=3 is not a setting here (did you mean rounds?)"),
    ],
)
def test_wrong_settings_get_one_clear_message(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        settings_of(tmp_path, **changes)
    assert message in str(caught.value)


def test_a_temperature_is_free_where_nothing_is_rewarded(tmp_path: Path) -> None:
    settings_of(tmp_path, answers__greedy=False, answers__temperature=0.7, imitation_share=1.0)
    settings_of(tmp_path, answers__greedy=True, answers__temperature=0.7)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "file/rounds"):
        with pytest.raises(ValueError, match=r"folder=.* must be a directory, and .*file is a file; name another"):
            settings_of(tmp_path, folder=str(tmp_path / folder))
    settings_of(tmp_path, folder=str(tmp_path / "new" / "rounds"))
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=rf"folder=.* cannot be written, {tmp_path} is read-only; name another"):
        settings_of(tmp_path, folder=str(tmp_path / "new" / "rounds"))


class Letters:
    """A tokenizer of letters, with a template if there is one."""

    bos_token_id = None

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return "|".join(message["content"] for message in messages) + ">"


def test_prompts_are_texts_or_conversations_up_to_the_last_answer(tmp_path: Path) -> None:
    from nemo_ee.commands.on_policy import read_prompts

    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "ab"}\n{"prompt": "much too long"}\n'
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
    )
    settings = settings_of(tmp_path, prompts=str(file))
    assert read_prompts(settings, Letters("x")) == [[97, 98], [ord("q"), ord(">")]]
    with pytest.raises(ValueError, match=r'prompts.jsonl:3: "messages" need a tokenizer with a chat template'):
        read_prompts(settings, Letters(None))
    file.write_text('{"prompt": 3}\n[]\n')
    with pytest.raises(ValueError) as caught:
        read_prompts(settings, Letters("x"))
    assert str(caught.value).count('must be an object with a text under "prompt"') == 2
    file.write_text('{"prompt": "much too long"}\n')
    with pytest.raises(ValueError, match="none of its 1 prompts has 1 to 8 tokens; give others, or raise"):
        read_prompts(settings, Letters("x"))
