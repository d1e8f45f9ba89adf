# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation against Hugging Face transformers on the same text, the same under every layout, and what is refused.

Before tuning, `norm` and `mlp` exits that are copies are the logit lens of their layer: the model's own norm and
output layer on `hidden_states[k]`.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("nemo")

from tests.functional.eval_program import EXITS, LENGTH, NUM_LAYERS, VOCABULARY
from tests.helpers.megatron_models import ROOT, script_config, user_environment, write_data

import torch  # isort: skip  # after the CPU host is on
from torch.nn.functional import cross_entropy

LAYOUTS = ["1,1,1,0", "1,1,2,0", "1,2,1,0", "2,2,1,1"]
# Sums of the same fp32 losses in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `eval_program` left."""
    folder = tmp_path_factory.mktemp("eval")
    command = [sys.executable, "-m", "tests.functional.eval_program", str(folder), *LAYOUTS]
    ran = subprocess.run(command, cwd=ROOT, env=user_environment(), capture_output=True, text=True, timeout=580)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict]:
    """Layout -> exits.json."""
    return {layout: json.loads((folder / layout.replace(",", "") / "exits.json").read_text()) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, torch.Tensor]:
    """Per predicted token, from transformers: losses of the full model and the lenses, and whether a lens agrees."""
    import numpy
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "hugging_face").eval()
    text = torch.from_numpy(numpy.fromfile(folder / "data.bin", dtype=numpy.uint16).astype(numpy.int64))
    values: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(text) - 1, LENGTH):
        window = text[start : start + LENGTH + 1]
        with torch.no_grad():
            answer = model(window[None, :-1], output_hidden_states=True)
            logits = {"full": answer.logits[0]}
            for layer in range(1, NUM_LAYERS):
                logits[f"layer{layer}"] = model.lm_head(model.model.norm(answer.hidden_states[layer]))[0]
        for name, one in logits.items():
            values.setdefault(f"{name} loss", []).append(cross_entropy(one, window[1:], reduction="none"))
            values.setdefault(f"{name} agrees", []).append((one.argmax(-1) == logits["full"].argmax(-1)).double())
    return {name: torch.cat(parts).double() for name, parts in values.items()}


def by_name(result: Mapping) -> dict[str, dict]:
    return {exit["name"]: exit for exit in result["exits"]}


def test_untuned_copies_are_the_logit_lens_of_transformers(results, reference) -> None:
    result = results["1,1,1,0"]
    exits = by_name(result)
    for name, layer in (("layer1-norm", 1), ("layer2-mlp", 2), ("lora", 4)):
        exit = exits[name]
        assert exit["loss"] == pytest.approx(reference[f"layer{layer} loss"].mean().item(), rel=TOLERANCE)
        assert exit["agreement"] == pytest.approx(reference[f"layer{layer} agrees"].mean().item(), abs=1e-9)
        assert exit["layer"] == layer
        assert exit["perplexity"] == pytest.approx(math.exp(exit["loss"]))
    assert result["full_model"]["loss"] == pytest.approx(reference["full loss"].mean().item(), rel=TOLERANCE)
    assert result["tokens"] == len(reference["full loss"]), "every token but the first is predicted once"


