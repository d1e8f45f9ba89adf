# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What real vLLM with the plugin refuses: at start, or a request."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import vllm
from vllm.exceptions import VLLMValidationError

from nemo_ee.export.vllm import plugin
from tests.engines.vllm.engine import generate, save_model, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    save_model(made, "llama", [("mlp", 1, True), ("norm", 2, False)])
    return made


@pytest.mark.parametrize(
    ("early_exit", "arguments", "message"),
    [
        ({"thresholds": {"layer1-mpl": 0.9}}, {}, r"layer1-mpl.*did you mean layer1-mlp\?"),
        ({"thresholds": 1.5}, {}, "threshold = 1.5 must be a number in 0..1"),
        ({"thresholds": 0.9, "criterion": "probability"}, {}, "criterion = 'probability' is unknown"),
        ({"thresholds": 0.9, "criterion": "probe"}, {}, "criterion='probe': vLLM's plugin reads no hidden states"),
        ({"treshold": 0.9}, {}, r"treshold=0.9 .*did you mean thresholds\?"),
        ({"active": ["layer9-mlp"]}, {}, "active names the exit 'layer9-mlp', which the model does not have"),
        ({"criterion": "entropy"}, {}, "criterion without thresholds, whose meaning it changes; state both"),
        (None, {"load_format": "dummy"}, "load_format=dummy is not supported, use auto"),
        (None, {"enable_sleep_mode": True}, "(?i)sleep mode is not supported"),
        (None, {"kv_offloading_size": 1.0}, "KV transfer and offloading are not supported"),
        (None, {"hf_overrides": {"quantization_config": {"quant_method": "fp8"}}}, "quantised weights are not"),
        (None, {"enable_lora": True}, "LoRA is not supported"),
    ],
)
def test_the_server_does_not_start(folder: Path, early_exit: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), served(folder, early_exit, **arguments):
        pass


def test_pipeline_parallelism_and_drafts_are_named_together(folder: Path) -> None:
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with (
        pytest.raises(ValueError, match="pipeline_parallel_size=2 is not supported.*speculative decoding is not"),
        served(folder, pipeline_parallel_size=2, speculative_config=speculative),
    ):
        pass


def test_a_request_with_wrong_thresholds_is_refused_and_the_next_one_served(folder: Path) -> None:
    with served(folder) as llm:
        for value, message in [
            ('{"layer7-mlp": 0.5}', "layer7-mlp.*the model does not have"),
            (1.5, "must be a number in 0..1"),
            ("high", "must be a number, JSON text"),
            ("[0.5]", "must be a number, JSON text"),
            ("{}", "must be a number, JSON text"),
            ([0.5], "must be a number"),
        ]:
            with pytest.raises(VLLMValidationError, match=message):
                generate(llm, [[1, 2]], [3], [value])
        assert len(generate(llm, [[1, 2]], [3], [0.5])[0]) == 3


def test_an_attention_backend_that_cannot_only_write_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    monkeypatch.setattr(CPUAttentionBackend, "forward_includes_kv_cache_update", True)
    with pytest.raises(ValueError, match="backend CPU_ATTN writes keys and values only together"), served(folder):
        pass


def test_another_vllm_serves_stock_models_only(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    registered: list[str] = []
    for name in plugin.ARCHITECTURES:
        monkeypatch.delitem(MODELS_CONFIG_MAP, f"EarlyExit{name}", raising=False)
        monkeypatch.delitem(MODELS_CONFIG_MAP, name, raising=False)
    monkeypatch.setattr(ModelRegistry, "register_model", lambda name, *_: registered.append(name))
    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin.register()
    assert "early exit for vLLM 0.32, this is 0.31.2" in caplog.text and not registered
    monkeypatch.setattr(vllm, "__version__", "0.32.4+cpu")
    plugin.register()
    hook = MODELS_CONFIG_MAP["Qwen3ForCausalLM"]
    plugin.register()
    assert "EarlyExitQwen3ForCausalLM" in registered, "control"
    assert MODELS_CONFIG_MAP["Qwen3ForCausalLM"] is hook, "a second call changes nothing"
