# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories as Megatron weights: logits equal to transformers' own, and any chunk.

Exactness: logits to 1e-5 of the largest, fp32; chunks and dtypes bitwise.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ee.checkpoint.chunk_reader import TensorInfo, WeightSource
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.checkpoint.nemo_config import nemo_config
from nemo_ee.families.architecture import QKV as QKV_LINEAR
from tests.helpers.huggingface_models import TINY_MODELS, change_config, reference_logits, save_tiny_model
from tests.unit.checkpoint.reference_gpt import build_gpt, fill, gpt_logits

FC1 = "decoder.layers.mlp.linear_fc1.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
PROJ_BIAS = "decoder.layers.self_attention.linear_proj.bias"
WORDS = "embedding.word_embeddings.weight"


class Changed:
    """A source with one tensor altered, for controls."""

    def __init__(self, source: WeightSource, key: str, change: Any) -> None:
        self.source, self.key, self.change = source, key, change

    def keys(self) -> dict[str, TensorInfo]:
        return self.source.keys()

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], **options: bool) -> torch.Tensor:
        if key != self.key:
            return self.source.read(key, offset, shape, **options)
        whole = self.change(self.source.read(key, (0,) * len(shape), self.keys()[key].shape))
        return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def _difference(source: HuggingFaceSource, model: Any, filled_from: WeightSource | None = None) -> float:
    """Largest difference of the two models' logits, relative to the largest logit."""
    config = nemo_config(source.backbone)
    gpt = build_gpt(config)
    keys = fill(gpt, filled_from or source)
    assert keys == source.keys().keys()
    tokens = torch.randint(config["vocab_size"], (2, 32), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(model, tokens)
    assert expected.abs().max() > 0.1
    actual = gpt_logits(gpt, tokens, config["vocab_size"])
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_megatron_computes_the_same_logits(megatron: None, tmp_path: Path, name: str) -> None:
    model = save_tiny_model(tmp_path, name)
    assert _difference(HuggingFaceSource(tmp_path), model) < 1e-5


@pytest.mark.parametrize(
    ("name", "key", "change"),
    [
        ("llama", FC1, lambda w: torch.cat(w.chunk(2, 1)[::-1], 1)),  # up before gate
        ("llama", QKV, lambda w: torch.cat([w[:, 30:40], w[:, :30], w[:, 40:]], 1)),  # a key among the queries
        ("llama-mlp-bias", "decoder.layers.mlp.linear_fc1.bias", torch.zeros_like),
        ("gpt2", QKV, lambda w: w.flip(1)),
        ("opt", "embedding.position_embeddings.weight", lambda w: w.roll(1, 0)),  # positions one off
    ],
)
def test_control_a_misplaced_weight_shows_in_the_logits(
    megatron: None, tmp_path: Path, name: str, key: str, change: Any
) -> None:
    model = save_tiny_model(tmp_path, name)
    source = HuggingFaceSource(tmp_path)
    assert _difference(source, model, Changed(source, key, change)) > 1e-3


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama-linear", "seq_len_interpolation_factor", None),
        ("llama-llama3", "low_freq_factor", 2.0),
        ("llama-llama3", "scale_positional_embedding", False),
        ("llama-llama3", "rotary_base", 10000.0),
        ("gpt2", "openai_gelu", False),
        ("mistral", "layernorm_epsilon", 1e-6),
    ],
)
def test_control_a_wrong_config_value_shows_in_the_logits(
    megatron: None, tmp_path: Path, name: str, key: str, value: object
) -> None:
    model = save_tiny_model(tmp_path, name)
    source = HuggingFaceSource(tmp_path)
    config = nemo_config(source.backbone)
    assert config[key] != value
    gpt = build_gpt(config | {key: value})
    fill(gpt, source)
    tokens = torch.arange(32)[None]
    expected = reference_logits(model, tokens)
    difference = (gpt_logits(gpt, tokens, config["vocab_size"]) - expected).abs().max() / expected.abs().max()
    assert difference > 3e-5


FORMATS = [
    {"safetensors": safetensors, "shard_bytes": shard_bytes}
    for safetensors, shard_bytes in itertools.product((True, False), (None, 8_000))
]


