# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A GGUF file converts to the same `.nemo` as the Hugging Face directory that it was made from; export and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("nemo")
pytest.importorskip("gguf")

from tests.helpers.megatron_models import exit_entry

import torch  # isort: skip  # after the CPU host is on

from nemo_ee.checkpoint.chunk_reader import numbers_by_dtype
from nemo_ee.export.gguf.gguf_exporter import GgufSettings, export_gguf
from nemo_ee.export.source import EarlyExitSource
from nemo_ee.text.tokenizer_json import JsonTokenizer
from tests.functional.test_export_huggingface import Made, export, stock
from tests.helpers.gguf_files import write_gguf
from tests.helpers.gguf_tokenizers import tokenizer_and_metadata
from tests.helpers.huggingface_models import reference_logits, save_tiny_model
from tests.helpers.nemo_files import members, run_convert
from tests.stack.small_tokenizers import TEXTS

EXITS = [exit_entry(1, "mlp"), exit_entry(2, "norm"), exit_entry(2, "embedding")]


@pytest.mark.parametrize(("name", "kind"), [("llama", "llama2"), ("qwen3", "qwen")])
def test_the_same_file_as_from_the_directory(name: str, kind: str, tmp_path: Path) -> None:
    metadata = tokenizer_and_metadata(tmp_path / "hf", kind)
    metadata |= {"tokenizer.ggml.eot_token_id": 5}
    model = save_tiny_model(tmp_path / "hf", name, vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer=metadata)
    one = run_convert(path, tmp_path / "gguf.nemo", EXITS)
    other = run_convert(tmp_path / "hf", tmp_path / "hf.nemo", EXITS)
    assert one.fingerprint == other.fingerprint and one.exits == other.exits
    assert one.logit_difference is None and other.logit_difference is not None
    written = members(tmp_path / "gguf.nemo")
    assert str(tmp_path).encode() not in written["model_config.yaml"], "no path of the source"
    assert json.loads(written["tokenizer/generation_config.json"])["eos_token_id"][1] == 5
    folder = export(tmp_path / "gguf.nemo", tmp_path / "out", targets=("full",)) / "hf_full"
    tokens = torch.tensor([[5, 71, 13, 9, 0, 44]])
    assert torch.equal(reference_logits(stock(folder), tokens), reference_logits(model, tokens))
    original, ours = JsonTokenizer(tmp_path / "hf"), JsonTokenizer(folder)
    assert [ours(text) for text in TEXTS] == [original(text) for text in TEXTS]
    assert ours.chat_template == original.chat_template


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_tensors_are_stored_as_wanted(dtype: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
    path = write_gguf(tmp_path / "model.gguf", save_tiny_model(tmp_path / "hf", "llama", **sizes), kind="Q8_0")
    run_convert(path, tmp_path / "ee.nemo", EXITS, f"gguf_dtype={dtype}")
    with EarlyExitSource(tmp_path / "ee.nemo") as source:
        assert next(iter(numbers_by_dtype(source.backbone.keys()))) is getattr(torch, dtype)


def test_problems_come_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_ee.commands import convert as module

    monkeypatch.setattr(module, "single_run_trainer", lambda *_: pytest.fail("work began before the problems came"))
    path = write_gguf(tmp_path / "model.gguf", save_tiny_model(tmp_path / "hf", "llama"), tokenizer__ggml__model="t5")
    with pytest.raises(ValueError, match="tokenizer.ggml.model is 't5'"):
        run_convert(path, tmp_path / "ee.nemo", EXITS)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged or no GGUF file"):
        run_convert(path, tmp_path / "ee.nemo", EXITS)
    assert not list(tmp_path.glob("*.nemo*"))


def test_what_cannot_be_a_gguf_file(tmp_path: Path) -> None:
    def refusal(made: Made, **settings: object) -> str:
        with pytest.raises(ValueError) as caught:
            export_gguf(GgufSettings.from_config({"checkpoint": made.path, "output": tmp_path / "out", **settings}))
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "llama.cpp has no opt" in refusal(Made(tmp_path / "opt", "opt", EXITS))
    embedding = "l2-embedding-copy-own"
    erf = refusal(Made(tmp_path / "erf", "gpt2-untied-erf", EXITS), exits=embedding)
    for part in ("hidden_act='gelu_erf'", f"exit '{embedding}' cannot be a stand-alone model"):
        assert part in erf, "every problem at once"
