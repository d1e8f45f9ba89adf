# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The runtime against transformers on the same directories, without NeMo: logits, exits, caches, batches.

fp32, tolerance 1e-5 of the largest logit; half precision is only shown to run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is the reference here")

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.kv_cache import KVCache, Placement
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request
from nemo_ee.generation.stats import Failure
from nemo_ee.runtime.linear import (
    HalfLinear,
    PlainLinear,
    QuantizedHalfLinear,
    make_half_linear,
    make_linear,
    packs_half_weights,
)
from nemo_ee.runtime.loader import load_model
from nemo_ee.runtime.model import RuntimeModel
from nemo_ee.runtime.norm import RmsNorm, ShortRmsNorm, make_rms_norm
from nemo_ee.runtime.rotary_frequencies import inverse_frequencies, pairs_together
from tests.helpers.huggingface_models import TINY_MODELS, reference_logits, save_tiny_model

TOLERANCE = 1e-5
LENGTH = 14


def random_tokens(vocab_size: int, batch: int = 3) -> Tensor:
    return torch.randint(0, vocab_size, (batch, LENGTH), generator=torch.Generator().manual_seed(5))


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()).item()


def whole(model: RuntimeModel, tokens: Tensor, exit: str | None = None) -> Tensor:
    """Logits `[b, s, v]` of an exit, all positions in one go."""
    batch, length = tokens.shape
    positions = TokenPositions.of({row: range(length) for row in range(batch)})
    cache = model.new_cache(batch, length, tuple(point.name for point in model.exits))
    stop = next((point.stop for point in model.exits if point.name == exit), 2 * model.num_layers)
    hidden = model.run(model.embed(tokens.flatten(), positions), positions, 0, stop, cache)
    return model.exit_logits(exit, hidden, positions, cache).view(batch, length, -1)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_are_transformers(name: str, tmp_path: Path) -> None:
    reference = save_tiny_model(tmp_path, name)
    model = load_model(tmp_path)
    tokens = random_tokens(model.vocab_size)
    expected = reference_logits(reference, tokens)
    assert close(whole(model, tokens), expected)
    assert not close(whole(model, tokens.flip(1)), expected), "control: other tokens"


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_pieces_fill_the_cache_as_the_whole_does(name: str, tmp_path: Path) -> None:
    """Prompts, single tokens of a ragged batch, runs of waiting tokens: every way through the attention."""
    reference = save_tiny_model(tmp_path, name)
    model = load_model(tmp_path)
    tokens = random_tokens(model.vocab_size)
    expected = reference_logits(reference, tokens)
    cache, end = model.new_cache(3, LENGTH, ()), 2 * model.num_layers
    steps = [
        {0: range(4), 1: range(2), 2: range(6)},
        {0: [4], 1: [2], 2: [6]},
        {0: [5], 2: [7]},
        {1: range(3, 7)},
        {0: range(6, 9), 1: [7], 2: range(8, 14)},
        {0: range(9, 14), 1: range(8, 14)},
    ]
    for positions in steps:
        positions = TokenPositions.of({row: list(own) for row, own in positions.items()})
        hidden = model.embed(tokens[positions.sequence, positions.position], positions)
        for stop in range(end):
            hidden = model.run(hidden, positions, stop, stop + 1, cache)
        logits = model.exit_logits(None, hidden, positions, cache)
        assert close(logits, expected[positions.sequence, positions.position])