@pytest.mark.parametrize("name", ["llama-bias", "gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_file_format_gives_the_same_tensors_in_the_stored_dtype(tmp_path: Path, name: str, dtype) -> None:
    sources = []
    for index, form in enumerate(FORMATS):
        save_tiny_model(tmp_path / str(index), name, dtype=dtype, **form)
        sources.append(HuggingFaceSource(tmp_path / str(index)))
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 2 and len(list((tmp_path / "3").glob("*.bin"))) > 2
    for key, info in sources[0].keys().items():
        tensors = [source.read(key, (0,) * len(info.shape), info.shape) for source in sources]
        assert info.dtype == dtype and all(tensor.dtype == dtype for tensor in tensors)
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors), key


@pytest.mark.parametrize("name", ["llama-attention-bias", "gpt2", "opt"])
def test_any_chunk_is_exactly_the_slice(tmp_path: Path, name: str) -> None:
    save_tiny_model(tmp_path, name)
    source = HuggingFaceSource(tmp_path)
    assert isinstance(source, WeightSource)
    generator = torch.Generator().manual_seed(3)
    for key, info in source.keys().items():
        whole = source.read(key, (0,) * len(info.shape), info.shape)
        assert tuple(whole.shape) == info.shape
        for _ in range(20):
            ends = [sorted(torch.randint(size + 1, (2,), generator=generator).tolist()) for size in info.shape]
            chunk = source.read(key, tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
            assert torch.equal(chunk, whole[tuple(slice(a, b) for a, b in ends)]), key


def test_reading_a_layer_touches_only_that_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path, "llama")
    source = HuggingFaceSource(tmp_path)
    touched: list[tuple[str, tuple[tuple[int, int], ...]]] = []
    read = source._files.read
    monkeypatch.setattr(
        source._files, "read", lambda name, ranges: (touched.append((name, ranges)), read(name, ranges))[1]
    )
    source.read(FC1, (1, 10, 4), (1, 20, 3))
    assert touched == [("model.layers.1.mlp.gate_proj.weight", ((10, 30), (4, 7)))]
    touched.clear()
    source.read(QKV, (2, 40, 0), (1, 10, 40))  # the value head of the first of two groups
    assert touched == [("model.layers.2.self_attn.v_proj.weight", ((0, 10), (0, 40)))]


def test_rows_past_the_vocabulary_are_zeros_only_on_request(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, "llama")
    source = HuggingFaceSource(tmp_path)
    chunk = source.read(WORDS, (130, 0), (6, 40), allow_missing_rows=True)
    assert torch.equal(chunk[:3], model.model.embed_tokens.weight[130:]) and not chunk[3:].any()
    with pytest.raises(ValueError, match="lies outside of it"):
        source.read(WORDS, (130, 0), (6, 40))
    with pytest.raises(KeyError, match="no tensor 'x'"):
        source.read("x", (0,), (1,))


def test_biases_that_only_some_linears_have_are_completed_with_zeros(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "mlp", "llama-mlp-bias")
    source = HuggingFaceSource(tmp_path / "mlp")
    assert source.backbone.bias and not nemo_config(source.backbone)["qkv_bias"]
    assert not source.read(PROJ_BIAS, (0, 0), source.keys()[PROJ_BIAS].shape).any()
    save_tiny_model(tmp_path / "qwen2", "qwen2")
    source = HuggingFaceSource(tmp_path / "qwen2")
    assert source.backbone.biases == {QKV_LINEAR} and not source.backbone.bias and PROJ_BIAS not in source.keys()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_bare_models_without_the_base_prefix_are_read(tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny_model(tmp_path, name)
    expected = HuggingFaceSource(tmp_path)
    prefix = "transformer." if name == "gpt2" else "model."
    stored = {key.removeprefix(prefix): value for key, value in load_file(tmp_path / "model.safetensors").items()}
    extra = {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    extra = extra if name == "gpt2" else {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    save_file(stored | (extra if name != "opt" else {}), tmp_path / "model.safetensors")
    bare = HuggingFaceSource(tmp_path)
    for key, info in expected.keys().items():
        arguments = (key, (0,) * len(info.shape), info.shape)
        assert torch.equal(bare.read(*arguments), expected.read(*arguments))


def test_parts_of_different_dtype_are_read_in_the_wider_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny_model(tmp_path, "llama", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    stored[name] = stored[name].float() + 1e-6
    save_file(stored, tmp_path / "model.safetensors")
    source = HuggingFaceSource(tmp_path)
    assert source.keys()[FC1].dtype == torch.float32 and source.keys()[QKV].dtype == torch.bfloat16
    assert torch.equal(source.read(FC1, (1, 56, 0), (1, 56, 40))[0], stored[name])


def _with_changes(folder: Path, change: Any, *, shards: int = 3) -> None:
    """Rewrite `model.safetensors` as several files with an index, tensors changed in place of a dict."""
    import json

    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({n: t.contiguous() for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2", "mistral"])
def test_mixed_dtypes_keep_their_dtypes_and_their_logits(megatron: None, tmp_path: Path, name: str) -> None:
    """bfloat16 matrices, float32 vectors, one float16 and one float64 tensor, in several files."""
    from transformers import AutoModelForCausalLM

    save_tiny_model(tmp_path, name)

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        matrices = sorted(key for key in tensors if tensors[key].ndim == 2)
        half = next(key for key in matrices if ".1." in key)
        for key in matrices:
            tensors[key] = tensors[key].to(torch.float16 if key == half else torch.bfloat16)
        vectors = sorted(key for key in tensors if tensors[key].ndim == 1)
        tensors[vectors[0]] = tensors[vectors[0]].double()

    _with_changes(tmp_path, mix)
    source = HuggingFaceSource(tmp_path)
    dtypes = {info.dtype for info in source.keys().values()}
    assert {torch.float32, torch.bfloat16} <= dtypes <= {torch.float32, torch.bfloat16, torch.float16}
    norm = "decoder.final_layernorm.weight"
    assert source.keys()[norm].dtype is torch.float32 and source.keys()[WORDS].dtype is torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.float32, attn_implementation="eager")
    assert _difference(source, theirs) < 1e-5
    rounded = Changed(source, norm, lambda w: w.bfloat16().float())
    assert _difference(source, theirs, rounded) > 1e-4, "control: as it was when all took the embedding's dtype"


@pytest.mark.parametrize("safetensors", [True, False])
def test_weights_that_are_not_finite_are_named_with_their_files(tmp_path: Path, safetensors: bool) -> None:
    model = save_tiny_model(tmp_path / "good", "llama")
    up, norm = model.model.layers[1].mlp.up_proj.weight, model.model.norm.weight
    with torch.no_grad():
        up[0, :3], up[4, 4], norm[5] = float("nan"), float("inf"), -float("inf")
    model.save_pretrained(tmp_path / "bad", safe_serialization=safetensors, max_shard_size=30_000)
    source = HuggingFaceSource(tmp_path / "bad")
    assert source.read(QKV, (0, 0, 0), source.keys()[QKV].shape).isfinite().all(), "what is whole is read"
    files = {path.name for path in (tmp_path / "bad").iterdir()}
    for key, offset, shape in ((FC1, (1, 0, 0), (1, 112, 40)), ("decoder.final_layernorm.weight", (0,), (40,))):
        with pytest.raises(ValueError, match="^.*bad holds weights that are not finite:\n") as caught:
            source.read(key, offset, shape)
        first, second = (line.strip() for line in str(caught.value).splitlines()[1:-1])
        assert first.endswith(": model.layers.1.mlp.up_proj.weight: 3 NaN and 1 infinite of 2240 numbers")
        assert second.endswith(": model.norm.weight: 0 NaN and 1 infinite of 40 numbers")
        assert {first.split(": ")[0], second.split(": ")[0]} <= files


def test_weights_and_config_that_do_not_fit_give_all_problems_at_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny_model(tmp_path, "llama")
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    stored["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    stored["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(2)
    stored["model.norm.weight"] = torch.zeros(41)
    stored["lm_head.weight"] = torch.zeros(133, 40, dtype=torch.int8)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        HuggingFaceSource(tmp_path)
    for part in (
        "layers.1.mlp.up_proj.weight is missing",
        "model.layers.9.mlp.up_proj.weight is not read",
        "model.layers.0.self_attn.q_norm.weight is not read",
        "model.norm.weight has shape [41], must be [40]",
        "lm_head.weight has dtype I8, must be a floating one",
        "5 problems",
    ):
        assert part in str(caught.value)


def test_tied_models_may_store_the_output_matrix_again(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny_model(tmp_path, "llama-tied")
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    assert "output_layer.weight" not in HuggingFaceSource(tmp_path).keys()
    change_config(tmp_path, tie_word_embeddings=False)
    assert "output_layer.weight" in HuggingFaceSource(tmp_path).keys()


# What each family refuses: model, config values, words of the reason.
