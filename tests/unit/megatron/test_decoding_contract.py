# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What the decoding engine may ask of Megatron modules: batches, ranks, half layers, caches, refusals, rotation."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request
from tests.unit.checkpoint.conftest import megatron  # noqa: F401  (fixture)
from tests.unit.megatron import decode_as_rank
from tests.unit.megatron.test_decoding_adapter import (  # noqa: F401  (`directory` and `llama` are fixtures)
    EXITS,
    NEVER_MET,
    VARIED,
    build,
    directory,
    engine_of,
    llama,
    often_met,
    some_prompts,
)

pytestmark = pytest.mark.usefixtures("megatron")


def test_a_batch_gives_each_sequence_what_it_gets_alone(llama):  # noqa: F811
    engine = engine_of(llama)
    policy = often_met(llama, ["mlp1", "layer1", "mlp2"])
    prompts = some_prompts(133, (5, 1, 9, 3))
    together = engine.generate(prompts, max_new_tokens=[18, 6, 12, 20], policy=policy, sampling=VARIED)
    for index, prompt in enumerate(prompts):
        length = len(together.tokens[index])
        alone = engine.generate([prompt], max_new_tokens=length, policy=policy, sampling=VARIED)
        assert alone.tokens[0] == together.tokens[index]
        for one, other in zip(alone.events, together.events_of(index), strict=True):
            assert (one.exit, one.position) == (other.exit, other.position)
            assert one.confidence == pytest.approx(other.confidence, abs=1e-5)
    assert len({event.exit for event in together.events}) > 1


@pytest.mark.slow_unit
def test_two_tensor_parallel_ranks_decode_what_one_does(directory, tmp_path):  # noqa: F811
    """Query groups, the vocabulary (odd, padded) and the low-rank updates are split over two gloo ranks."""
    path = directory("llama").path
    exits = [exit if exit.get("init") == "lora" else {**exit, "init": "random"} for exit in EXITS]
    one_rank = build(path, exits, drawn=False)
    request = {
        "exits": exits,
        "modes": ["early_exit", "self_speculative"],
        "prompts": some_prompts(133),
        "max_new_tokens": 12,
        "thresholds": often_met(one_rank, [exit["name"] for exit in EXITS]).thresholds,
        "sampling": dataclasses.asdict(VARIED),
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", decode_as_rank.__name__, path, tmp_path / "request.json", tmp_path / "rank"]
    ran = subprocess.run(list(map(str, command)), cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    expected = decode_as_rank.decode(path, request)
    assert len({event[3] for event in expected}) > 2
    for rank in range(2):
        found = json.loads((tmp_path / f"rank.{rank}.json").read_text())
        assert [event[:4] for event in found] == [event[:4] for event in expected]
        assert [event[4] for event in found] == pytest.approx([event[4] for event in expected], abs=1e-5)


def test_splitting_a_run_into_half_layers_changes_nothing(llama):  # noqa: F811
    model = engine_of(llama).model
    positions = TokenPositions.of({0: range(4), 1: range(7)})
    tokens = torch.tensor([token for prompt in some_prompts(133, (4, 7)) for token in prompt])
    whole, split = (model.new_cache(2, 8, ()) for _ in range(2))
    hidden = model.embed(tokens, positions)
    expected = model.run(hidden, positions, 0, 6, whole)
    for stop in range(6):
        hidden = model.run(hidden, positions, stop, stop + 1, split)
    assert torch.equal(hidden, expected)
    logits = model.exit_logits(None, hidden, positions, split)
    assert logits.shape == (11, 133) and logits.dtype == torch.float32, "padded rows of the vocabulary are cut off"


def test_an_exit_that_is_not_active_has_no_keys_and_values(llama):  # noqa: F811
    model = engine_of(llama).model
    cache = model.new_cache(1, 4, ("mlp1", "layer2"))
    cache.valid("layer2")
    for slot in ("layer1", "mlp1"):
        with pytest.raises(KeyError):
            cache.valid(slot)


def test_half_precision_weights_decode_in_half_precision(directory):  # noqa: F811
    model = build(directory("llama").path).bfloat16()
    engine = engine_of(model)
    session = engine.start([Request((3, 4, 5), 6)], policy=ExitPolicy(NEVER_MET))
    while not session.finished:
        session.step()
    assert session.cache.keys(1).dtype == torch.bfloat16 and session.cache.keys("layer1").dtype == torch.bfloat16


def test_the_model_describes_itself(llama, directory):  # noqa: F811
    model = engine_of(llama).model
    assert [point.name for point in model.exits] == [exit["name"] for exit in EXITS]
    assert [point.stop for point in model.exits] == [1, 2, 2, 3, 4, 4]
    assert (model.num_layers, model.vocab_size, model.max_positions) == (3, 133, 32)
    assert engine_of(build(directory("gpt2").path, [])).model.max_positions == 32


def test_a_model_cut_at_its_deepest_exit_cannot_decode(directory):  # noqa: F811
    with pytest.raises(ValueError, match=r"only 2 of 3 layers and no final exit were built.*full_depth=True"):
        engine_of(build(directory("llama").path, full_depth=False))


def test_every_reason_is_named_at_once(directory):  # noqa: F811
    model = build(directory("llama").path)
    model.config = dataclasses.replace(model.config)
    model.config.pipeline_model_parallel_size, model.config.sequence_parallel = 2, True
    model.config.context_parallel_size, model.position_embedding_type = 2, "mrope"
    with pytest.raises(ValueError) as problem:
        engine_of(model)
    for part in (
        "pipeline_model_parallel_size=2",
        "sequence_parallel=True",
        "context_parallel_size=2",
        "position_embedding_type='mrope'",
        "set it to False",
    ):
        assert part in str(problem.value)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [6, 10])
def test_rotation_is_megatrons_own(interleaved, size):
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from nemo_ee.generation.rotary import RotaryTable, cos_sin, rotate

    embedding = RotaryEmbedding(10, size / 10, interleaved, use_cpu_initialization=True)
    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=interleaved, multi_latent_attention=False, mrope_section=None
    )
    heads = torch.randn(400, 3, 10, generator=torch.Generator().manual_seed(0))
    expected = apply_rotary_pos_emb(heads[:, None], embedding(400), config)[:, 0]
    table = RotaryTable(embedding.get_freqs_non_repeated, torch.device("cpu"))
    for first, last in ((0, 3), (3, 4), (390, 400)):  # the table grows in between
        positions = TokenPositions.of({0: range(first, last)})
        rotation = cos_sin(table.at(positions), interleaved=interleaved, dtype=torch.float32)
        found = rotate(heads[first:last], *rotation, interleaved=interleaved)
        assert torch.equal(found, expected[first:last]), "bitwise"
