# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""`criterion: probe` on a converted tiny model: fit, generation in NeMo and in the runtime, calibration, refusals."""

from __future__ import annotations

import json
import random
import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from tests.functional.test_calibrate import WORDS, calibrate, generate, run_script
from tests.helpers.megatron_models import REFERENCE_MODEL, ROOT

from tests.helpers.huggingface_models import save_tiny_model  # isort: skip  # after the CPU host is on
from tests.helpers.nemo_files import flipped, rewritten, run_convert, with_tokenizer  # isort: skip

EXITS = [
    {"name": "one-mlp", "layer": 1, "architecture": "mlp"},
    {"name": "two-norm", "layer": 2, "architecture": "norm"},
]


def fit(**changes: Any) -> None:
    run_script("megatron_gpt_early_exit_probe", [], changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`plain`: an early-exit `.nemo`; `path`: the same with probes; `fitted_on` and `others`: files of prompts."""
    folder = tmp_path_factory.mktemp("probe")
    save_tiny_model(folder / "hf", "llama", vocab_size=4096)
    run_convert(with_tokenizer(folder / "hf"), folder / "plain.nemo", EXITS)
    files = []
    for seed in range(2):
        chance = random.Random(seed)
        texts = [" ".join(chance.choices(WORDS, k=chance.randint(3, 6))) for _ in range(60)]
        files.append(folder / f"prompts-{seed}.jsonl")
        files[-1].write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    given = {"checkpoint": str(folder / "plain.nemo"), "data": str(files[0]), "tokens_to_generate": 16}
    fit(**given, save_to=str(folder / "probed.nemo"))
    return SimpleNamespace(
        plain=folder / "plain.nemo", path=folder / "probed.nemo", fitted_on=files[0], others=files[1], given=given
    )


def test_storing_adds_the_probes_and_changes_nothing_else(made, tmp_path):
    from nemo_ee.certificates.exit_probes import valid_probes
    from nemo_ee.checkpoint.nemo_archive import NemoArchive

    with NemoArchive(made.plain) as before, NemoArchive(made.path) as after:
        assert after.members().keys() - before.members().keys() == {"exit_probes.json"}
        for name in before.members():
            assert before.open_member(name).read() == after.open_member(name).read(), name
    assert set(valid_probes(made.path).probes) == {"one-mlp", "two-norm"}
    # In place, and with the same result.
    shutil.copy(made.plain, tmp_path / "own.nemo")
    fit(**{**made.given, "checkpoint": str(tmp_path / "own.nemo")})
    assert valid_probes(tmp_path / "own.nemo").values == valid_probes(made.path).values


def test_an_export_decodes_as_the_nemo_model(made, tmp_path):
    from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface
    from nemo_ee.generation.engine import EarlyExitEngine
    from nemo_ee.generation.policy import ExitPolicy
    from nemo_ee.runtime.loader import load_model, load_tokenizer
    from nemo_ee.text.special_tokens import prompt_ids

    output = export_huggingface(HuggingFaceSettings(checkpoint=made.path, output=tmp_path / "out", progress=False))
    files = json.loads((output / "manifest.json").read_text())["files"]
    assert "hf_early_exit/exit_probes.json" in files and "hf_full/exit_probes.json" not in files
    directory = output / "hf_early_exit"
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    prompts = [json.loads(line)["prompt"] for line in made.others.read_text().splitlines()][:8]
    ids = [prompt_ids(tokenizer, text) for text in prompts]
    confidences = EarlyExitEngine(model).generate(
        ids, max_new_tokens=8, policy=ExitPolicy(0.0, criterion="probe", active=("one-mlp",))
    )
    found = sorted(event.confidence for event in confidences.events if event.exit)
    below, above = found[len(found) // 2 - 1 : len(found) // 2 + 1]
    middle = (below + above) / 2  # no confidence is near it
    assert above - below > 1e-4
    policy = ExitPolicy(middle, criterion="probe")
    ours = EarlyExitEngine(model).generate(ids, max_new_tokens=8, policy=policy)
    generate(**{
        "model.restore_from_path": str(made.path), "prompts": prompts, "tokens_to_generate": 8, "criterion": "probe",
        "threshold": middle, "stop_on_eos": False, "output": str(tmp_path / "nemo.jsonl"), "batch_size": 8,
    })  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "nemo.jsonl").read_text().splitlines()]
    assert [[token["id"] for token in line["tokens"]] for line in lines] == [list(own) for own in ours.tokens]
    exits = [[token["exit"] for token in line["tokens"]] for line in lines]
    assert exits == [[event.exit or "final" for event in ours.events_of(index)] for index in range(8)]
    assert {"one-mlp", "final"} <= {exit for one in exits for exit in one}
    with pytest.raises(ValueError, match=r"exit_probes.json: .*export again"):
        (directory / "exit_probes.json").write_text('{"probes": {"one-mlp": {"weight": [1.0], "bias": 0.0}}}')
        load_model(directory)


def test_a_certificate_of_probes(made, tmp_path):
    """It holds for these probes, and calibration does not test them on the prompts they were fitted on."""
    certified = tmp_path / "certified.nemo"
    changes = {
        "model.restore_from_path": str(made.path), "data": str(made.others), "output": str(tmp_path / "report"),
        "save_to": str(certified), "tokens_to_generate": 6, "batch_size": 20, "free_running": 0, "criterion": "probe",
        "epsilon": 0.9, "delta": 0.1, "grid": [0.9, 0.5, 0.0],
    }  # fmt: skip
    with pytest.raises(ValueError, match="the probes were fitted on prompts-0.jsonl, so it cannot test them"):
        calibrate(**{**changes, "data": str(made.fitted_on)})
    with pytest.raises(ValueError, match=r"plain.nemo has no probes, .*fit them with examples/.*_probe.py"):
        calibrate(**{**changes, "model.restore_from_path": str(made.plain)})
    calibrate(**changes)
    report = json.loads((tmp_path / "report" / "calibration.json").read_text())
    assert report["certificate"]["criterion"] == "probe" and len(report["certificate"]["model"]["probes"]) == 64
    under = {"model.restore_from_path": str(certified), "certificate": True, "tokens_to_generate": 6}
    generate(**under, output=str(tmp_path / "a.jsonl"))
    fit(**{**made.given, "checkpoint": str(certified), "l2": 0.5})
    with pytest.raises(ValueError, match="the probes of the exits are missing or were fitted anew"):
        generate(**under)


def test_probes_of_other_weights_are_refused(made, tmp_path, caplog):
    from nemo_ee.checkpoint.nemo_archive import NemoArchive
    from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface

    with NemoArchive(made.path) as archive:
        archive.extract(tmp_path / "tuned")
    name, content = flipped(tmp_path / "tuned" / "exit_weights", signed=True)
    (tmp_path / "tuned" / "exit_weights" / name).write_bytes(content)
    own = {"model.restore_from_path": str(tmp_path / "tuned"), "criterion": "probe"}
    with pytest.raises(ValueError, match="the weights have been changed or tuned since the probes were fitted"):
        generate(**own)
    settings = {"checkpoint": tmp_path / "tuned", "targets": ("early_exit",), "progress": False}
    export_huggingface(HuggingFaceSettings(output=tmp_path / "out", **settings))
    assert not (tmp_path / "out" / "hf_early_exit" / "exit_probes.json").exists()
    assert "the probes are left out: the weights have been changed" in caplog.text


def test_where_no_probe_can_be_used_it_is_refused(made, tmp_path):
    path = "model.restore_from_path"
    with pytest.raises(ValueError, match="criterion=probe reads hidden states, .*pipeline_model_parallel_size=2"):
        generate(**{
            path: str(made.path), "criterion": "probe", "model.pipeline_model_parallel_size": 2, "trainer.devices": 2
        })  # fmt: skip
    damaged = rewritten(made.path, tmp_path / "damaged.nemo", {"exit_probes.json": b'{"schema_version": 1}'})
    with pytest.raises(ValueError, match=r"exit_probes.json is damaged .*fit the probes again"):
        generate(**{path: str(damaged), "criterion": "probe"})
    # Fitting again repairs it.
    shutil.copy(damaged, tmp_path / "repaired.nemo")
    fit(**{**made.given, "checkpoint": str(tmp_path / "repaired.nemo")})
    generate(**{path: str(tmp_path / "repaired.nemo"), "criterion": "probe", "tokens_to_generate": 2})
    # The other criteria do not read them.
    generate(**{path: str(damaged), "tokens_to_generate": 2, "output": str(tmp_path / "a.jsonl")})


def test_engines_refuse_it(made, tmp_path):
    from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface

    settings = {"checkpoint": made.path, "output": tmp_path / "out", "progress": False, "criterion": "probe"}
    for thresholds in (0.5, None):
        with pytest.raises(ValueError, match="criterion='probe': the model file for TensorRT-LLM has max_probability"):
            export_huggingface(HuggingFaceSettings(thresholds=thresholds, **settings))


def test_the_share_that_can_leave():
    import torch

    from nemo_ee.calibration.probe_fitting import leaving

    confidences = torch.linspace(1, 0, 101)[:100]
    agrees = torch.ones(100, dtype=torch.bool)
    agrees[[10, 20, 30, 40, 50, 60]] = False
    assert leaving(confidences, agrees) == (0.6, 0.4)  # the sixth mistake is the 61st token, of confidence 0.4
    assert leaving(confidences, ~agrees) == (0.05, 0.95)
    assert leaving(torch.full((100,), 0.5), ~agrees) == (0.0, None), "tokens of one confidence leave together"
    assert leaving(confidences, torch.ones(100, dtype=torch.bool)) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nothing.jsonl"}, "data: nothing.jsonl: cannot be read"),
        ({"num_prompts": 3}, "num_prompts=3"),
        ({"tokens_to_generate": 1}, "tokens_to_generate=1"),
        ({"l2": 0.0}, "l2=0.0"),
        ({"checkpoint": str(REFERENCE_MODEL)}, "model_config.yaml"),
        ({"num_prompts": 61}, "num_prompts=61, but the data gives 60 prompts"),
        ({"save_to": str(ROOT / "README.md")}, "exists; give another name, or null"),
    ],
)
def test_wrong_input_is_one_error_and_nothing_is_written(made, changes, message):
    before = made.plain.read_bytes()
    with pytest.raises(ValueError) as caught:
        fit(**{**made.given, **changes})
    assert message in str(caught.value)
    assert made.plain.read_bytes() == before


def test_what_is_missing_is_named_with_its_rule():
    with pytest.raises(ValueError) as caught:
        fit()
    for line in (
        "checkpoint is needed and not given; it must be the name of an early-exit .nemo",
        "data is needed and not given; it must be the name of a .jsonl with prompts or documents, or of a text file",
    ):
        assert line in str(caught.value)
