# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What exports carry for early exit in TensorRT-LLM: thresholds, model files, manifest; and the script to try them.

That the model files compute what they say is in test_tensorrt_llm_models.py.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import ROOT

from nemo_ee.export.tensorrt_llm.early_exit_files import ENGINE_CRITERIA, ENGINE_VERSIONS, PYTORCH_CRITERIA  # isort: skip
from nemo_ee.export.tensorrt_llm.files import tensorrt_llm_model, tensorrt_llm_pytorch_model  # isort: skip  # after the CPU host is on

from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.propagation import generate_propagating
from tests.functional import test_export_huggingface, test_export_tensorrt_llm
from tests.functional.test_export_problems import run_script
from tests.functional.test_tensorrt_llm_models import (
    ASKED,
    EXITS,
    PROMPTS,
    Exported,
    model_file,
    set_early_exit,
)
from tests.helpers import tensorrt_llm_stand_in

SCRIPT = ROOT / "scripts" / "export" / "try_tensorrt_llm.py"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("llama"), "llama")


def test_exports_carry_the_files_and_the_thresholds(tmp_path: Path) -> None:
    from nemo_ee.export.verify import verify_export

    one = test_export_huggingface.Made(tmp_path, "llama", EXITS)
    for script, name in (("export_tensorrt_llm", "trt"), ("export_huggingface", "exported")):
        arguments = [f"checkpoint={one.path}", f"output={tmp_path / name}", "progress=False", "criterion=entropy"]
        arguments += ["dtype=null", f"thresholds={{{ASKED[0]}:1.5,{ASKED[3]}:2}}"]
        done = run_script(f"{script}.py", *arguments)
        assert done.returncode == 0, done.stderr
    folders = {"trt": tmp_path / "trt" / "trtllm_ckpt", "hf": tmp_path / "exported" / "hf_early_exit"}
    files = {"trt": folders["trt"].parent / "tensorrt_llm_model.py",
             "hf": folders["hf"] / "early_exit_trtllm" / "__init__.py"}  # fmt: skip
    for kind, folder in folders.items():
        block = json.loads((folder / "config.json").read_text())["early_exit"]
        assert block["criterion"] == "entropy" and block["thresholds"] == {ASKED[0]: 1.5, ASKED[3]: 2.0}
        module = {"trt": "tensorrt_llm_model", "hf": "tensorrt_llm_pytorch_model"}[kind]
        assert files[kind].read_bytes() == model_file(module).read_bytes()
        assert verify_export(folder.parent) == []
        entry = json.loads((folder.parent / "manifest.json").read_text())["early_exit_models"][0]
        assert entry["file"] == files[kind].relative_to(folder.parent).as_posix()
        assert entry["kv"] == "propagate" and entry["lossless"] is False
        assert entry["verified"] == (
            "on an eager stand-in of the API it uses, on the CPU, one rank, fp32; no real TensorRT-LLM has loaded it"
        )
    tried = run_script("try_tensorrt_llm.py", "engine", str(tmp_path / "trt"), "--dry-run")
    assert tried.returncode == 0 and "--model_cls_name EarlyExitLlamaForCausalLM" in tried.stdout, tried.stderr
    assert "note:" not in tried.stdout
    set_early_exit(folders["hf"], thresholds={ASKED[0]: 0.5})
    reference = ("engine", str(tmp_path / "trt"), "--reference", str(folders["hf"]), "--dry-run")
    tried = run_script("try_tensorrt_llm.py", *reference)
    assert "has other thresholds; the reference takes the engine's" in tried.stdout, tried.stderr
    tried = run_script("try_tensorrt_llm.py", "pytorch", str(folders["hf"]), "--dry-run")
    assert tried.returncode == 0 and "hf_early_exit/early_exit_trtllm --extra" in tried.stdout, tried.stderr
    assert "TLLM_WORKER_USE_SINGLE_PROCESS=1" in tried.stdout and "enable_block_reuse: false" in tried.stdout


