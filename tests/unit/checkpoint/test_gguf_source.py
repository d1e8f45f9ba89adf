# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A GGUF file is the same source as the Hugging Face directory that it was made from, tensor for tensor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")

import gguf

from nemo_ee.checkpoint.chunk_reader import WeightSource
from nemo_ee.checkpoint.gguf_source import GgufSource
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.families.registry import FAMILIES
from nemo_ee.families.tensors import LAYERS
from tests.helpers.gguf_files import FAMILIES_OF_LLAMA_CPP, plain_tokenizer, write_gguf
from tests.helpers.huggingface_models import TINY_MODELS, change_config, save_tiny_model

# llama.cpp computes tanh's approximation of GELU alone.
MODELS = [name for name, (family, _) in TINY_MODELS.items() if family in FAMILIES_OF_LLAMA_CPP and "erf" not in name]
# Quantised blocks have 32 numbers.
WHOLE_BLOCKS = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}


def whole(source: WeightSource, key: str) -> torch.Tensor:
    info = source.keys()[key]
    return source.read(key, (0,) * len(info.shape), info.shape)


def differences(one: WeightSource, other: WeightSource) -> list[str]:
    assert one.keys().keys() == other.keys().keys()
    return [key for key in one.keys() if not torch.equal(whole(one, key), whole(other, key))]


def test_every_family_but_opt_has_a_form_in_gguf_files() -> None:
    assert {name for name, family in FAMILIES.items() if family.gguf is not None} == set(FAMILIES_OF_LLAMA_CPP)
    assert set(FAMILIES) - set(FAMILIES_OF_LLAMA_CPP) == {"opt"}


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "hf", name)
    source = GgufSource(write_gguf(tmp_path / "model.gguf", model))
    expected = HuggingFaceSource(tmp_path / "hf")
    assert isinstance(source, WeightSource)
    assert differences(source, expected) == []
    unequal = list(source.backbone.differences(expected.backbone))
    if name == "llama-llama3":  # one of several settings that give the same factors
        assert [field for field, *_ in unequal] == ["rotary_scaling"]
    else:
        assert unequal == []


def test_control_rows_in_another_order_are_detected(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "hf", "llama")
    model.model.layers[1].self_attn.k_proj.weight.data = model.model.layers[1].self_attn.k_proj.weight.flip(0)
    source = GgufSource(write_gguf(tmp_path / "model.gguf", model))
    assert differences(source, HuggingFaceSource(tmp_path / "hf")) == [f"{LAYERS}self_attention.linear_qkv.weight"]


def test_a_chunk_is_the_part_of_the_whole_tensor(tmp_path: Path) -> None:
    """Rows of a head are stored in pairs, so a chunk that cuts a head needs others than its own."""
    source = GgufSource(write_gguf(tmp_path / "model.gguf", save_tiny_model(tmp_path / "hf", "llama-bias")))
    for key in ("weight", "bias"):
        full = whole(source, f"{LAYERS}self_attention.linear_qkv.{key}")
        columns = ((3, 20),) if key == "weight" else ()
        for first, last in ((0, 1), (7, 9), (3, 58), (99, 100)):
            offset, shape = (1, first, *(a for a, _ in columns)), (2, last - first, *(b - a for a, b in columns))
            part = full[(slice(1, 3), slice(first, last), *(slice(*pair) for pair in columns))]
            assert torch.equal(source.read(f"{LAYERS}self_attention.linear_qkv.{key}", offset, shape), part)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_types_of_tensors(name: str, kind: str, tmp_path: Path) -> None:
    """16-bit numbers keep their dtype; quantised ones become fp32 without a further rounding."""
    model = save_tiny_model(tmp_path / "hf", name, **WHOLE_BLOCKS)
    path = write_gguf(tmp_path / "model.gguf", model, kind=kind)
    type_ = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.numpy(), type_), type_)))
    model.save_pretrained(tmp_path / "rounded")
    source, expected = GgufSource(path), HuggingFaceSource(tmp_path / "rounded")
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert source.keys()["embedding.word_embeddings.weight"].dtype is dtype
    assert source.keys()["decoder.final_layernorm.weight"].dtype is torch.float32
    assert [key for key in expected.keys() if not torch.equal(whole(source, key).float(), whole(expected, key))] == []
    if dtype is torch.float32:
        half = GgufSource(path, dequantised=torch.float16)
        key = f"{LAYERS}mlp.linear_fc2.weight"
        assert torch.equal(whole(half, key), whole(expected, key).half())


