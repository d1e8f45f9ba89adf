# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that NeMo 2.4 wrote on Megatron-core 0.13 load on this version without NeMo: tests/data/earlier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.placement import place_exits
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from tests.helpers import core_models  # noqa: F401 -- switches the CPU host on

pytestmark = pytest.mark.usefixtures("one_rank")

EARLIER = Path(__file__).resolve().parents[2] / "data" / "earlier"
ANSWERS = json.loads((EARLIER / "expected.json").read_text(encoding="utf-8"))["answers"]
PROMPTS = [r"for i in range(7):\n", "print("]
THRESHOLD, NEW_TOKENS = 0.03, 24  # of tests/functional/test_earlier_files.py


@pytest.fixture
def stage() -> Any:
    """The model of `complete.nemo` with its exits."""
    from nemo_ee.checkpoint.chunk_reader import ChunkReader
    from nemo_ee.checkpoint.megatron_model import load_stage, stage_of
    from nemo_ee.checkpoint.nemo_config import read_architecture
    from nemo_ee.checkpoint.portable import plain_config
    from nemo_ee.checkpoint.unpacked import open_nemo

    with open_nemo(EARLIER / "complete.nemo") as archive:
        config = plain_config(archive)
        backbone = ChunkReader(archive.folder("model_weights"))
        exits = ChunkReader(archive.folder("exit_weights"), prefix="exits.")
        rows = backbone.keys()["embedding.word_embeddings.weight"].shape[0]
        architecture = read_architecture(config, stored_rows=rows, max_positions=None)
        early_exit = EarlyExitConfig.from_mapping(config["early_exit"], num_layers=architecture.num_layers)
        places = place_exits(early_exit.exits, num_layers=architecture.num_layers, num_stages=1, full_depth=True)
        model = stage_of(architecture, early_exit, places, use_cpu_initialization=True)
        load_stage(model, backbone, exits, early_exit=early_exit, seed=1)
    return model


@pytest.mark.parametrize("mode", ["early_exit", "self_speculative"])
def test_a_nemo_file_decodes_to_the_recorded_tokens_and_exits(stage: Any, mode: str) -> None:
    from nemo_ee.megatron.decoding.decoding_adapter import MegatronDecodingModel
    from nemo_ee.runtime.loader import load_tokenizer

    tokenizer = load_tokenizer(EARLIER / "export" / "hf_early_exit")
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    engine = EarlyExitEngine(MegatronDecodingModel(stage))
    result = engine.generate(prompts, max_new_tokens=NEW_TOKENS, mode=mode, policy=ExitPolicy(THRESHOLD))
    answers: list[list[list]] = [[], []]
    for event in result.events:
        answers[event.sequence].append([event.token, event.exit or "final"])
    assert answers == ANSWERS[f"complete-{mode}"]


def test_a_training_checkpoint_gives_exits_and_optimizers_their_state(stage: Any) -> None:
    from nemo_ee.checkpoint.distributed_checkpoint import load_distributed
    from nemo_ee.megatron.optim.stage_optimizers import stage_optimizers

    (checkpoint,) = (EARLIER / "run").iterdir()
    optimizers = stage_optimizers(stage, {"name": "adamw", "lr": 1e-2})
    shards = stage.exit_sharded_state_dict()
    tuned = {key: shard.data.detach().clone() for key, shard in shards.items()}  # of the file that the run wrote
    with torch.no_grad():
        for shard in shards.values():
            shard.data.zero_()
    loaded = load_distributed({"model": shards, "optimizer": optimizers.sharded_state_dict(shards)}, checkpoint)
    optimizers.load_state_dict(loaded["optimizer"])
    assert optimizers.exits and all(torch.equal(shard.data, tuned[key]) for key, shard in shards.items())
    for exit in optimizers.exits:
        for key, parameter in exit.parameters.items():
            state = exit.optimizer.state[parameter]
            assert float(state["step"]) == 4 and bool(state["exp_avg_sq"].any()), key
