# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings that the stock `MegatronGPTModel` accepts and the early-exit model does not: one error lists all of
them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_ee import cpu_host
from nemo_ee.exits.config import EarlyExitConfig


def _above_one(value: Any) -> bool:
    return (value or 1) > 1


# key below `model` -> (is this value refused?, why and the way out)
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mcore_gpt": (lambda value: not value, "set it to True (NeMo's legacy GPT is not supported)"),
    "context_parallel_size": (_above_one, "not supported; set it to 1"),
    "virtual_pipeline_model_parallel_size": (_above_one, "not supported; set it to null"),
    "expert_model_parallel_size": (_above_one, "not supported; set it to 1"),
    "num_moe_experts": (bool, "mixture-of-experts models are not supported"),
    "fp8": (bool, "not supported; set it to False and tune in bf16-mixed"),
    "fsdp": (bool, "not supported; use tensor and pipeline parallelism"),
    "apply_query_key_layer_scaling": (bool, "not supported; set it to False"),
    "mcore_customization_config.final_logit_softcapping": (bool, "capped logits (Gemma 2) are not supported"),
    "rampup_batch_size": (bool, "not supported; set it to null"),
    "data.legacy_dataset": (bool, "not supported; set it to False"),
    "optim.name": (
        lambda value: value not in (None, "adamw", "adam", "fused_adam", "mcore_distributed_optim"),
        "not supported; use adamw, adam, fused_adam or mcore_distributed_optim",
    ),
    "optim.overlap_grad_sync": (bool, "not supported; set it to False (gradients are summed when the step ends)"),
    "optim.overlap_param_sync": (bool, "not supported; set it to False (weights are gathered when the step ends)"),
    "optim.overlap_param_gather_with_optimizer_step": (bool, "not supported; set it to False"),
    "optim.grad_sync_dtype": (
        lambda value: str(value) not in ("None", "32", "fp32", "torch.float32"),
        "not supported; leave it out (gradients are summed in fp32)",
    ),
    "tokenizer.library": (
        lambda value: value not in (None, "huggingface", "sentencepiece", "megatron", "byte-level", "tiktoken"),
        "its files can run code when they are read; use huggingface, sentencepiece, megatron, byte-level or tiktoken",
    ),
}


def needs_full_depth(cfg: DictConfig, early_exit: EarlyExitConfig) -> bool:
    """Whether the layers past the deepest exit and the final exit are built and run.

    It is `full_depth` of the config; null: whether an objective or a metric needs the final exit.
    """
    if early_exit.needs_final_exit:
        return True
    wanted = cfg.get("full_depth")
    return bool(cfg.get("val_agreement") if wanted is None else wanted)


# The same, for runs that train the backbone or low-rank updates of it.
_JOINT_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "defer_embedding_wgrad_compute": (bool, "not supported; set it to False"),
    "megatron_amp_O2": (bool, "not supported; use trainer.precision=bf16-mixed"),
    "optim.name": ("mcore_distributed_optim".__eq__, "not supported; use adamw"),
    "full_depth": (lambda value: value is False, "the final exit's loss needs all layers; set it to null"),
    "activations_checkpoint_granularity": (
        lambda value: value not in (None, "full", "selective"),
        "use full, selective or null",
    ),
}


def _joint_problems(cfg: DictConfig) -> list[str]:
    train = OmegaConf.select(cfg, "early_exit.train")
    if train not in ("joint", "lora"):
        return []
    problems = []
    for key, (refused, reason) in _JOINT_RULES.items():
        value = OmegaConf.select(cfg, key)
        if refused(value):
            problems.append(f"  {key}={value!r} with early_exit.train={train}: {reason}")
    block = cfg.early_exit
    objectives = {"early_exit.objective": block.get("objective")} | {
        f"early_exit.exits[{index}].objective": exit.get("objective")
        for index, exit in enumerate(block.get("exits") or [])
        if OmegaConf.is_dict(exit)
    }
    problems += [
        f"  {key}={value!r} with early_exit.train={train}: distillation learns from a final exit that stays as it is, "
        "here it trains too; use cross_entropy"
        for key, value in objectives.items()
        if value not in (None, "cross_entropy")
    ]
    if block.get("token_weights") not in (None, "none"):
        problems.append(
            f"  early_exit.token_weights={block.token_weights!r} with early_exit.train={train}: every token counts "
            "the same in the joint objective; use none"
        )
    if cfg.get("activations_checkpoint_granularity") == "full":
        method, layers = cfg.get("activations_checkpoint_method"), cfg.get("activations_checkpoint_num_layers")
        if method not in ("uniform", "block"):
            problems.append(f"  activations_checkpoint_method={method!r} with granularity full: use uniform or block")
        if not isinstance(layers, int) or layers < 1:
            problems.append(
                f"  activations_checkpoint_num_layers={layers!r} with granularity full: give the number of layers, "
                "e.g. 1"
            )
    return problems


