# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What is refused before anything is built: each setting alone, all of them in one message, with the way out."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.models import supported
from nemo_ee.models.supported import needs_full_depth, planned_ranks, refuse_unsupported

GOOD = {
    "mcore_gpt": True,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 64,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "optim": {"name": "adamw"},
    "data": {"legacy_dataset": False},
    "vocab_size": 4096,
    "early_exit": {"exits": [{"layer": 1, "objective": "cross_entropy"}], "objective": "cross_entropy"},
}

# dotted key -> (refused value, what the message must say)
REFUSED = {
    "mcore_gpt": (False, "set it to True"),
    "context_parallel_size": (2, "set it to 1"),
    "virtual_pipeline_model_parallel_size": (2, "set it to null"),
    "expert_model_parallel_size": (2, "set it to 1"),
    "num_moe_experts": (8, "mixture-of-experts"),
    "fp8": (True, "tune in bf16-mixed"),
    "fsdp": (True, "use tensor and pipeline parallelism"),
    "apply_query_key_layer_scaling": (True, "set it to False"),
    "rampup_batch_size": ([2, 2, 100], "set it to null"),
    "optim.name": ("distributed_fused_adam", "fused_adam or mcore_distributed_optim"),
    "optim.overlap_grad_sync": (True, "set it to False"),
    "optim.overlap_param_sync": (True, "set it to False"),
    "optim.overlap_param_gather_with_optimizer_step": (True, "set it to False"),
    "optim.grad_sync_dtype": ("bf16", "leave it out"),
    "data.legacy_dataset": (True, "set it to False"),
    "early_exit.distillation.top_k": (5000, "null uses all"),
}


def _config(**changes: Any):
    config = OmegaConf.create(GOOD)
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    return config


def _message(config, *, world_size: int = 4, precision: str | int = "bf16-mixed") -> str:
    with pytest.raises(ValueError, match="the model config is not supported:") as caught:
        refuse_unsupported(config, world_size=world_size, precision=precision)
    return str(caught.value)


def test_a_supported_config_passes() -> None:
    """Control, with the values that switch each refused setting off in NeMo's own configs."""
    refuse_unsupported(_config(), world_size=4, precision="bf16-mixed")
    off = {"context_parallel_size": 1, "virtual_pipeline_model_parallel_size": None, "num_moe_experts": None}
    off |= {
        "fp8": False,
        "rampup_batch_size": None,
        "early_exit.distillation.top_k": 4096,
        "early_exit.train": "exits",
    }
    for precision in (32, "32", "32-true", "bf16", "bf16-mixed", None):
        refuse_unsupported(_config(**off), world_size=8, precision=precision)
    refuse_unsupported(OmegaConf.create({"mcore_gpt": True}), world_size=1, precision=32)
    taught = {"early_exit.objective": "distillation", "early_exit.token_weights": "confidence"}
    refuse_unsupported(_config(**taught), world_size=4, precision=32)


@pytest.mark.parametrize("key", REFUSED)
def test_each_setting_is_refused_with_value_and_way_out(key: str) -> None:
    value, way_out = REFUSED[key]
    lines = _message(_config(**{key: value})).splitlines()[1:]
    assert len(lines) == 1, lines
    assert f"{key}={value!r}" in lines[0] and way_out in lines[0]


# Settings that only a run that trains the backbone, or low-rank updates of it, cannot have.
REFUSED_IN_JOINT = {
    "early_exit.token_weights": ("confidence", "use none"),
    "early_exit.objective": ("mixed", "use cross_entropy"),
    "full_depth": (False, "set it to null"),
    "megatron_amp_O2": (True, "use trainer.precision=bf16-mixed"),
    "optim.name": ("mcore_distributed_optim", "use adamw"),
    "defer_embedding_wgrad_compute": (True, "set it to False"),
    "activations_checkpoint_granularity": ("all", "use full, selective or null"),
}


@pytest.mark.parametrize("train", ["joint", "lora"])
def test_joint_training_is_supported_and_has_rules_of_its_own(train: str) -> None:
    full = {"activations_checkpoint_granularity": "full", "early_exit.train": train}
    whole = {**full, "activations_checkpoint_method": "uniform", "activations_checkpoint_num_layers": 1}
    for good in ({"early_exit.train": train}, whole, {**full, "activations_checkpoint_granularity": "selective"}):
        refuse_unsupported(_config(**good), world_size=4, precision="bf16-mixed")
    for key, (value, way_out) in REFUSED_IN_JOINT.items():
        message = _message(_config(**{"early_exit.train": train, key: value}))
        assert f"{key}={value!r} with early_exit.train={train}" in message and way_out in message
    message = _message(_config(**full, activations_checkpoint_num_layers=0))
    assert "activations_checkpoint_method=None" in message and "activations_checkpoint_num_layers=0" in message
    objectives = _config(**{"early_exit.train": train})
    objectives.early_exit.exits = [{"layer": 1, "objective": "distillation"}]
    assert f"exits[0].objective='distillation' with early_exit.train={train}" in _message(objectives)


