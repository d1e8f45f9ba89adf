# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A run of on-policy tuning from file to file: what stays of the file, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.core_models import core_model, exit_entry
from tests.helpers.huggingface_models import save_tiny_model
from tests.unit.commands.test_on_policy import Letters, settings_of

# Settings of the tuning that made the file: with them the run would learn from labels, or nothing at all.
TUNED = {"objective": "cross_entropy", "loss_weight": 0.0, "loss_weight_schedule": "cosine"}
EARLY = exit_entry(1, "mlp", init="random", **TUNED)
OTHER = exit_entry(2, "norm", lr=3e-4, objective="cross_entropy")
BLOCK = {"objective": "mixed", "token_weights": "confidence"}


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the settings of a run on two stored exits in fp32, a directory."""
    from nemo_ee.commands import on_policy

    class Tokenizer(Letters):
        eos_token_id = 2

        def __init__(self) -> None:
            super().__init__(None)

    monkeypatch.setattr(on_policy, "load_tokenizer", lambda _: Tokenizer())
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    save_tiny_model(tmp_path / "hf", "llama")
    write_exits(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ("ab", "cde", "fg", "hi")))
    small = {"source": str(tmp_path / "hf"), "exits": str(tmp_path / "start"), "exit": EARLY["name"], "rounds": 2}
    small |= {"prompts": str(tmp_path / "prompts.jsonl"), "trainer__precision": "bf16", "trainer__accelerator": "cpu"}
    return lambda **changes: settings_of(tmp_path, **(small | changes))


def write_exits(tmp_path: Path, seed: int = 1234) -> None:
    from nemo_ee.checkpoint.exits_file import save
    from nemo_ee.checkpoint.huggingface import HuggingFaceSource

    core = core_model(tmp_path / "hf", [EARLY, OTHER], early_exit=BLOCK, vocab_multiple=128, seed=seed)
    save(core.model, core.early_exit, tmp_path / "start", HuggingFaceSource(tmp_path / "hf"))


def stored(file: Path, source: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Block and exits of a file."""
    from nemo_ee.checkpoint.exits_file import stored_exits
    from nemo_ee.checkpoint.huggingface import HuggingFaceSource

    with stored_exits(file, HuggingFaceSource(source)) as (block, weights):
        keys = weights.keys()
        return block, {key: weights.read(key, (0,) * len(one.shape), one.shape) for key, one in keys.items()}


def test_the_run_changes_the_tuned_exit_and_nothing_else(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_ee.commands import on_policy
    from nemo_ee.commands.on_policy import run
    from nemo_ee.megatron.pipeline.teacher_channel import TeacherChannel

    built, taught = [], []
    stage_of, after_forward = on_policy.stage_of, TeacherChannel.after_forward
    monkeypatch.setattr(on_policy, "stage_of", lambda *own, **more: built.append(1) or stage_of(*own, **more))
    monkeypatch.setattr(TeacherChannel, "after_forward", lambda *own: taught.append(1) or after_forward(*own))
    settings = case()
    lines = list(run(settings))
    assert len(lines) == 4 and lines[-1] == f"tuned exits: {settings.output}"
    assert len(built) == 1, "no second model"
    assert taught, "the entry's own objective does not steer the run"
    (block, start), (new_block, new) = (stored(file, settings.source) for file in (settings.exits, settings.output))
    assert new_block == block and block["objective"] == "mixed"
    assert [one["objective"] for one in new_block["exits"]] == ["cross_entropy"] * 2
    assert new.keys() == start.keys()
    other = [key for key in start if key.startswith(f"{OTHER['name']}.")]
    for key in other:
        assert new[key].dtype == torch.float32 and torch.equal(new[key], start[key]), key
    assert any(not torch.equal(start[key], start[key].bfloat16().float()) for key in other), "control: bf16 differs"
    tuned = [key for key in start if key.startswith(f"{EARLY['name']}.")]
    assert any(not torch.equal(new[key].float(), start[key].bfloat16().float()) for key in tuned), "it was tuned"


def test_exits_of_a_directory_are_part_of_the_run(case: Any, tmp_path: Path) -> None:
    from nemo_ee.checkpoint.exits_file import pack
    from nemo_ee.commands.on_policy import run

    list(run(case()))
    pack(tmp_path / "start", tmp_path / "start.nemo")
    list(run(case(exits=str(tmp_path / "start.nemo"), output=str(tmp_path / "again.nemo"))))  # the same exits
    (tmp_path / "start").rename(tmp_path / "earlier")
    write_exits(tmp_path, seed=77)
    with pytest.raises(ValueError, match=r"holds a run with other settings \(exits\); restore them"):
        list(run(case(output=str(tmp_path / "third.nemo"))))


def test_one_run_in_one_process_uses_a_folder(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_ee.checkpoint.atomic import own_folder
    from nemo_ee.commands.on_policy import run

    settings = case()
    with own_folder(settings.folder), pytest.raises(ValueError, match="rounds is used by another run"):
        list(run(settings))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2, but on-policy tuning runs in one process; start the script"):
        list(run(settings))


@pytest.mark.parametrize(
    ("entries", "name", "message"),
    [
        ([EARLY, OTHER], None, f"name the one to tune, exit={EARLY['name']}"),
        ([EARLY, OTHER], "late", "exit=late is not in"),
        ([exit_entry(2, "embedding", output="shared")], None, "has no weights of its own to tune"),
        ([exit_entry(3, "norm")], None, "is behind layer 3, the last one, where a draft spares nothing"),
    ],
)
def test_exits_that_cannot_be_tuned_are_refused(
    tmp_path: Path, entries: list[dict[str, Any]], name: str | None, message: str
) -> None:
    from nemo_ee.commands.on_policy import chosen

    with pytest.raises(ValueError) as caught:
        chosen(entries, settings_of(tmp_path, exit=name), num_layers=3)
    assert message in str(caught.value)
    assert chosen([exit_entry(3, "mlp")], settings_of(tmp_path), num_layers=3)["layer"] == 3, "in front of its MLP"
