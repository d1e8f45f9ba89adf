# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Real Transformer Engine's exit heads store the recorded keys. Needs it and a GPU; tests/stack has a stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "data" / "exit_checkpoint_keys.txt"


def test_transformer_engine_writes_the_same_keys(tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, "-c", "import transformer_engine.pytorch"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"Transformer Engine is not installed here: {found.stderr.strip().splitlines()[-1]}")
    expected = [line.split(" ", 1)[1] for line in RECORDED.read_text().splitlines() if line[:6] == "llama:"]
    program = tmp_path / "keys.py"
    program.write_text(_PROGRAM)
    result = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(json.loads(result.stdout.splitlines()[-1])) == sorted(expected)


# Megatron without NeMo: the exit heads of the recorded llama under the Transformer-Engine spec.
_PROGRAM = """
import json, os, sys
sys.path.insert(0, os.getcwd())
import torch
from benchmarks.gpu_groups import one_rank
from megatron.core.transformer import TransformerConfig
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.megatron.model.exit_head import ExitHead
from nemo_ee.megatron.model.exit_head_init import local_shards
from nemo_ee.megatron.model.layer_spec import backbone_specs

one_rank("cuda")
config = TransformerConfig(
    num_layers=3, hidden_size=40, ffn_hidden_size=56, num_attention_heads=6, num_query_groups=2, kv_channels=10,
    normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
    bias_activation_fusion=False,
)
specs = backbone_specs(config, transformer_engine=True)
entries = [
    dict(name=f"l2-{a}-{i}-{o}", layer=2, architecture=a, init=i, output=o, rank=3)
    for a in ("embedding", "norm", "mlp", "layer") for i in ("copy", "random", "lora")
    for o in ("own", "shared", "low_rank")
]
lines = set()
for exit in EarlyExitConfig.from_mapping({"exits": entries}, num_layers=3).exits:
    head = ExitHead(config, exit, specs, vocab_size=144, shared_weight=lambda: None)
    state = head.sharded_state_dict(f"exits.{exit.name}.")
    state = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
    lines |= {f"{shard.key} {list(shard.global_shape)}" for shard in local_shards(state)}
torch.distributed.destroy_process_group()
print(json.dumps(sorted(lines)))
"""