def test_a_frozen_backbone_does_not_know_those_rules() -> None:
    """Control: nothing is recomputed there, and the layers past the deepest exit need not exist."""
    settings = {"full_depth": False, "activations_checkpoint_granularity": "all"}
    refuse_unsupported(_config(**settings), world_size=4, precision="bf16-mixed")


@pytest.mark.parametrize("precision", [16, "16", "16-mixed", "16-true"])
def test_fp16_is_refused(precision: str | int) -> None:
    message = _message(_config(), precision=precision)
    assert f"trainer.precision={precision}" in message and "use bf16-mixed or 32" in message


@pytest.mark.parametrize(
    ("full_depth", "val_agreement", "objective", "needed"),
    [
        (None, False, None, False), (None, True, None, True), (True, False, None, True), (False, True, None, False),
        (None, False, "mixed", True), (False, False, "distillation", True),
    ],
)  # fmt: skip
def test_what_needs_the_final_exit(full_depth, val_agreement, objective, needed) -> None:
    block = {"exits": [{"layer": 1}, {"layer": 2, "objective": objective}]}
    config = OmegaConf.create({"full_depth": full_depth, "val_agreement": val_agreement})
    assert needs_full_depth(config, EarlyExitConfig.from_mapping(block, num_layers=4)) is needed


def test_main_weights_need_half_parameters() -> None:
    for precision in ("bf16", "bf16-mixed"):
        refuse_unsupported(_config(megatron_amp_O2=True), world_size=4, precision=precision)
    for precision in (32, "32-true"):
        message = _message(_config(megatron_amp_O2=True), precision=precision)
        assert f"megatron_amp_O2=True with trainer.precision={precision}" in message
        assert "set trainer.precision=bf16, or megatron_amp_O2=False" in message


@pytest.mark.parametrize("name", ["adamw", "adam", "mcore_distributed_optim"])
def test_optimizers_that_need_nothing_installed(name: str) -> None:
    refuse_unsupported(_config(**{"optim.name": name}), world_size=4, precision="bf16-mixed")


def test_fused_adam_needs_its_kernel(monkeypatch) -> None:
    config = _config(**{"optim.name": "fused_adam"})
    monkeypatch.setattr(supported, "find_spec", lambda name: None)
    assert "optim.name='fused_adam' needs Apex, which is not installed" in _message(config)
    monkeypatch.setattr(supported, "find_spec", lambda name: name)
    monkeypatch.setattr(supported.cpu_host, "enabled", lambda: True)
    message = _message(config)
    assert "needs a GPU, and this run is on the CPU host; use adamw" in message and "not installed" not in message
    monkeypatch.setattr(supported.cpu_host, "enabled", lambda: False)
    refuse_unsupported(config, world_size=4, precision="bf16-mixed")


def test_sizes_that_do_not_divide() -> None:
    message = _message(_config(), world_size=6)
    assert "tensor_model_parallel_size=2 x pipeline_model_parallel_size=2" in message and "(6)" in message
    message = _message(_config(num_attention_heads=9, num_query_groups=3, ffn_hidden_size=63))
    assert "num_attention_heads=9" in message and "num_query_groups=3" in message and "ffn_hidden_size=63" in message
    message = _message(_config(global_batch_size=10), world_size=8)
    assert "global_batch_size=10 is not a multiple of micro_batch_size=2 x data-parallel size=2" in message


def test_all_problems_come_together() -> None:
    config = _config(**{key: value for key, (value, _) in REFUSED.items()}, num_attention_heads=9)
    message = _message(config, world_size=6, precision="16-mixed")
    for key in (*REFUSED, "trainer.precision", "num_attention_heads", "(6)"):
        assert key in message


def test_ranks_that_a_trainer_block_asks_for() -> None:
    """Lightning also takes -1, auto and lists of devices; then the layout decides, not a guess."""
    model = OmegaConf.create({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3})
    for trainer, ranks in (
        ({"devices": 8, "num_nodes": 4}, 32),
        ({"devices": [0, 2], "num_nodes": 2}, 4),
        ({"devices": -1, "num_nodes": 2}, 6),
        ({"devices": "auto"}, 6),
    ):
        assert planned_ranks(OmegaConf.create(trainer), model) == ranks
