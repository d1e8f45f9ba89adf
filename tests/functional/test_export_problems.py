# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The export as a user starts it, what it refuses, what an interruption leaves, and what the verification notices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import ROOT, exit_entry, user_environment

import torch  # isort: skip  # after the CPU host is on
import yaml
from safetensors.torch import load_file, save_file

from nemo_ee.checkpoint.nemo_config import read_architecture
from nemo_ee.export.manifest import MANIFEST, sha256_of
from nemo_ee.export.verify import verify_export
from tests.functional.test_export_tensorrt_llm import Made, export
from tests.helpers.nemo_files import members, rewritten

EXITS = [exit_entry(1, "mlp"), exit_entry(2, "layer", output="shared"), exit_entry(3, "embedding")]
MLP, LAYER, EMBEDDING = (exit["name"] for exit in EXITS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Made(tmp_path_factory.mktemp("llama"), "llama", EXITS).path


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("exported") / "out", tensor_parallel=2, pipeline_parallel=2)


def copied(exported: Path, to: Path) -> Path:
    for file in exported.rglob("*"):
        if file.is_file():
            target = to / file.relative_to(exported)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return to


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "export" / name), *arguments],
        env=user_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_scripts_as_a_user_runs_them(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "export"
    done = run_script("export_tensorrt_llm.py", f"checkpoint={checkpoint}", f"output={output}", "tensor_parallel=2")
    assert done.returncode == 0, done.stderr
    assert "no real TensorRT-LLM has loaded these files" in done.stderr
    assert f"no draft of exit {EMBEDDING}: an embedding exit has no norm" in done.stderr
    assert [path.name for path in output.parent.iterdir()] == ["export"]
    manifest = json.loads((output / MANIFEST).read_text())
    assert manifest["schema_version"] == 1 and manifest["dtype"] == "bfloat16"
    assert manifest["verified"] == {"tensorrt_llm": None, "note": "no real TensorRT-LLM has loaded these files"}
    fingerprint = yaml.safe_load(members(checkpoint)["model_config.yaml"])["backbone_fingerprint"]
    assert manifest["source"] == {"checkpoint": checkpoint.name, "backbone_fingerprint": fingerprint}
    assert {artifact["directory"] for artifact in manifest["artifacts"]} == {
        "trtllm_ckpt", f"draft_{MLP}", f"draft_{LAYER}"
    }  # fmt: skip
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert manifest["files"].keys() == files - {MANIFEST}
    assert all(entry["sha256"] == sha256_of(output / name) for name, entry in manifest["files"].items())
    checked = run_script("verify_export.py", str(output), "--checkpoint", str(checkpoint))
    assert checked.returncode == 0 and checked.stdout.startswith("0 problems in hashes, names, shapes and shards")
    (output / "trtllm_ckpt" / "config.json").unlink()
    checked = run_script("verify_export.py", str(output), "--parity-gigabytes", "0")
    assert checked.returncode == 1 and "trtllm_ckpt/config.json is missing" in checked.stdout
    refused = run_script("export_tensorrt_llm.py", f"checkpoint={checkpoint}", f"output={output}")
    assert refused.returncode == 2 and "is not empty; name a new directory" in refused.stderr
    assert "Traceback" not in refused.stderr


# -- refused before anything is written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        ({"tensor_parallel": 3}, ["tensor_parallel=3 does not divide num_attention_heads=8", "choose a divisor"]),
        ({"tensor_parallel": 16}, ["num_attention_heads=8", "ffn_hidden_size=56"]),
        ({"pipeline_parallel": 3}, ["pipeline_parallel=3 does not divide num_layers=4; choose a divisor"]),
        ({"draft_tensor_parallel": 5}, ["draft_tensor_parallel=5 does not divide num_attention_heads=8"]),
        (
            {"tensor_parallel": 0, "dtype": "int8", "pipeline_parallel": "2"},
            [
                "tensor_parallel=0 must be a whole number",
                "pipeline_parallel='2' must be",
                "dtype='int8' must be one of",
            ],
        ),
        (
            {"exits": ("nope",), "drafts": (EMBEDDING,)},
            [
                "exits: no exit is called 'nope'; there are",
                f"drafts: exit {EMBEDDING!r} cannot be a draft model",
                "final norm out",
            ],
        ),
        ({"checkpoint": Path("nowhere.nemo")}, ["nowhere.nemo", "does not exist; give an early-exit .nemo"]),
    ],
)
def test_problems_of_the_settings_come_together(
    settings: dict[str, Any], problems: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="nothing was exported") as error:
        export(settings.pop("checkpoint", checkpoint), tmp_path / "out", **settings)
    assert all(problem in str(error.value) for problem in problems), error.value
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(ValueError, match="is not empty; name a new directory"):
        export(checkpoint, tmp_path / "full")
    for output in (tmp_path / "full" / "file", tmp_path / "full" / "file" / "below"):
        with pytest.raises(ValueError, match=r"is a file; name a new|is no directory or not writable"):
            export(checkpoint, output)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]
    (tmp_path / "empty").mkdir()
    assert (export(checkpoint, tmp_path / "empty", drafts=()) / MANIFEST).is_file()


