# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""vLLM in this process, on tiny models with exits."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip

from tests.helpers.propagation_reference import save_early_exit_directory

EXITS = [("mlp", 1, True), ("norm", 1, False), ("embedding", 2, True), ("mlp", 3, False)]
# vLLM's attention on CPUs takes heads of 32 numbers, and positions are not the subject here.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
SIZES |= {"num_hidden_layers": 4, "max_position_embeddings": 256}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "llama-bias", "llama-llama3")


def save_model(folder: Path, name: str, exits: Sequence[tuple[str, int, bool]] = EXITS) -> Any:
    """A tiny model with exits; returns the transformers model."""
    changes = dict(SIZES, sliding_window=256) if name == "mistral" else SIZES
    return save_early_exit_directory(folder, name, exits, **changes)


@contextmanager
def served(folder: Path, early_exit: Mapping[str, Any] | None = None, **arguments: Any) -> Iterator[Any]:
    """vLLM's `LLM` on a directory."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {} if early_exit is None else {"additional_config": {"early_exit": dict(early_exit)}}
    given = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 128}
    llm = None
    try:
        llm = LLM(model=str(folder), **(given | settings | arguments))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def model_of(llm: Any) -> Any:
    """The model in vLLM's worker."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


def generate(
    llm: Any, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int], arguments: Sequence[Any]
) -> list[list[int]]:
    """Greedy new tokens; `arguments`: `early_exit_threshold` of each request, or None."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False,
            extra_args=None if own is None else {"early_exit_threshold": own},
        )
        for new, own in zip(new_tokens, arguments, strict=True)
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def greedy(stock: Any, prompt: Sequence[int], new: int) -> list[int]:
    """Greedy tokens of a transformers model, also after an end-of-text token."""
    import torch

    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            tokens.append(int(stock(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
