# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that an earlier commit wrote load and decode to the tokens and exits that this commit got from them.

tests/data/earlier/make.sh wrote them; expected.json names the commit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import ROOT, user_environment

import torch  # isort: skip  # after the CPU host is on
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.loader import load_model, load_tokenizer

EARLIER = ROOT / "tests" / "data" / "earlier"
ANSWERS = json.loads((EARLIER / "expected.json").read_text(encoding="utf-8"))["answers"]
PROMPTS = [r"for i in range(7):\n", "print("]  # Hydra reads no escapes: a backslash and an n
THRESHOLD, NEW_TOKENS = 0.03, 24


def run(script: str, *overrides: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"megatron_gpt_early_exit_{script}.py"), *overrides]
    done = subprocess.run(
        [*command, "trainer.accelerator=cpu"], env=user_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def generated(path: Path, output: Path, *overrides: str) -> list[list[list]]:
    """[token id, exit] of every token of both answers."""
    prompts = ", ".join(f'"{prompt}"' for prompt in PROMPTS)
    settings = [f"threshold={THRESHOLD}", f"tokens_to_generate={NEW_TOKENS}", "stop_on_eos=False", f"output={output}"]
    run("generate", f"model.restore_from_path={path}", f"prompts=[{prompts}]", *settings, *overrides)
    lines = output.read_text(encoding="utf-8").splitlines()
    return [[[token["id"], token["exit"]] for token in json.loads(line)["tokens"]] for line in lines]


def test_the_answers_say_something() -> None:
    exits = [exit for answer in ANSWERS["complete-early_exit"] for _, exit in answer]
    assert len(set(exits)) == 3, "two exits and the final one"
    assert ANSWERS["resumed-early_exit"] != ANSWERS["complete-early_exit"]


def test_a_complete_file(tmp_path: Path) -> None:
    assert generated(EARLIER / "complete.nemo", tmp_path / "out.jsonl") == ANSWERS["complete-early_exit"]


def test_an_exits_only_file(tmp_path: Path) -> None:
    backbone = f"model.backbone_path={EARLIER / 'complete.nemo'}"
    answers = generated(EARLIER / "exits.nemo", tmp_path / "out.jsonl", backbone, "mode=self_speculative")
    assert answers == ANSWERS["complete-self_speculative"]


@pytest.mark.parametrize("mode", ["early_exit", "self_speculative"])
def test_an_export(mode: str) -> None:
    directory = EARLIER / "export" / "hf_early_exit"
    tokenizer, engine = load_tokenizer(directory), EarlyExitEngine(load_model(directory))
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    result = engine.generate(prompts, max_new_tokens=NEW_TOKENS, mode=mode, policy=ExitPolicy(THRESHOLD))
    answers: list[list[list]] = [[], []]
    for event in result.events:
        answers[event.sequence].append([event.token, event.exit or "final"])
    assert answers == ANSWERS[f"complete-{mode}"]


def test_the_code_in_an_export(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    # transformers names a directory's modules after its last folder, once per process: not that of today's exports
    directory = shutil.copytree(EARLIER / "export" / "hf_early_exit", tmp_path / "hf_early_exit_of_9a1bd94")
    prompt = torch.tensor([load_tokenizer(directory)(PROMPTS[0])["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    ids = model.generate(prompt, max_new_tokens=NEW_TOKENS, eos_token_id=None, early_exit_threshold=THRESHOLD)
    assert ids[0, prompt.shape[1] :].tolist() == [token for token, _ in ANSWERS["complete-early_exit"][0]]


def resumed(folder: Path, *overrides: str) -> Path:
    """The `.nemo` of the run in `folder / "run"`, resumed from step 4 for four more steps."""
    data = f"[{EARLIER / 'data'}]"
    run(
        "tune", f"model.restore_from_path={EARLIER / 'complete.nemo'}", f"save_to={folder / 'resumed.nemo'}",
        f"exp_manager.explicit_log_dir={folder / 'run'}", "trainer.max_steps=8", "trainer.precision=32",
        "model.micro_batch_size=2", "model.global_batch_size=4", "model.encoder_seq_length=32",
        "trainer.val_check_interval=4", "trainer.limit_val_batches=2", "trainer.log_every_n_steps=1",
        "model.optim.lr=1e-2", "model.optim.sched.min_lr=1e-3", "model.optim.sched.name=Constant",
        "trainer.enable_progress_bar=False", "exp_manager.checkpoint_callback_params.save_top_k=0",
        f"model.data.index_mapping_dir={folder / 'index'}",
        f"model.data.data_prefix={{train: {data}, validation: {data}, test: {data}}}", *overrides,
    )  # fmt: skip
    return folder / "resumed.nemo"


def test_a_training_checkpoint_goes_on(tmp_path: Path) -> None:
    """A run of four steps, resumed for four more, ends with the exits of the earlier commit's own resumed run."""
    shutil.copytree(EARLIER / "run", tmp_path / "run" / "checkpoints")
    assert generated(resumed(tmp_path), tmp_path / "out.jsonl") == ANSWERS["resumed-early_exit"]


class _Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_training_checkpoint_that_would_run_code_needs_trust(tmp_path: Path) -> None:
    from nemo_ee.checkpoint.restricted_pickle import UnsafeCheckpointError
    from nemo_ee.models.trainer import EarlyExitStrategy

    shutil.copytree(EARLIER / "run", tmp_path / "run" / "checkpoints")
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    bait = tmp_path / "executed"
    torch.save({**common, "more": _Touch(bait)}, checkpoint / "common.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"common\.pt: refused.*system.*model\.trust_checkpoint=true"):
        EarlyExitStrategy().load_checkpoint(checkpoint)
    assert not bait.exists()
    assert resumed(tmp_path, "model.trust_checkpoint=True").is_file()
    assert bait.exists(), "control: trusting it runs it"