def planned_ranks(trainer: DictConfig, model: DictConfig) -> int:
    """Number of ranks in a script's `trainer` block; the size of the model's layout where it is known only at the
    start (`auto`, -1)."""
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes", 1)
    if isinstance(devices, int) and devices > 0:
        return devices * nodes
    if OmegaConf.is_list(devices):
        return len(devices) * nodes
    return model.get("tensor_model_parallel_size", 1) * model.get("pipeline_model_parallel_size", 1)


def _optimizer_problems(cfg: DictConfig, precision: str) -> list[str]:
    problems = []
    if cfg.get("megatron_amp_O2") and precision not in ("bf16", "bf16-mixed"):
        problems.append(
            f"  megatron_amp_O2=True with trainer.precision={precision}: it keeps bf16 parameters with fp32 copies; "
            "set trainer.precision=bf16, or megatron_amp_O2=False"
        )
    if OmegaConf.select(cfg, "optim.name") == "fused_adam":
        missing = [] if find_spec("apex") else ["Apex, which is not installed"]
        missing += ["a GPU, and this run is on the CPU host"] if cpu_host.enabled() else []
        if missing:
            problems.append(f"  optim.name='fused_adam' needs {' and '.join(missing)}; use adamw (one kernel too)")
    return problems


def _top_k_problems(top_k: Any, vocabulary: int) -> list[str]:
    if not isinstance(top_k, int) or top_k <= vocabulary:
        return []
    more = f"is more than the vocabulary's {vocabulary} tokens; null uses all"
    return [f"  early_exit.distillation.top_k={top_k} {more}"]


def refuse_large_top_k(top_k: int | None, vocab_size: int) -> None:
    """Raise ValueError where `distillation.top_k` is larger than the vocabulary."""
    if problems := _top_k_problems(top_k, vocab_size):
        raise ValueError("the model config is not supported:\n" + problems[0])


def refuse_unsupported(cfg: DictConfig, *, world_size: int, precision: str | int | None) -> None:
    """Check a model config before anything is built.

    Args:
        cfg: the `model` block.
        world_size: number of ranks.
        precision: the trainer's precision.

    Raises:
        ValueError: lists every setting that is not supported, with the way out.
    """
    problems = []
    for key, (refused, reason) in _RULES.items():
        value = OmegaConf.select(cfg, key)
        if refused(value):
            problems.append(f"  {key}={value!r}: {reason}")
    if str(precision) in ("16", "16-mixed", "16-true"):
        problems.append(
            f"  trainer.precision={precision}: fp16 tuning is not supported: each exit runs a backward of its own, "
            "which no loss scale reaches; use bf16-mixed or 32"
        )
    if cfg.get("vocab_size"):  # otherwise checked with the tokenizer's size, when the model is built
        problems += _top_k_problems(OmegaConf.select(cfg, "early_exit.distillation.top_k"), cfg.vocab_size)
    problems += _optimizer_problems(cfg, str(precision)) + _joint_problems(cfg)
    tp, pp = cfg.get("tensor_model_parallel_size", 1), cfg.get("pipeline_model_parallel_size", 1)
    if world_size % (tp * pp):
        problems.append(
            f"  tensor_model_parallel_size={tp} x pipeline_model_parallel_size={pp} does not divide the number "
            f"of ranks "
            f"({world_size}); change trainer.devices, trainer.num_nodes or the sizes"
        )
    heads, groups = cfg.get("num_attention_heads", 1), cfg.get("num_query_groups") or cfg.get("num_attention_heads", 1)
    for name, count in (("num_attention_heads", heads), ("num_query_groups", groups)):
        if count % tp:
            problems.append(f"  {name}={count} is not divisible by tensor_model_parallel_size={tp}; choose a divisor")
    if cfg.get("ffn_hidden_size", tp) % tp:
        problems.append(f"  ffn_hidden_size={cfg.ffn_hidden_size} is not divisible by tensor_model_parallel_size={tp}")
    length = cfg.get("encoder_seq_length") or 0
    if cfg.get("sequence_parallel") and tp > 1 and length % tp:
        problems.append(
            f"  encoder_seq_length={length} is not divisible by tensor_model_parallel_size={tp}, as "
            f"sequence_parallel=True "
            "needs it; change one of them"
        )
    batch, micro = cfg.get("global_batch_size"), cfg.get("micro_batch_size")
    if batch and micro and not world_size % (tp * pp) and batch % (micro * (world_size // (tp * pp))):
        problems.append(
            f"  global_batch_size={batch} is not a multiple of micro_batch_size={micro} x data-parallel size="
            f"{world_size // (tp * pp)}; change one of them"
        )
    if problems:
        raise ValueError("the model config is not supported:\n" + "\n".join(problems))