def test_a_norm_exit_is_the_logit_lens(tmp_path: Path) -> None:
    """An exit made by hand from the final norm and output, against transformers' own hidden states."""
    reference = save_tiny_model(tmp_path, "llama-bias")
    stored = load_file(tmp_path / "model.safetensors")
    stored["exit_heads.lens.norm.weight"] = stored["model.norm.weight"].clone()
    stored["exit_heads.lens.unembed.weight"] = stored["lm_head.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"name": "lens", "layer": 2, "architecture": "norm", "output": "own"}
    shared = {**own, "name": "bare", "architecture": "embedding", "output": "backbone"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"early_exit": {"exits": [own, shared]}}))
    model = load_model(tmp_path)
    tokens = random_tokens(model.vocab_size)
    with torch.no_grad():
        hidden = reference(tokens, output_hidden_states=True).hidden_states[2]
        lens = reference.lm_head(reference.model.norm(hidden))
        bare = reference.lm_head(hidden)
    assert close(whole(model, tokens, "lens"), lens) and close(whole(model, tokens, "bare"), bare)
    assert not close(whole(model, tokens), lens), "control: not the final exit"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(dtype: str, tmp_path: Path) -> None:
    reference = save_tiny_model(tmp_path, "llama")
    model = load_model(tmp_path, dtype=dtype)
    tokens = random_tokens(model.vocab_size)
    expected = reference_logits(reference, tokens)
    logits = whole(model, tokens)
    assert logits.dtype is torch.float32
    assert ((logits - expected).abs().max() / expected.abs().max()).item() < 0.1
    result = EarlyExitEngine(model).generate([[1, 2, 3], [4]], max_new_tokens=6, mode="full")
    assert all(len(own) == 6 for own in result.tokens)


def test_a_mistral_is_used_up_to_its_window(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "mistral", sliding_window=20)
    model = load_model(tmp_path)
    assert model.max_positions == 20
    with pytest.raises(ValueError, match="more than the model's 20 positions"):
        EarlyExitEngine(model).generate([[1] * 15], max_new_tokens=6, policy=ExitPolicy(0.5))