def test_an_exit_called_like_what_stock_code_looks_for(tmp_path: Path) -> None:
    path = Made(tmp_path / "made", "llama", [exit_entry(2, "norm") | {"name": "my_lm_head"}]).path
    with pytest.raises(ValueError, match=r"TensorRT-LLM treats tensors called lm_head apart; leave it out"):
        export(path, tmp_path / "out")
    assert export(path, tmp_path / "out", exits=(), drafts=("my_lm_head",)).is_dir()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"activation": "squared-relu"}, "normalization=rmsnorm, activation=squared-relu, .* no stock class is known"),
        ({"normalization": "layernorm1p"}, "normalization=layernorm1p"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type=learned_absolute"),
        ({"rotary_percentage": 0.5}, "rotary_percentage=0.5: must be 1.0"),
        ({"num_moe_experts": 8, "window_size": [4, 0]}, "num_moe_experts=8.*window_size="),
        ({"num_layers": None}, "has no num_layers, so this is not a GPT"),
    ],
)
def test_models_that_no_stock_class_computes(
    changes: dict[str, Any], problem: str, checkpoint: Path, tmp_path: Path
) -> None:
    config = yaml.safe_load(members(checkpoint)["model_config.yaml"]) | changes
    path = rewritten(checkpoint, tmp_path / "x.nemo", {"model_config.yaml": yaml.safe_dump(config).encode()})
    with pytest.raises(ValueError, match=problem):
        export(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["x.nemo"]


def test_erf_gelu_is_refused_and_tanh_gelu_is_not() -> None:
    gpt = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "encoder_seq_length": 4, "activation": "gelu"}
    for tanh in ({"openai_gelu": True, "bias_activation_fusion": False}, {}):
        assert read_architecture(gpt | tanh, stored_rows=9, max_positions=None).hidden_act == "gelu"
    with pytest.raises(ValueError, match="GELU is the tanh approximation"):
        read_architecture(gpt | {"bias_activation_fusion": False}, stored_rows=9, max_positions=None)
    plain = read_architecture(gpt, stored_rows=9, max_positions=None)
    assert (plain.vocab_size, plain.bias, plain.tied, plain.ffn_hidden_size) == (9, True, True, 32), "NeMo's defaults"


def test_damaged_files(checkpoint: Path, tmp_path: Path) -> None:
    whole = checkpoint.read_bytes()
    (tmp_path / "cut.nemo").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or truncated|truncated"):
        export(tmp_path / "cut.nemo", tmp_path / "out")
    weights = next(name for name in members(checkpoint) if name.startswith("model_weights/__0_"))
    path = rewritten(checkpoint, tmp_path / "hole.nemo", {weights: members(checkpoint)[weights][:200]})
    with pytest.raises(ValueError, match="the checkpoint is damaged or incomplete"):
        export(path, tmp_path / "out")
    exits = [name for name in members(checkpoint) if name.startswith("exit_weights/")]
    path = rewritten(checkpoint, tmp_path / "exits.nemo", dict.fromkeys(exits))
    with pytest.raises(ValueError, match="names exits, but there is no exit_weights/"):
        export(path, tmp_path / "out")
    config = yaml.safe_load(members(checkpoint)["model_config.yaml"]) | {"ffn_hidden_size": 60, "bias": True}
    path = rewritten(checkpoint, tmp_path / "other.nemo", {"model_config.yaml": yaml.safe_dump(config).encode()})
    with pytest.raises(ValueError, match=r"(?s)do not fit together:.*linear_proj.bias.*missing.*must be \[120, 40\]"):
        export(path, tmp_path / "out")
    assert not any(file.is_dir() for file in tmp_path.iterdir())


