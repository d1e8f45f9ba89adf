# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""experiments/: every yaml is a valid one, and the code of each command runs at a tiny size."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("nemo")

from nemo_ee.evaluation.exit_report import text_windows
from nemo_ee.evaluation.forced_decoding import trace
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.models.tune_settings import TuneSettings
from nemo_ee.runtime.loader import load_model, load_tokenizer
from tests.helpers.huggingface_models import save_tiny_model
from tests.helpers.megatron_models import script_config, user_environment, write_data
from tests.helpers.nemo_files import with_tokenizer
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
    EarlyExitConfig.from_mapping({"exits": exits}, num_layers=30 if own.fetch_smollm2 else 12)
    for overrides in own.runs.values():
        filled = [part.format(out="/there") for part in (*own.tune, *overrides)]
        with script_config("megatron_gpt_early_exit_tune", ["model.restore_from_path=x", *run.CPU, *filled]) as cfg:
            TuneSettings.from_config(cfg)
    for command in own.prepare.values():
        assert (ROOT / command[0]).is_file()


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


def test_an_experiment_at_a_tiny_size(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.pictures import draw_result

    for name in set(os.environ) - set(user_environment()):  # the steps are processes of their own
        monkeypatch.delenv(name)

    model = tmp_path / "model"
    config = save_tiny_model(model, "llama").config
    with_tokenizer(model)
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
    made = (tmp_path / "out" / "frozen.nemo").stat().st_mtime_ns
    again = run.Runner(own, tmp_path / "out", quick=True).run()
    assert (again["rows"], again["steps"]) == (result["rows"], result["steps"])
    assert (tmp_path / "out" / "frozen.nemo").stat().st_mtime_ns == made, "what is there is not made again"
    assert str(tmp_path / "out") not in json.dumps(result), "no path of this machine"
    with pytest.raises(SystemExit, match=r"another command made .*exits\.json; delete"):
        run.Runner(own, tmp_path / "out", quick=False).run()


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
    with pytest.raises(SystemExit, match="has 1 lines .*; give more"):
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
    assert all((row["precision"] is None) == (row["left"] == 0) for row in rows)
    own = load_model(directory)
    windows = text_windows(held_out, load_tokenizer(directory), 32, 4, None)
    traced = trace(own, windows)  # the engine's confidences of the tokens after the first
    for index, point in enumerate(traced.exits):
        found, _ = criteria.measured(own, windows)[point.name, "max_probability"]
        expected = traced.confidences[..., index]
        torch.testing.assert_close(found.view(4, 32)[:, : expected.shape[1]], expected, atol=1e-5, rtol=0)


def test_the_threshold_of_a_criterion_is_the_lowest_that_holds() -> None:
    import criteria

    from nemo_ee.exits.confidence import leaves

    def left(confidences: list[float], agrees: list[bool], criterion: str = "margin") -> list[bool] | None:
        given = torch.tensor(confidences), torch.tensor(agrees)
        threshold = criteria.threshold_for(*given, criterion)
        return None if threshold is None else leaves(given[0], threshold, criterion).tolist()

    assert left([0.9, 0.8, 0.7, 0.6], [True, True, True, False]) == [True, True, True, False]
    assert left([0.1, 0.2, 0.3, 0.4], [True, True, True, False], "entropy") == [True, True, True, False]
    assert left([0.9, 0.8], [False, True]) is None
    assert left([0.5, 0.5, 0.5], [True, True, False]) is None, "tokens of one confidence leave together or not at all"
    assert left([0.5, 0.5, 0.4], [True, True, False]) == [True, True, False]
    many = [1.0 - index / 50 for index in range(40)]
    assert left(many, [True] * 10 + [False] + [True] * 29) == [True] * 40, "10 of 11 are too few, 39 of 40 are not"


PROBLEM = {
    "prompt": "def add(a, b):\n    ",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("return a + b\n", True),
        ("return a - b\n", False),
        ("return (\n", False),
        ("x = ' ' * 2**33\n    return a + b\n", False),
        ("open('/proc/self/cwd/file', 'w').write('x' * 2**22)\n    return a + b\n", False),
    ],
    ids=["right", "wrong", "no-program", "memory", "files"],
)
def test_a_program_passes_or_not(folder: None, completion: str, right: bool) -> None:
    import pass_at_1

    assert pass_at_1.passes(PROBLEM, pass_at_1.completed(PROBLEM, completion)) == right
    if right:
        answer = f"Here it is:\n```python\ndef add(a, b):\n    {completion}```\nIt adds."
        assert pass_at_1.passes(PROBLEM, pass_at_1.answered(PROBLEM, answer))


def test_a_program_without_end(folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import pass_at_1

    monkeypatch.setattr(pass_at_1, "SECONDS", 1)
    assert not pass_at_1.passes(PROBLEM, "while True: pass\n")
    assert not pass_at_1.passes(PROBLEM, pass_at_1.answered(PROBLEM, "I cannot.")), "no program"


def test_pass_at_1(directory: Path, tmp_path: Path) -> None:
    import pass_at_1

    file, problems = tmp_path / "pass-at-1.json", tmp_path / "problems.jsonl"
    # The second passes whatever the model writes: an empty class is called.
    easy = {"prompt": "class A: pass\n", "test": "def check(candidate): candidate()\n", "entry_point": "A"}
    problems.write_text("".join(f"{json.dumps(one)}\n" for one in (PROBLEM, easy)))
    given = [str(directory), str(problems), "--new-tokens", "1", "--thresholds", "0.2", "--json", str(file)]
    with pytest.raises(SystemExit, match="runs code that the model writes; .* give --execute"):
        pass_at_1.main(given)
    pass_at_1.main([*given, "--execute"])
    rows = json.loads(file.read_text())["thresholds"]
    assert [row["threshold"] for row in rows] == [None, 0.2] and rows[0]["same_verdict"] == 1.0
    assert rows[0]["depth"] == 1.0 and all(0 <= row["pass_at_1"] <= 1 for row in rows)
    assert pass_at_1.function_of("    return 1\n\n\ndef other():\n") == "    return 1\n\n"
    problems.write_text('{"prompt": "one"}\n')
    with pytest.raises(SystemExit, match="line 1 has no entry_point, test"):
        pass_at_1.main([*given, "--execute"])