def test_the_comparison_with_transformers_can_fail(results, reference) -> None:
    """Controls: the lens of another layer, and one window left out, are outside the tolerances."""
    exit = by_name(results["1,1,1,0"])["layer2-mlp"]
    for layer in (1, 3):
        assert exit["loss"] != pytest.approx(reference[f"layer{layer} loss"].mean().item(), rel=TOLERANCE)
        assert exit["agreement"] != pytest.approx(reference[f"layer{layer} agrees"].mean().item(), abs=1e-9)
    assert exit["loss"] != pytest.approx(reference["layer2 loss"][:-LENGTH].mean().item(), rel=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_measures_the_same(results, layout: str) -> None:
    ours, theirs = results[layout], results["1,1,1,0"]
    assert ours["tokens"] == theirs["tokens"]
    assert ours["full_model"] == pytest.approx(theirs["full_model"], rel=TOLERANCE)
    assert by_name(ours).keys() == by_name(theirs).keys()
    for name, exit in by_name(ours).items():
        for key, value in exit.items():  # trainable parameters too: they are counted over all ranks
            expected = by_name(theirs)[name][key]
            assert value == (expected if isinstance(value, str) else pytest.approx(expected, rel=TOLERANCE)), key


def test_trainable_parameters_are_those_of_the_whole_exit(results) -> None:
    hidden, mlp = 32, 3 * 32 * 80
    assert {name: exit["trainable_parameters"] for name, exit in by_name(results["1,1,1,0"]).items()} == {
        "layer1-norm": VOCABULARY * hidden + hidden,
        "layer2-mlp": VOCABULARY * hidden + hidden + mlp,
        "random": hidden + mlp,
        "lora": 3 * (VOCABULARY + hidden),
    }
    assert [exit["name"] for exit in results["1,1,1,0"]["exits"]] == ["layer1-norm", "layer2-mlp", "random", "lora"]
    assert len(EXITS) == 4


def test_the_picture_is_there_and_nothing_is_half_written(folder: Path) -> None:
    for layout in LAYOUTS:
        files = sorted(file.name for file in (folder / layout.replace(",", "")).iterdir())
        assert files == ["exits.json", "exits.png"]


# -- refused before anything is built -------------------------------------------------------------------------------


def problems_of(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
    from nemo_ee.evaluation import evaluate
    from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(MegatronEarlyExitGPTModel, "restore_from", never)
    monkeypatch.setattr(evaluate, "single_run_trainer", never)
    with script_config("megatron_gpt_early_exit_eval", overrides) as cfg, pytest.raises(ValueError) as caught:
        evaluate.evaluate(cfg)
    return str(caught.value)


def test_everything_missing_is_said_at_once(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = problems_of(monkeypatch, f"output={tmp_path / 'file'}")
    assert "model.restore_from_path is needed and not given" in message
    assert "data is needed and not given; it must be the prefix" in message
    assert "is a file; give a directory" in message
    message = problems_of(monkeypatch, "model.restore_from_path=absent.nemo", "data=absent")
    assert "model.restore_from_path='absent.nemo' does not exist" in message
    assert "absent.bin and absent.idx not found; make the data with scripts/data/preprocess_text.py" in message


def test_problems_of_model_and_text_come_together(folder: Path, monkeypatch, tmp_path: Path) -> None:
    text = write_data(tmp_path / "short", [[1]])
    message = problems_of(
        monkeypatch, f"model.restore_from_path={folder / 'start.nemo'}", f"data={text}",
        "model.encoder_seq_length=65", "model.global_batch_size=3", "model.micro_batch_size=2",
        "model.tensor_model_parallel_size=2", "trainer.devices=2", "model.sequence_parallel=True",
    )  # fmt: skip
    assert "model.encoder_seq_length=65 is not in 1..64, the model's positions" in message
    assert "encoder_seq_length=65 is not a multiple of tensor_model_parallel_size=2" in message
    assert "global_batch_size=3 is not a multiple of micro_batch_size=2" in message
    assert "holds 1 tokens; at least 2 are needed" in message


def test_a_model_without_exits_says_what_to_do(folder: Path, monkeypatch) -> None:
    from omegaconf import OmegaConf

    from nemo_ee.evaluation import evaluate

    read = evaluate.read_config
    bare = {"early_exit": {"exits": []}}
    monkeypatch.setattr(evaluate, "read_config", lambda path: OmegaConf.merge(read(path), bare))
    message = problems_of(monkeypatch, f"model.restore_from_path={folder / 'start.nemo'}", f"data={folder / 'data'}")
    assert "has no exits; add some with examples/megatron_gpt_early_exit_convert.py" in message


def test_a_file_that_is_no_nemo_is_a_problem_like_any_other(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "x.nemo").write_text("not an archive")
    message = problems_of(monkeypatch, f"model.restore_from_path={tmp_path / 'x.nemo'}")
    assert "x.nemo" in message
    assert "data is needed and not given" in message
