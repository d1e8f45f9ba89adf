# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""How the PyTorch backend's model file enters TensorRT-LLM: registry, settings, versions, worker processes.

On stand-ins of two APIs (tests/helpers/tensorrt_llm_executor_stand_in.py), which are not TensorRT-LLM. That the file
computes what it says is in tests/functional/test_tensorrt_llm_models.py.
"""

from __future__ import annotations

import importlib
import json
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from nemo_ee.export.tensorrt_llm.early_exit_files import PYTORCH_VERSIONS
from tests.helpers import tensorrt_llm_torch_stand_in as stand_in
from tests.helpers.tensorrt_llm_executor_stand_in import LLM_ARGS, VERSIONS, installed, merged

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "nemo_ee" / "export" / "tensorrt_llm" / "files" / "tensorrt_llm_pytorch_model.py"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the file as a package, importable as after --custom_module_dirs."""
    (tmp_path / "early_exit_trtllm").mkdir()
    shutil.copy(FILE, tmp_path / "early_exit_trtllm" / "__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("early_exit_trtllm", None)


@pytest.fixture(params=VERSIONS)
def file(request: pytest.FixtureRequest, folder: Path) -> Iterator[ModuleType]:
    with installed(request.param):
        yield importlib.import_module("early_exit_trtllm")


def served(folder: Path, **early_exit: Any) -> SimpleNamespace:
    """The settings object of a server of this directory."""
    (folder / "config.json").write_text(json.dumps({"early_exit": early_exit} if early_exit else {}))
    return SimpleNamespace(model=folder, revision=None)


def test_every_class_is_registered_over_the_stock_one(file: ModuleType) -> None:
    for name, stock in stand_in.stock_classes.items():
        cls = stand_in.get_registered_model_class(name)
        assert cls.__name__ == f"EarlyExit{name}" and issubclass(cls, stock)


def test_a_class_of_another_plugin_is_extended(folder: Path) -> None:
    with installed("1.4"):
        other = stand_in.register_auto_model("LlamaForCausalLM")(type("Other", (stand_in.Stock,), {}))
        importlib.import_module("early_exit_trtllm")
        assert issubclass(stand_in.get_registered_model_class("LlamaForCausalLM"), other)


def test_worker_processes_get_the_class_by_module_and_name(file: ModuleType) -> None:
    cls = stand_in.get_registered_model_class("LlamaForCausalLM")
    assert cls.__module__ == "early_exit_trtllm" and cls is file.EarlyExitLlamaForCausalLM
    assert pickle.loads(pickle.dumps(cls)) is cls


@pytest.mark.parametrize("version", ["0.21.0", "1.5.0rc2"])
def test_another_tensorrt_llm_is_refused_in_one_line(version: str, folder: Path) -> None:
    message = rf"TensorRT-LLM {version} is not supported; this file needs TensorRT-LLM 1\.0 to 1\.4: install one "
    message += "of them, or serve hf_full without exits"
    with installed("1.4", version), pytest.raises(RuntimeError, match=f"^{message}$"):
        importlib.import_module("early_exit_trtllm")


@pytest.mark.parametrize("api", VERSIONS)
def test_a_missing_stock_class_is_named(api: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(stand_in.stock_classes, "Qwen2ForCausalLM")
    message = r"has no class for Qwen2ForCausalLM; .*1\.0 to 1\.4: install one of them, or"
    with installed(api), pytest.raises(RuntimeError, match=message):
        importlib.import_module("early_exit_trtllm")


def test_thresholds_bring_their_settings(file: ModuleType, folder: Path) -> None:
    """A directory without thresholds changes nothing."""
    cls = file.EarlyExitLlamaForCausalLM
    defaults = cls.get_model_defaults(served(folder, thresholds={"a": 0.5}))
    assert merged(LLM_ARGS, defaults) == {
        **LLM_ARGS,
        "cuda_graph_config": None,
        "disable_overlap_scheduler": True,
        "kv_cache_config": {"enable_block_reuse": False, "free_gpu_memory_fraction": 0.9},
    }
    for block in ({}, {"exits": []}, {"thresholds": {}}, {"thresholds": None}):
        assert cls.get_model_defaults(served(folder, **block)) == {}


def test_settings_of_the_stock_class_stay(file: ModuleType, folder: Path) -> None:
    own = {"attn_backend": "X", "kv_cache_config": {"tokens_per_block": 64}}
    stock = type("Stock", (), {"get_model_defaults": classmethod(lambda cls, llm_args: own)})
    cls = file.early_exit_class(stock)
    assert cls.get_model_defaults(served(folder, thresholds={"a": 0.5})) == {
        **file.DEFAULTS,
        "attn_backend": "X",
        "kv_cache_config": {"tokens_per_block": 64, "enable_block_reuse": False},
    }
    assert cls.get_model_defaults(served(folder)) == own
    (folder / "config.json").unlink()  # a checkpoint that is no Hugging Face directory
    assert cls.get_model_defaults(SimpleNamespace(model=folder)) == own
    assert file.DEFAULTS["kv_cache_config"] == {"enable_block_reuse": False}


def test_the_documented_serve_yaml_has_the_same_settings(file: ModuleType) -> None:
    page = (ROOT / "docs" / "export-tensorrt-llm.md").read_text(encoding="utf-8")
    written = re.search(r"printf '([^']*)' .*\n *> serve.yaml", page)[1].replace("\\n", "\n")
    assert yaml.safe_load(written) == file.DEFAULTS


def test_the_versions_are_those_of_the_manifest(file: ModuleType) -> None:
    assert file.VERSIONS == PYTORCH_VERSIONS