def test_the_script_to_try_it_has_the_runtime_s_tokens_to_compare_with(exported, capsys) -> None:
    """What of it runs without TensorRT-LLM."""
    one, folder = exported, exported.hf / "hf_early_exit"
    set_early_exit(folder, thresholds=one.thresholds("margin", 0.3), criterion="margin")
    script = SourceFileLoader("try_it", str(SCRIPT)).load_module()
    prompts = script.prompts_of(one.trt / "trtllm_ckpt")  # no tokenizer there: the model has fewer tokens than it
    block = script.early_exit_of(folder)
    tokens = script.reference_tokens(folder, prompts, 8, block)
    policy = ExitPolicy(one.thresholds("margin", 0.3), "margin", active=tuple(ASKED))
    for prompt, own in zip(prompts, tokens, strict=True):
        alone = generate_propagating(one.model, [prompt], max_new_tokens=[8], policy=policy)
        assert tuple(own) == alone.tokens[0]
    # An engine's thresholds, which need not be those of the directory that is the reference.
    assert script.reference_tokens(folder, prompts, 8, {}) != tokens, "control: no thresholds, other tokens"
    assert script.same_thresholds(block, {**block, "exits": []}) and not script.same_thresholds(block, {})
    script.compare([[1, 2, 3]], [[1, 2, 4]], "the runtime")
    assert "the first 2 of 3 tokens are the runtime's" in capsys.readouterr().out


class OneToken:
    """An `LLM` whose tokens are the size of the batch; `SamplingParams` of the real one are not looked at."""

    def generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
        tokens = [len(prompts)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]) for _ in prompts]


def test_the_tokens_to_compare_are_of_prompts_served_alone() -> None:
    script = SourceFileLoader("try_it", str(SCRIPT)).load_module()
    with tensorrt_llm_stand_in.installed():
        sys.modules["tensorrt_llm"].SamplingParams = SimpleNamespace
        tokens, speed = script.generate(OneToken(), PROMPTS, 1)
    assert tokens == [[1], [1], [1]] and speed > 0


@pytest.mark.parametrize(
    ("backend", "supported", "others"),
    [
        ("pytorch", ["1.0.0rc4", "1.2.1", "1.3.0rc29", "1.4.0rc1"], ["0.21.0", "1.5.0rc0"]),
        ("engine", ["0.20.0", "1.2.1", "1.3.0rc20"], ["0.19.0", "1.3.0rc21", "1.3.0", "1.4.0rc1"]),
    ],
)
def test_another_tensorrt_llm_ends_in_one_line(backend: str, supported: list[str], others: list[str]) -> None:
    script = SourceFileLoader("try_it", str(SCRIPT)).load_module()
    for version in supported:
        script.refuse_version(backend, version)
    for version in others:
        with pytest.raises(
            SystemExit, match=f"^TensorRT-LLM {version}: the {backend} backend's files are for .*; inst"
        ):
            script.refuse_version(backend, version)


def test_an_engine_file_names_the_versions_that_have_its_backend() -> None:
    with tensorrt_llm_stand_in.installed():
        sys.modules["tensorrt_llm"].__version__ = "1.4.0rc1"
        del sys.modules["tensorrt_llm.models"].LLaMAForCausalLM
        with pytest.raises(
            RuntimeError, match=r"^TensorRT-LLM 1\.4\.0rc1 has no engine backend .*; .* needs .*0\.20\.0 to 1"
        ):
            SourceFileLoader("models", str(model_file("tensorrt_llm_model"))).load_module().EarlyExitLlamaForCausalLM  # noqa: B018


