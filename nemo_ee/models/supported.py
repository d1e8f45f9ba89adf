# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What the stock `MegatronGPTModel` accepts and the early-exit model does not: refused at once, all in one message.

May import: omegaconf.
"""

from __future__ import annotations

from omegaconf import DictConfig


def refuse_unsupported(cfg: DictConfig, *, world_size: int, precision: str | int | None) -> None:
    """Check a model config before anything is built.

    Args:
        cfg: the `model` block.
        world_size: number of ranks.
        precision: the trainer's precision.

    Raises:
        ValueError: lists every setting that is not supported, with the way out.
    """
    faults = [
        f"  {key}={value!r}: {why}"
        for key, value, refused, why in _rules(cfg, precision)
        if refused
    ]
    tp, pp = cfg.get("tensor_model_parallel_size", 1), cfg.get("pipeline_model_parallel_size", 1)
    if world_size % (tp * pp):
        faults.append(
            f"  tensor_model_parallel_size={tp} x pipeline_model_parallel_size={pp} does not divide the number of ranks "
            f"({world_size}); change trainer.devices, trainer.num_nodes or the sizes"
        )
    heads, groups = cfg.get("num_attention_heads", 1), cfg.get("num_query_groups") or cfg.get("num_attention_heads", 1)
    for name, count in (("num_attention_heads", heads), ("num_query_groups", groups)):
        if count % tp:
            faults.append(f"  {name}={count} is not divisible by tensor_model_parallel_size={tp}; choose a divisor")
    if cfg.get("ffn_hidden_size", tp) % tp:
        faults.append(f"  ffn_hidden_size={cfg.ffn_hidden_size} is not divisible by tensor_model_parallel_size={tp}")
    batch, micro = cfg.get("global_batch_size"), cfg.get("micro_batch_size")
    if batch and micro and not world_size % (tp * pp) and batch % (micro * (world_size // (tp * pp))):
        faults.append(
            f"  global_batch_size={batch} is not a multiple of micro_batch_size={micro} x data-parallel size="
            f"{world_size // (tp * pp)}; change one of them"
        )
    if faults:
        raise ValueError("the model config is not supported:\n" + "\n".join(faults))


def _rules(cfg: DictConfig, precision: str | int | None) -> list[tuple[str, object, bool, str]]:
    """(key, value, refused, reason and way out)."""

    def get(key: str, default=None):
        return cfg.get(key, default)

    optimizer = (get("optim") or {}).get("name")
    context, virtual, expert = (
        get("context_parallel_size", 1),
        get("virtual_pipeline_model_parallel_size"),
        get("expert_model_parallel_size", 1),
    )
    distributed = ("distributed_fused_adam", "mcore_distributed_optim", "megatron_fused_adam")
    objective = (get("early_exit") or {}).get("objective") or "cross_entropy"
    train = (get("early_exit") or {}).get("train") or "exits"
    token_weights = (get("early_exit") or {}).get("token_weights") or "none"
    return [
        ("mcore_gpt", get("mcore_gpt"), not get("mcore_gpt", False), "set model.mcore_gpt=True (legacy GPT is not supported)"),
        ("context_parallel_size", context, (context or 1) > 1, "not supported; set it to 1"),
        ("virtual_pipeline_model_parallel_size", virtual, (virtual or 1) > 1, "not supported; set it to null"),
        ("expert_model_parallel_size", expert, (expert or 1) > 1, "not supported; set it to 1"),
        ("num_moe_experts", get("num_moe_experts"), bool(get("num_moe_experts")), "mixture-of-experts models are not supported"),
        ("fp8", get("fp8"), bool(get("fp8")), "not supported; set it to False and tune in bf16-mixed"),
        ("fsdp", get("fsdp"), bool(get("fsdp")), "not supported; use tensor and pipeline parallelism"),
        ("megatron_amp_O2", get("megatron_amp_O2"), bool(get("megatron_amp_O2")), "not supported; use trainer.precision=bf16-mixed"),
        ("trainer.precision", precision, str(precision) in ("16", "16-mixed", "16-true"), "fp16 tuning is not supported; use bf16-mixed or 32"),
        ("optim.name", optimizer, optimizer in distributed, "not supported; use adamw or fused_adam"),
        ("apply_query_key_layer_scaling", get("apply_query_key_layer_scaling"), bool(get("apply_query_key_layer_scaling")), "not supported; set it to False"),
        ("data.legacy_dataset", (get("data") or {}).get("legacy_dataset"), bool((get("data") or {}).get("legacy_dataset")), "set it to False"),
        ("rampup_batch_size", get("rampup_batch_size"), bool(get("rampup_batch_size")), "not supported; set it to null"),
        ("early_exit.objective", objective, objective != "cross_entropy", "not available yet; use cross_entropy"),
        ("early_exit.train", train, train != "exits", "not available yet; use exits"),
        ("early_exit.token_weights", token_weights, token_weights != "none", "not available yet; use none"),
    ]  # fmt: skip
