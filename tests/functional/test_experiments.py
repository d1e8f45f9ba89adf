# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""experiments/: every yaml is a valid one, and the code of each command runs at a tiny size."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("nemo")

from nemo_ee.exits.config import EarlyExitConfig
from tests.helpers.huggingface_models import save_tiny_model
from tests.helpers.megatron_models import script_config, write_data
from tests.helpers.served_model import REFERENCE_MODEL, write_exported_model

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def folder() -> Iterator[None]:
    added = [str(ROOT / name) for name in ("experiments", "examples")]
    sys.path[:0] = added
    try:
        yield
    finally:
        for path in added:
            sys.path.remove(path)


@pytest.fixture(scope="module")
def run(folder: None) -> ModuleType:
    import run

    return run


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exported_model(tmp_path_factory.mktemp("exported") / "hf_early_exit")


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_names_settings_that_there_are(run: ModuleType, name: str) -> None:
    own = run.read(name)
    exits = list(run.exits_of(own.exits))
    EarlyExitConfig.from_mapping({"exits": exits}, num_layers=30)
    for overrides in own.runs.values():
        filled = [part.format(out="/there") for part in (*own.tune, *overrides)]
        with script_config("megatron_gpt_early_exit_tune", ["model.restore_from_path=x", *run.CPU, *filled]) as cfg:
            assert cfg.trainer.max_steps <= 1000
    for command in own.prepare.values():
        assert (ROOT / command[0]).is_file()
    assert all(key == "run" or key == "text" or key in exits[0] for key in own.series)


def test_an_unknown_experiment(run: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no experiment 'architecture'; the experiments are: architectures, "):
        run.read("architecture")


def test_lists_of_settings_become_exits(run: ModuleType) -> None:
    entries = [
        {"name": "{init}-{layer}", "layer": [2, 4], "init": ["copy", "random"]},
        {"name": "low_rank", "layer": 1},
    ]
    assert list(run.exits_of(entries)) == [
        {"name": "copy-2", "layer": 2, "init": "copy"}, {"name": "random-2", "layer": 2, "init": "random"},
        {"name": "copy-4", "layer": 4, "init": "copy"}, {"name": "random-4", "layer": 4, "init": "random"},
        {"name": "low-rank", "layer": 1},
    ]  # fmt: skip


def test_an_experiment_at_a_tiny_size(run: ModuleType, tmp_path: Path) -> None:
    from experiments.pictures import draw_result

    model = tmp_path / "model"
    config = save_tiny_model(model, "llama").config
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (6, 40), generator=generator).tolist()
    write_data(tmp_path / "tokens", tokens)
    own = run.Experiment.from_config({
        "title": "tiny",
        "prepare": {},
        "convert": [f"source={model}"],
        "exits": [{"name": "{init}", "layer": 1, "init": ["copy", "random"], "seed": 3}],
        "tune": [f"model.data.data_prefix={{{{train: [{tmp_path}/tokens], validation: null, test: null}}}}",
                 "model.encoder_seq_length=16", "trainer.limit_val_batches=0"],
        "runs": {"frozen": []},
        "evaluate": {"text": f"{tmp_path}/tokens"},
        "length": 16,
        "max_tokens": 64,
        "series": ["init"],
    })  # fmt: skip
    runner = run.Runner(own, tmp_path / "out", quick=True)
    result = runner.run()
    assert [(row["name"], row["run"], row["text"]) for row in result["rows"]] == [
        ("copy", "frozen", "text"), ("random", "frozen", "text"),
    ]  # fmt: skip
    assert all(row["loss"] != row["loss_before"] for row in result["rows"])
    assert "random" in run.table(result["rows"])
    draw_result(tmp_path / "picture.png", result, own.series)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    again = run.Runner(own, tmp_path / "out", quick=True)
    assert again.run()["rows"] == result["rows"] and not again.seconds, "what is there is not made again"


def test_answers(directory: Path, tmp_path: Path) -> None:
    import answers

    prompts = tmp_path / "prompts.jsonl"
    texts = ["def add(a, b):", "import os", "class A:", "for i in", "x = ["]
    prompts.write_text("".join(f"{json.dumps({'prompt': text})}\n" for text in texts))
    file = tmp_path / "answers.json"
    given = [str(directory), str(prompts), "--new-tokens", "8", "--tuning-prompts", "1", "--measured-prompts", "2"]
    answers.main([*given, "--json", str(file)])
    found = json.loads(file.read_text())
    rows = found["thresholds"]
    assert [row["threshold"] for row in rows] == [0.9, 0.8, 0.6, 0.4, 0.2] and found["num_prompts"] == 5
    depths = [row["depth"] for row in rows]
    assert depths == sorted(depths, reverse=True) and depths[-1] < 1
    assert all(0 <= row[key] <= 1 for row in rows for key in ("exact", "rouge_l"))
    assert found[answers.SPECULATIVE]["same_answers"] == 1.0
    prompts.write_text('{"prompt": "one"}\n')
    with pytest.raises(SystemExit, match="has 1 prompts; give more"):
        answers.main(given)


def test_criteria(directory: Path, tmp_path: Path) -> None:
    import criteria

    file, held_out = tmp_path / "criteria.json", tmp_path / "text.jsonl"
    with gzip.open(REFERENCE_MODEL / "corpus" / "heldout.jsonl.gz", "rt") as lines:
        held_out.write_text("".join(line for line, _ in zip(lines, range(6), strict=False)))
    given = ["--windows", "4", "--window-tokens", "32", "--threads", "1", "--json", str(file)]
    criteria.main([str(directory), str(held_out), *given])
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    assert {row["criterion"] for row in rows} == {"max_probability", "margin", "entropy"}
    assert all((row["threshold"] is None) == (row["accepted"] == 0 and row["correct"] is None) for row in rows)


def test_the_threshold_of_a_criterion_is_the_lowest_that_holds() -> None:
    import criteria

    certainty = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    assert criteria.threshold_for(certainty, torch.tensor([True, True, True, False, False])) == pytest.approx(0.7)
    assert criteria.threshold_for(certainty, torch.tensor([False] + [True] * 4)) is None
    many = torch.linspace(1, 0, 40)
    agrees = torch.tensor([True] * 10 + [False] + [True] * 29)  # 10 of 11 are too few, 39 of 40 are not
    assert criteria.threshold_for(many, agrees) == pytest.approx(0.0)