def test_tensors_that_no_stock_class_has_are_not_dropped(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    from nemo_ee.export.source import EarlyExitSource

    real = EarlyExitSource.backbone_names
    extra = {"decoder.layers.self_attention.q_layernorm.weight"}
    monkeypatch.setattr(EarlyExitSource, "backbone_names", lambda self: real(self) | extra)
    with pytest.raises(ValueError, match="holds tensors that no stock class has: .*q_layernorm"):
        export(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_float16_does_not_hold(tmp_path: Path) -> None:
    one = Made(tmp_path / "made", "llama", EXITS[:1])
    with torch.no_grad():
        one.model.model.exits[MLP].mlp.linear_fc2.weight[3, 3] = 1e6
    one.model.save_to(str(one.path))
    with pytest.raises(ValueError, match="linear_fc2.weight has values beyond float16; use dtype=bfloat16"):
        export(one.path, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("place", ["write", "manifest"])
def test_an_interruption_leaves_nothing(
    problem: BaseException, place: str, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    from nemo_ee.export import export_plan as module
    from nemo_ee.export.safetensors_writer import SafetensorsWriter

    real, calls = SafetensorsWriter.write, []

    def write(self, name, chunks) -> None:  # noqa: ANN001
        calls.append(name)
        if place == "write" and len(calls) == 20:
            raise problem
        real(self, name, chunks)

    def manifest(*arguments) -> None:  # noqa: ANN002
        raise problem

    monkeypatch.setattr(SafetensorsWriter, "write", write)
    if place == "manifest":
        monkeypatch.setattr(module, "write_manifest", manifest)
    with pytest.raises((KeyboardInterrupt, ValueError)) as error:
        export(checkpoint, tmp_path / "out")
    assert isinstance(error.value, KeyboardInterrupt) or "No space left on device" in str(error.value)
    assert list(tmp_path.iterdir()) == [] and len(calls) >= 20


# -- verification ---------------------------------------------------------------------------------------------------


def test_a_good_export_has_no_problems(exported: Path, checkpoint: Path) -> None:
    assert verify_export(exported) == [] and verify_export(exported, checkpoint) == []


def signed(folder: Path) -> None:
    """Bring the manifest's hashes up to date, so that only the format's own checks can notice a change."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        entry |= {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _tensors(folder: Path, change, file: str = "trtllm_ckpt/rank2.safetensors") -> None:  # noqa: ANN001
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


KEY = "transformer.layers.0.mlp.fc.weight"
CHANGES = {
    "renamed": (lambda t: t.__setitem__("x", t.pop(KEY)), [f"{KEY} is missing", "x does not belong there"]),
    "cut": (lambda t: t.__setitem__(KEY, t[KEY][1:].clone()), [f"{KEY} has shape [27, 40], must be [28, 40]"]),
    "cast": (lambda t: t.__setitem__(KEY, t[KEY].half()), [f"{KEY} is F16, but F32 in config.json"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_the_format_does_not_ask_for(change: str, exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path / "copy")
    _tensors(folder, CHANGES[change][0])
    assert verify_export(folder)[0].startswith("trtllm_ckpt/rank2.safetensors has ")
    signed(folder)
    assert verify_export(folder) == [f"trtllm_ckpt: rank2.safetensors: {problem}" for problem in CHANGES[change][1]]


def test_changed_numbers_show_in_the_hash_when_run_and_against_the_source(
    exported: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder = copied(exported, tmp_path / "copy")
    _tensors(folder, lambda tensors: tensors[KEY][0, 0].add_(100.0))
    by_hash, *by_running = verify_export(folder)
    assert by_hash == "trtllm_ckpt/rank2.safetensors has another sha256 than in the manifest"
    assert by_running and all(": parity: " in problem for problem in by_running)
    signed(folder)
    assert verify_export(folder) == by_running
    origin = "decoder.layers.mlp.linear_fc1.weight, layer 3, of the .nemo"
    assert verify_export(folder, checkpoint) == [f"trtllm_ckpt: rank2.safetensors: {KEY} differs from {origin}"]


def _config(folder: Path, change, artifact: str = "trtllm_ckpt") -> None:  # noqa: ANN001
    """Change config.json and the hashes with it."""
    path = folder / artifact / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    signed(folder)


# what is changed -> (change of config.json, problem, whether it takes the source to notice)
CONFIG_CHANGES = {
    "rotary_base": (lambda c: c.update(rotary_base=5e5), "rotary_base is 500000.0, must be 10000.0", True),
    "epsilon": (lambda c: c.update(norm_epsilon=0.1), "norm_epsilon is 0.1, must be", True),
    "length": (lambda c: c.update(max_position_embeddings=9), "max_position_embeddings is 9, must be 32", True),
    "scaling": (lambda c: c.update(rotary_scaling={"type": "linear", "factor": 2.0}), "rotary_scaling is", True),
    "exit's layer": (lambda c: c["early_exit"]["exits"][2].update(layer=2), "layer is 2, must be 3", True),
    "exit's output": (lambda c: c["early_exit"]["exits"][1].update(output="own"), "output is 'own', must be", True),
    "logits": (lambda c: c.update(logits_dtype="float16"), "logits_dtype is 'float16', must be 'float32'", False),
    "quantised": (lambda c: c["quantization"].update(quant_algo="FP8"), "quantization is {'quant_algo': 'FP8'", False),
    "stranger": (lambda c: c.update(rotary_pct=0.5), "rotary_pct does not belong there", False),
    "missing": (lambda c: c.pop("logits_dtype"), "logits_dtype is missing, must be 'float32'", False),
}


@pytest.mark.parametrize("change", CONFIG_CHANGES)
def test_a_field_of_the_config_that_the_model_does_not_have(
    change: str, exported: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """With the hashes brought up to date, and no tensor that shows it."""
    folder = copied(exported, tmp_path / "copy")
    apply, problem, needs_source = CONFIG_CHANGES[change]
    _config(folder, apply)
    without, (found, *others) = verify_export(folder), verify_export(folder, checkpoint)
    assert found.startswith("trtllm_ckpt: config.json: ") and problem in found
    assert all("exit_heads" in other for other in others), others  # an exit without a matrix of its own, at most
    assert needs_source or without == [found]
    assert not needs_source or not any("must be" in each and "config.json" in each for each in without)


def test_the_config_of_a_draft_and_a_given_length(checkpoint: Path, tmp_path: Path) -> None:
    folder = export(checkpoint, tmp_path / "out", drafts=(LAYER,), max_position_embeddings=16)
    assert verify_export(folder, checkpoint) == []
    _config(folder, lambda c: c.update(max_position_embeddings=32, rotary_base=2.0), f"draft_{LAYER}")
    assert verify_export(folder, checkpoint) == [
        f"draft_{LAYER}: config.json: max_position_embeddings is 32, must be 16",
        f"draft_{LAYER}: config.json: rotary_base is 2.0, must be 10000.0",
    ]


def test_missing_strange_and_foreign_files(exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path / "copy")
    (folder / "trtllm_ckpt" / "rank1.safetensors").unlink()
    (folder / "stranger").write_text("x")
    problems = verify_export(folder)
    assert problems == [
        "trtllm_ckpt/rank1.safetensors is missing", "stranger is not in the manifest",
        "trtllm_ckpt: rank1.safetensors is missing",
    ]  # fmt: skip
    config = yaml.safe_load(members(checkpoint)["model_config.yaml"]) | {"backbone_fingerprint": "f" * 64}
    other = rewritten(checkpoint, tmp_path / "other.nemo", {"model_config.yaml": yaml.safe_dump(config).encode()})
    assert "made from the backbone" in verify_export(exported, other)[0]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no manifest.json, so this is not a complete export"),
        ("{", "damaged"),
        ('{"schema_version": 2, "files": {}}', "schema version 2"),
        ('{"schema_version": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}', "lies outside of the export"),
    ],
)
def test_manifests_that_are_none(content: str | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=problem):
        verify_export(tmp_path)