@pytest.mark.parametrize(
    ("export", "settings", "message"),
    [
        (
            test_export_tensorrt_llm.export,
            {"thresholds": 0.5, "criterion": "margin"},
            "TensorRT-LLM has max_probability, entropy",
        ),
        (
            test_export_tensorrt_llm.export,
            {"criterion": "sureness"},
            "criterion='sureness' must be one of max_p",
        ),
        (
            test_export_huggingface.export,
            {"criterion": "sureness"},
            "criterion='sureness' must be one of max_p",
        ),
        (test_export_tensorrt_llm.export, {"thresholds": {EXITS[-1]["name"]: 0.5}}, "no cache for the attention"),
        (test_export_huggingface.export, {"thresholds": {"nowhere": 0.5}}, "exit 'nowhere', which the model does not"),
        (test_export_tensorrt_llm.export, {"thresholds": 0.5, "exits": ()}, "thresholds=0.5: no exit gets one"),
        (test_export_huggingface.export, {"thresholds": 0.5, "exits": (EXITS[-1]["name"],)}, "no exit gets one"),
        (test_export_huggingface.export, {"thresholds": 1.5}, r"threshold = 1.5 must be a number in 0..1"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(
    export: Any, settings: dict, message: str, exported, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export(exported.path, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_the_exporters_know_the_criteria_and_versions_of_the_files() -> None:
    assert (tensorrt_llm_model.CRITERIA, tensorrt_llm_model.VERSIONS) == (ENGINE_CRITERIA, ENGINE_VERSIONS)
    assert tensorrt_llm_pytorch_model.CRITERIA == PYTORCH_CRITERIA


def test_thresholds_that_no_engine_would_use_are_refused(tmp_path: Path) -> None:
    """Two stages, for which there is no model file either; a directory that does not hold them."""
    path = test_export_tensorrt_llm.Made(tmp_path, "llama", EXITS[:1]).path
    with pytest.raises(ValueError, match="thresholds with pipeline_parallel=2: an engine that leaves early has one"):
        test_export_tensorrt_llm.export(path, tmp_path / "out", pipeline_parallel=2, thresholds=0.5)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="thresholds are written to hf_early_exit alone; add early_exit to targets"):
        test_export_huggingface.export(path, tmp_path / "out", targets=("full",), thresholds=0.5)
    assert not (tmp_path / "out").exists()
    output = test_export_tensorrt_llm.export(path, tmp_path / "out", pipeline_parallel=2)
    assert json.loads((output / "manifest.json").read_text())["early_exit_models"] == []
    assert not (output / "tensorrt_llm_model.py").exists()


def test_families_without_a_model_file_are_exported_without(tmp_path: Path) -> None:
    path = test_export_huggingface.Made(tmp_path, "gpt2", EXITS[1:2]).path
    with pytest.raises(ValueError, match="thresholds: GPTForCausalLM has no class with which an engine leaves early"):
        test_export_tensorrt_llm.export(path, tmp_path / "trt", thresholds=0.5)
    with pytest.raises(ValueError, match="there is no model file for gpt2, only for llama, mistral, qwen2, qwen3"):
        test_export_huggingface.export(path, tmp_path / "exported", thresholds=0.5)
    for export, name in ((test_export_tensorrt_llm.export, "trt"), (test_export_huggingface.export, "exported")):
        output = export(path, tmp_path / name)
        assert json.loads((output / "manifest.json").read_text())["early_exit_models"] == []
        assert not [*output.rglob("early_exit_trtllm*")] and not [*output.rglob("tensorrt_llm_model*")]


# -- thresholds in config.json, read by both files --------------------------------------------------------------------

SAME_BLOCKS = [
    {"thresholds": {"m": 0.9, "e": 0.4}},
    {"thresholds": {"n": 1}, "criterion": "entropy"},
    {"criterion": "max_probability", "thresholds": {}},
    {"thresholds": None},
    {},
    {"thresholds": {"l": 0.5}},
    {"thresholds": {"nowhere": 0.5}},
    {"criterion": "sureness"},
]


@pytest.mark.parametrize("block", SAME_BLOCKS)
def test_both_files_read_a_block_alike(block: dict) -> None:
    """Each has its own reader, since each stands alone."""
    kinds = {"m": ("mlp", 3), "n": ("norm", 1), "e": ("embedding", 2), "l": ("layer", 2)}
    rows = [{"name": n, "architecture": a, "layer": k, "output": "own"} for n, (a, k) in kinds.items()]
    one_rank = SimpleNamespace(pp_size=1, enable_attention_dp=False)
    read = []
    for reader in (
        tensorrt_llm_model.read_settings,
        lambda block: tensorrt_llm_pytorch_model.read_settings(block, one_rank),
    ):
        try:
            settings = reader({"exits": rows, **block})
        except ValueError as problem:
            read.append(str(problem).split("exit 'l'")[0].split("'sureness'")[0])  # the reasons' wording is their own
        else:
            read.append((settings.criterion, [tuple(exit) for exit in settings.exits]))
    assert read[0] == read[1]
    assert isinstance(read[0], str) == (block in SAME_BLOCKS[-3:])