@pytest.mark.skipif(transformers.__version__ >= "5", reason="transformers 5 saves no pickles")
def test_weights_in_a_pickle_are_not_opened(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama", safetensors=False)
    with pytest.raises(ValueError, match=r"model\.safetensors: missing or damaged"):
        load_model(tmp_path)


def test_pairs_are_reordered_within_each_head() -> None:
    rows = torch.arange(12)
    assert pairs_together(rows, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize("name", ["llama", "llama-linear", "llama-llama3"])
def test_frequencies_are_transformers(name: str, tmp_path: Path) -> None:
    reference = save_tiny_model(tmp_path, name)
    model = load_model(tmp_path)
    ours = inverse_frequencies(model.architecture)
    assert torch.allclose(ours, reference.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_weights_stored_in_half_precision_are_computed_in_fp32(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """To fp32's tolerance what transformers gives for those weights in fp32, though they stay in half precision."""
    reference = save_tiny_model(tmp_path, name, dtype=dtype)
    tokens = random_tokens(reference.config.vocab_size)
    rounded = reference_logits(reference, tokens)
    # Loaded anew: a cast back to fp32 would keep rounded rotary frequencies.
    in_fp32 = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.float32).eval()
    expected = reference_logits(in_fp32, tokens)
    model = load_model(tmp_path)
    assert model.dtype is torch.float32 and model.weights.embedding.dtype is dtype
    assert close(whole(model, tokens), expected)
    assert not close(rounded, expected), "control: half-precision arithmetic is further away"


def test_the_products_of_half_precision_weights() -> None:
    """Small, large and too large numbers; against fp64."""
    if not packs_half_weights():
        pytest.skip("this PyTorch has no fp16 products")
    generator = torch.Generator().manual_seed(1)
    inputs, bias = torch.randn(5, 64, generator=generator), torch.randn(48, generator=generator)
    for scale in (1e-6, 0.02, 900.0, 1e5):
        weight = (scale * torch.randn(48, 64, generator=generator)).bfloat16().float()
        linear = make_linear(weight, bias, stored_in_half=True)
        assert isinstance(linear, PlainLinear if scale in (1e-6, 1e5) else HalfLinear)
        product = inputs.double() @ weight.double().t()
        expected = (product + bias).float()
        assert close(linear(inputs), expected)
        # Without the bias, beside which small products would not show.
        assert close(make_linear(weight, None, stored_in_half=True)(inputs), product.float())
        packed = make_half_linear(weight, None)(inputs)
        if isinstance(linear, HalfLinear):
            older = QuantizedHalfLinear(torch.ops.quantized.linear_prepack_fp16(weight, bias))
            assert torch.equal(linear(inputs), older(inputs)), "one product behind two calls, bitwise"
        assert close(packed, product.float()) == (scale not in (1e-6, 1e5)), "control: what fp16 does not hold"
        residual = torch.randn(5, 48, generator=generator)
        before = residual.clone()
        assert close(linear.added_to(residual, inputs), expected + residual) and torch.equal(residual, before)
    assert isinstance(make_linear(weight, bias, stored_in_half=False), PlainLinear)


def test_rms_norm_in_four_operations() -> None:
    """Rows from large to all zero, against fp64; PyTorch's own where the weight is in half precision."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(4, 64, generator=generator) * torch.tensor([1e4, 1.0, 1e-4, 0.0])[:, None]
    weight, before = torch.randn(64, generator=generator), hidden.clone()
    norm = make_rms_norm(weight, 1e-5)
    assert isinstance(norm, ShortRmsNorm)
    wide = hidden.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    assert torch.allclose(norm(hidden).double(), expected, rtol=1e-6, atol=1e-7) and torch.equal(hidden, before)
    without = wide * wide.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt() * weight.double()
    assert not torch.allclose(norm(hidden).double(), without, rtol=1e-3), "control: without epsilon"
    assert isinstance(make_rms_norm(weight.bfloat16(), 1e-5), RmsNorm)


@pytest.mark.parametrize("cleaned", [True, False])
def test_a_slot_whose_sequence_failed_serves_another(
    cleaned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read of a shorter sequence's place beside a longer one is masked, and must be a number all the same."""
    save_tiny_model(tmp_path, "llama")
    model = load_model(tmp_path)
    model.weights.embedding[7] = math.nan
    if not cleaned:
        monkeypatch.setattr(KVCache, "truncate", lambda *_: None)
    healthy, engine = Request((3, 4), 5), EarlyExitEngine(model)
    alone = engine.generate([healthy.prompt], max_new_tokens=5, mode="full").tokens[0]
    session = engine.start([Request((1,) * 12, 15), Request((7, 7, 7, 7), 3)], mode="full", max_length=32)
    failed = [event for event in session.step() if isinstance(event, Failure)]
    assert [event.sequence for event in failed] == [1]
    index, own = session.add(healthy), []
    while not session.finished:
        own += [event for event in session.step() if event.sequence == index]
    if cleaned:
        assert tuple(event.token for event in own) == alone
    else:
        assert isinstance(own[-1], Failure), "control: it reads what the failed one left"


def test_a_cut_leaves_no_keys_and_values_behind(tmp_path: Path) -> None:
    """Of one sequence from a position on, in every slot; in a cache of one sequence they stay, nobody reads them."""
    save_tiny_model(tmp_path, "llama")
    model = load_model(tmp_path)
    for count in (2, 1):
        cache, positions = model.new_cache(count, 9, ()), TokenPositions.of(dict.fromkeys(range(count), range(6)))
        model.run(model.embed(torch.arange(1, 6 * count + 1), positions), positions, 0, 2 * model.num_layers, cache)
        before = {slot: slab.clone() for slot, slab in cache._slabs.items()}
        cache.truncate(count - 1, 2)
        for slot, slab in cache._slabs.items():
            expected = before[slot].clone()
            assert expected[count - 1, :, 2:6].ne(0).all(), "control"
            if count > 1:
                expected[count - 1, :, 2:] = 0
            assert torch.equal(slab, expected)


def test_places_are_worked_out_once_for_each_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs between two segments of a forward pass: some of its rows at an exit, another cache."""
    save_tiny_model(tmp_path, "llama")
    model, built = load_model(tmp_path), []
    whole_init = Placement.__init__
    monkeypatch.setattr(Placement, "__init__", lambda self, *how: built.append(how[0]) or whole_init(self, *how))
    positions = TokenPositions.of({0: range(3), 1: range(2)})
    picked, cache = positions.select(torch.tensor([2, 4])), model.new_cache(2, 3, ())
    hidden = model.embed(torch.arange(5), positions)
    for stop in range(4):
        hidden = model.run(hidden, positions, stop, stop + 1, cache)
        model.run(hidden[[2, 4]], picked, stop, stop + 1, cache)
    assert len(built) == 2 and built[0] is positions and built[1] is picked
    model.run(hidden, positions, 0, 1, model.new_cache(2, 3, ()))
    assert len(built) == 3, "another cache may have another dtype"
    del built[:], positions, picked
    assert not cache._placements and not model._rotations, "nothing is kept longer than its positions"