def test_only_the_rows_that_are_read_are_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = GgufSource(write_gguf(tmp_path / "m.gguf", save_tiny_model(tmp_path / "hf", "llama", **WHOLE_BLOCKS)))
    rows, dequantize = [], gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: rows.append(len(data)) or dequantize(data, kind))
    source.read("embedding.word_embeddings.weight", (40, 0), (3, 64))
    assert sum(rows) == 3
    rows.clear()
    source.read(f"{LAYERS}self_attention.linear_qkv.weight", (1, 3, 0), (1, 4, 64))
    assert sum(rows) == 16, "one head of a query"
    rows.clear()
    monkeypatch.setattr("nemo_ee.checkpoint.gguf_file._BLOCK_NUMBERS", 640)
    whole(source, "embedding.word_embeddings.weight")
    assert max(rows) == 10 and sum(rows) == 133


@pytest.mark.parametrize(("kind", "factor", "expected"), [(None, 2.0, 2.0), ("linear", 2.0, 2.0), ("none", 2.0, None)])
def test_linear_scaling(kind: str | None, factor: float, expected: float | None, tmp_path: Path) -> None:
    keys = {"llama__rope__scaling__type": kind, "llama__rope__scaling__factor": factor}
    source = GgufSource(write_gguf(tmp_path / "m.gguf", save_tiny_model(tmp_path / "hf", "llama"), **keys))
    assert (source.backbone.rotary_scaling or {}).get("factor") == expected


def test_model_files(tmp_path: Path) -> None:
    """config.json describes the model, and generation_config.json has every token that ends a text."""
    model = save_tiny_model(tmp_path / "hf", "llama")
    keys = plain_tokenizer(133) | {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.bos_token_id": 3}
    source = GgufSource(write_gguf(tmp_path / "model.gguf", model, tokenizer=keys))
    source.write_model_files(tmp_path / "hf")  # beside the weights
    again = HuggingFaceSource(tmp_path / "hf")
    assert list(again.backbone.differences(source.backbone)) == []
    config, generation = (json.loads((tmp_path / "hf" / f"{n}config.json").read_text()) for n in ("", "generation_"))
    assert [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [3, 1, None]
    assert generation == {"bos_token_id": 3, "eos_token_id": [1, 7], "pad_token_id": None}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general__architecture": "gemma3"}, "gemma3' is not supported; supported are llama, qwen2"),
    "experts": ({"llama__expert_count": 8}, "mixtures of experts"),
    "partial rotary": ({"llama__rope__dimension_count": 4}, "rope.dimension_count: 4"),
    "scaling": ({"llama__rope__scaling__type": "yarn"}, "'yarn' is not supported"),
    "absent size": ({"llama__block_count": None}, "llama.block_count: None"),
    "values": ({"llama__attention__value_length": 4}, "attention.value_length: 4"),
    "layers": ({"llama__block_count": 4}, "blk.3.attn_k.weight is missing"),
    "unread layer": ({"llama__block_count": 2}, "blk.2.attn_k.weight is not read"),
    "tokenizer": ({"tokenizer__ggml__model": "t5"}, "tokenizer.ggml.model is 't5', supported are gpt2"),
    "words": ({"tokenizer__ggml__pre": "default"}, "tokenizer.ggml.pre is 'default'"),
    "tokens": ({"tokenizer__ggml__tokens": ["a", "b"]}, "tokens has 2 entries, the embeddings have 133 rows"),
    "parts": ({"split__count": 3}, "one of 3 parts; join them"),
}  # fmt: skip


@pytest.mark.parametrize("problem", REFUSED)
def test_refused(problem: str, tmp_path: Path) -> None:
    changes, message = REFUSED[problem]
    path = write_gguf(tmp_path / "model.gguf", save_tiny_model(tmp_path / "hf", "llama"), **changes)
    with pytest.raises(ValueError) as caught:
        GgufSource(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "hf", "llama-llama3")
    model.model.rotary_emb.inv_freq[1] *= 2
    with pytest.raises(ValueError, match="not the factors of Llama 3's"):
        GgufSource(write_gguf(tmp_path / "model.gguf", model))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.3, 0.99])
def test_a_cut_file_is_refused(share: float, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", save_tiny_model(tmp_path / "hf", "llama"))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"model.gguf: damaged or no GGUF file .*fetch it again"):
        GgufSource(path)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "hf", "llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    source = GgufSource(write_gguf(tmp_path / "model.gguf", model))
    with pytest.raises(ValueError, match=r"blk.2.ffn_up.weight"):
        whole(source, f"{LAYERS}mlp.linear_fc1.weight")


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'gguf>=0.17'"):
        GgufSource("model.gguf")


def test_a_window_is_not_in_the_file(tmp_path: Path) -> None:
    """llama.cpp computes a Mistral as a Llama, within its window: the file's context is as long."""
    model = save_tiny_model(tmp_path / "hf", "mistral")
    change_config(tmp_path / "hf", sliding_window=20)
    shorter = HuggingFaceSource(tmp_path / "hf", 16).backbone
    assert FAMILIES["mistral"].gguf.metadata(shorter)["llama.context_length"] == 20
    assert GgufSource(write_gguf(tmp_path / "model.gguf", model)).backbone.family == "llama"
