# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The backbone's fingerprint: what it depends on and what it does not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from nemo_ee.checkpoint import fingerprint
from nemo_ee.checkpoint.chunk_reader import ChunkReader, TensorInfo
from nemo_ee.checkpoint.fingerprint import backbone_fingerprint
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.checkpoint.nemo_config import nemo_config
from tests.helpers.huggingface_models import save_tiny_model

STACKED = "decoder.layers.mlp.linear_fc2.weight"
WORDS = "embedding.word_embeddings.weight"


class Tensors:
    """A source over tensors in memory that records the largest chunk asked for."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.largest = tensors, 0

    def keys(self) -> dict[str, TensorInfo]:
        return {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in self.tensors.items()}

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        self.largest = max(self.largest, torch.Size(shape).numel())
        return self.tensors[key][tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        WORDS: torch.randn(12, 4, generator=generator),
        STACKED: torch.randn(3, 4, 6, generator=generator).bfloat16(),
        "decoder.final_layernorm.weight": torch.randn(4, generator=generator),
        "output_layer.weight": torch.randn(12, 4, generator=generator).half(),
    }


def test_it_is_the_documented_hash() -> None:
    expected = hashlib.sha256(b"nemo_ee backbone fingerprint 1\n")
    for key, tensor in sorted(_tensors().items()):
        expected.update(f"{key} {str(tensor.dtype)[6:]} {list(tensor.shape)}\n".encode())
        expected.update(tensor.view(torch.uint8).numpy().tobytes())
    assert backbone_fingerprint(Tensors(_tensors())) == expected.hexdigest()


def test_it_changes_with_name_shape_dtype_and_any_bit() -> None:
    seen = {backbone_fingerprint(Tensors(_tensors()))}
    for change in (
        lambda t: t | {"decoder.other": t.pop("decoder.final_layernorm.weight")},
        lambda t: t | {WORDS: t[WORDS].reshape(6, 8)},
        lambda t: t | {WORDS: t[WORDS].view(torch.int32)},
        lambda t: t | {STACKED: t[STACKED].flip(0)},
        lambda t: t | {WORDS: t[WORDS].clone().index_put_((torch.tensor(11), torch.tensor(3)), torch.tensor(0.0))},
        lambda t: {key: value for key, value in t.items() if key != "output_layer.weight"},
        lambda t: t | {"decoder.extra": torch.zeros(0)},
    ):
        digest = backbone_fingerprint(Tensors(change(_tensors())))
        assert digest not in seen
        seen.add(digest)


def test_exits_extra_state_order_and_strides_do_not_count() -> None:
    plain = backbone_fingerprint(Tensors(_tensors()))
    more = {"exits.a.mlp.weight": torch.ones(2), "decoder.layers.self_attention._extra_state": torch.ones(1)}
    assert backbone_fingerprint(Tensors(dict(reversed((_tensors() | more).items())))) == plain
    strided = {key: value.t().contiguous().t() if value.ndim == 2 else value for key, value in _tensors().items()}
    assert not strided[WORDS].is_contiguous() and backbone_fingerprint(Tensors(strided)) == plain


def test_memory_is_bounded_and_progress_told(monkeypatch: pytest.MonkeyPatch) -> None:
    source, told = Tensors(_tensors()), []
    whole = backbone_fingerprint(source)
    monkeypatch.setattr(fingerprint, "_BLOCK_BYTES", 40)
    source.largest = 0
    assert backbone_fingerprint(source, on_bytes=told.append) == whole, "the size of the blocks does not count"
    assert source.largest == 4 * 6, "one layer at most"
    assert sum(told) == sum(tensor.nbytes for tensor in _tensors().values())


def test_vocabulary_padding_does_not_count_when_the_size_is_given() -> None:
    padded = {key: torch.cat([t, t.new_zeros(4, 4)]) if t.shape == (12, 4) else t for key, t in _tensors().items()}
    plain = backbone_fingerprint(Tensors(_tensors()))
    assert backbone_fingerprint(Tensors(padded)) != plain
    assert backbone_fingerprint(Tensors(padded), vocab_size=12) == plain
    assert backbone_fingerprint(Tensors(_tensors()), vocab_size=12) == plain
    with pytest.raises(ValueError, match="word_embeddings.weight has 12 rows, fewer than the vocabulary size 13"):
        backbone_fingerprint(Tensors(_tensors()), vocab_size=13)
    with pytest.raises(ValueError, match="no backbone to fingerprint"):
        backbone_fingerprint(Tensors({"exits.a": torch.ones(1)}))


@pytest.mark.parametrize("name", ["llama-bias", "gpt2"])
def test_a_saved_megatron_checkpoint_has_the_fingerprint_of_its_source(
    megatron: None, tmp_path: Path, name: str
) -> None:
    from megatron.core import dist_checkpointing

    from tests.unit.checkpoint.reference_gpt import build_gpt, fill

    save_tiny_model(tmp_path / "hf", name, dtype=torch.float32)
    source = HuggingFaceSource(tmp_path / "hf")
    gpt = build_gpt(nemo_config(source.backbone))
    fill(gpt, source)
    (tmp_path / "weights").mkdir()
    dist_checkpointing.save({"state_dict": gpt.sharded_state_dict(prefix="model.")}, str(tmp_path / "weights"))
    reader, vocab_size = ChunkReader(tmp_path / "weights"), source.backbone.vocab_size
    assert reader.keys().keys() == source.keys().keys()
    for key, info in source.keys().items():
        arguments = (key, (0,) * len(info.shape), info.shape)
        assert torch.equal(reader.read(*arguments), source.read(*arguments)), key
    assert reader.keys()[WORDS].shape[0] > vocab_size, "padded"
    assert backbone_fingerprint(reader, vocab_size=vocab_size) == backbone_fingerprint(source)
    save_tiny_model(tmp_path / "bin", name, dtype=torch.float32, safetensors=False, shard_bytes=8_000)
    assert backbone_fingerprint(HuggingFaceSource(tmp_path / "bin")) == backbone_fingerprint(source)
    save_tiny_model(tmp_path / "other", name, seed=1)
    assert backbone_fingerprint(HuggingFaceSource(tmp_path / "other")) != backbone_fingerprint(source)
