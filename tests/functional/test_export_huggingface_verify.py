# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories that were changed: what verification says, and what the runtime refuses to load."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nemo")

import tests.helpers.megatron_models  # noqa: F401  # puts the CPU host on

from safetensors.torch import load_file, save_file  # isort: skip  # after the CPU host is on

from nemo_ee.export.manifest import MANIFEST
from nemo_ee.export.verify import verify_export
from tests.functional.test_export_huggingface import Made, export
from tests.functional.test_export_huggingface_problems import EMBEDDING, EXITS, MLP, tensors_of
from tests.functional.test_export_problems import copied, signed


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("llama"), "llama", EXITS)


@pytest.fixture(scope="module")
def exported(one: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(one.path, tmp_path_factory.mktemp("exported") / "out")


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mistral"])
def test_a_good_export_has_no_problems(name: str, tmp_path: Path) -> None:
    made = Made(tmp_path / "made", name, EXITS)
    output = export(made.path, tmp_path / "out")
    assert (output / f"hf_exit_{EMBEDDING}").exists() == (name == "opt")
    assert verify_export(output) == [] and verify_export(output, made.path) == []


def _changed(folder: Path, change) -> None:  # noqa: ANN001
    """Change a file's tensors and bring the manifest's hashes up to date, so that only the format's checks notice."""
    path = folder / "hf_early_exit" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    signed(folder)


KEY = f"exit_heads.{MLP}.mlp.up_proj.weight"
CHANGES = {
    "renamed": (lambda t: t.__setitem__("x", t.pop(KEY)), [f"{KEY} is missing", "x does not belong there"]),
    "cut": (lambda t: t.__setitem__(KEY, t[KEY][1:].clone()), [f"{KEY} has shape [55, 40], must be [56, 40]"]),
    "cast": (lambda t: t.__setitem__(KEY, t[KEY].half()), [f"{KEY} is F16, but F32 in config.json"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_the_format_does_not_ask_for(change: str, exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path / "copy")
    _changed(folder, CHANGES[change][0])
    assert verify_export(folder) == [f"hf_early_exit: {problem}" for problem in CHANGES[change][1]]


def test_changed_numbers_show_against_the_source(exported: Path, one: Made, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path / "copy")
    _changed(folder, lambda tensors: tensors[KEY][0, 0].add_(1.0))
    (problem,) = verify_export(folder)
    assert problem.startswith("hf_early_exit: the manifest's digest is ") and ", that of the files is " in problem
    origin = f"{MLP}.mlp.linear_fc1.weight of the .nemo"
    assert verify_export(folder, one.path) == [f"hf_early_exit: {KEY} differs from {origin}"]


def test_a_digest_says_which_numbers_whatever_the_files(exported: Path, one: Made, tmp_path: Path) -> None:
    """The definition, written out again here; the same for other files, another one for other numbers."""
    lines = []
    for name, tensor in tensors_of(exported / "hf_early_exit").items():
        content = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        lines.append(f"{name} F32 {'x'.join(map(str, tensor.shape))} {content}\n")
    expected = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()

    def stated(folder: Path) -> dict[str, str]:
        manifest = json.loads((folder / MANIFEST).read_text())
        return {artifact["directory"]: artifact["digest"] for artifact in manifest["artifacts"]}

    assert stated(exported)["hf_early_exit"] == expected and len(set(stated(exported).values())) == 4
    assert stated(export(one.path, tmp_path / "sharded", shard_gigabytes=30_000 / 1e9)) == stated(exported)
    rounded = stated(export(one.path, tmp_path / "rounded", dtype="bfloat16"))
    assert not set(rounded.values()) & set(stated(exported).values())


def test_what_an_artifact_is_for_is_in_the_manifest(exported: Path) -> None:
    manifest = json.loads((exported / MANIFEST).read_text())
    found = {a["kind"]: (a["lossless"], a["kv"], a["max_batch"]) for a in manifest["artifacts"]}
    assert found["full"] == (True, "its own, every layer writes every position", None)
    assert found["exit"][0].startswith("with hf_full as the target") and found["early_exit"][1] == "carry"


def test_a_config_that_the_export_did_not_write_shows_against_the_source(
    exported: Path, one: Made, tmp_path: Path
) -> None:
    folder = copied(exported, tmp_path / "copy")
    for name in ("hf_full", f"hf_exit_{MLP}", "hf_early_exit"):
        path = folder / name / "config.json"
        values = json.loads(path.read_text()) | {"rope_theta": 5e5, "rope_parameters": None}
        values.pop("rms_norm_eps")
        path.write_text(json.dumps(values))
    signed(folder)
    assert all(": parity: " in problem for problem in verify_export(folder)), "it computes something else"
    problems = verify_export(folder, one.path)
    assert len(problems) == 9
    assert f"hf_exit_{MLP}: config.json: rope_theta is 500000.0, must be 10000.0" in problems
    assert any("hf_full: config.json: rms_norm_eps is missing, must be" in problem for problem in problems)


def test_exports_of_earlier_versions_with_one_spelling_are_good(exported: Path, one: Made, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path / "copy")
    for path in folder.glob("hf_*/config.json"):
        values = json.loads(path.read_text())
        del values["rope_parameters"]
        path.write_text(json.dumps(values))
    signed(folder)
    assert verify_export(folder, one.path) == []


def test_an_index_that_names_the_wrong_file(one: Made, tmp_path: Path) -> None:
    folder = export(one.path, tmp_path / "out", targets=("full",), shard_gigabytes=30_000 / 1e9)
    path = folder / "hf_full" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = "model.embed_tokens.weight"
    right, wrong = index["weight_map"][name], index["weight_map"]["model.norm.weight"]
    index["weight_map"][name] = wrong
    path.write_text(json.dumps(index))
    signed(folder)
    assert verify_export(folder) == [f"hf_full: {name} is in {right}, but in {wrong} by {path.name}"]


# -- what the runtime refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "bloom"}, "model_type: 'bloom' is not supported; supported are llama, mistral"),
        ({"hidden_act": "gelu", "rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'.*hidden_act: 'gelu'"),
        ({"rope_theta": 5e5}, "rope_theta 500000.0 and rope_parameters.rope_theta 10000.0 disagree"),
        ({"early_exit": {"exits": [{"name": "x", "layer": 9, "architecture": "mlp"}]}}, "is no exit of a model of 3"),
        ({"hidden_size": None}, "hidden_size: None, must be a whole number"),
        ({"vocab_size": 200}, "embed_tokens.weight has shape .* by config.json"),
        ({"intermediate_size": 30}, "gate_proj.weight has shape"),
        ({"mlp_bias": True}, "mlp.gate_proj.bias is missing; export again"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor: None, must .*high_freq_factor: None",
        ),
        ({"head_dim": 9}, "head_dim: 9, rotary positions need an even number"),
        (
            {"early_exit": {"exits": 2 * [{"name": "x", "layer": 1, "architecture": "norm"}]}},
            "two exits are called 'x'",
        ),
    ],
)
def test_directories_the_runtime_refuses(
    changes: dict[str, Any], problem: str, exported: Path, tmp_path: Path
) -> None:
    from nemo_ee.runtime.loader import load_model

    folder = copied(exported / "hf_early_exit", tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=problem):
        load_model(folder)


def test_damaged_directories_the_runtime_refuses(exported: Path, tmp_path: Path) -> None:
    from nemo_ee.runtime.loader import load_model, load_tokenizer

    folder = copied(exported / "hf_early_exit", tmp_path / "copy")
    for file in folder.glob("tokenizer*.json"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer in it"):
        load_tokenizer(folder)
    with pytest.raises(ValueError, match="dtype='int4' must be one of"):
        load_model(folder, dtype="int4")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="missing or damaged"):
        load_model(folder)
    index = {"weight_map": {"x": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names files outside"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_model(folder)
    with pytest.raises(ValueError, match="no config.json"):
        load_model(tmp_path)
