# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A stand-in, not TensorRT-LLM: the executor of its PyTorch backend for the models of tensorrt_llm_torch_stand_in.py.

The cache manager has one length for all layers: `Session.step` fails when a layer did not get keys and values for a
new token. `installed(api)` puts both files into `sys.modules`, by one of two APIs:

    1.2   releases 1.0 to 1.2. Importing `_torch.models` registers every stock class. Settings are the user's.
    1.4   1.3 and 1.4. A stock class is imported when `get_registered_model_class` looks it up; a mapping that is read
          directly lacks it, so the stand-in has none. The loader puts `get_model_defaults` under the user's settings.
          Attention backends take `forward_args`. FlashInfer's cache has another layout.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers import tensorrt_llm_torch_stand_in as stand_in
from tests.helpers.tensorrt_llm_torch_stand_in import MODEL_CLASS_MAPPING, get_registered_model_class, stock_classes

VERSIONS = {"1.2": "1.2.1", "1.4": "1.4.0rc1"}
PAGE = 4  # tokens per page of the cache
# `TorchLlmArgs` where the user gives nothing.
LLM_ARGS: dict[str, Any] = {
    "cuda_graph_config": {"enable_padding": False},
    "disable_overlap_scheduler": False,
    "kv_cache_config": {"enable_block_reuse": True, "free_gpu_memory_fraction": 0.9},
    "attn_backend": "TRTLLM",
}


class KVCacheManager:
    """Pages of all layers, NaN until written; a sequence's pages are the same in every layer."""

    def __init__(self, config: Any) -> None:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 64, 2, PAGE, config.num_key_value_heads, size)
        self.pool, self.pages, self.free = torch.full(shape, math.nan), {}, [*range(0, 64, 2), *range(63, 0, -2)]

    def get_buffers(self, layer_idx: int, **layout: str) -> Tensor:
        if stand_in.api == "1.2":
            assert not layout, "an argument that this release does not have"
        return self.pool[layer_idx].transpose(2, 3) if layout.get("kv_layout") == "HND" else self.pool[layer_idx]

    def hold(self, sequence: int, length: int) -> list[int]:
        """The sequence's pages, for this length."""
        own = self.pages.setdefault(sequence, [])
        own += [self.free.pop() for _ in range(-(-length // PAGE) - len(own))]
        return own

    def write(self, layer: int, sequence: int, first: int, keys: Tensor, values: Tensor) -> None:
        for position, pair in enumerate(zip(keys, values, strict=True), first):
            self.pool[layer, self.pages[sequence][position // PAGE], :, position % PAGE] = torch.stack(pair)

    def read(self, layer: int, sequence: int, length: int) -> tuple[Tensor, Tensor]:
        keys, values = self.pool[layer, self.pages[sequence]].transpose(0, 1).flatten(1, 2)[:, :length]
        return keys, values


class _Metadata(SimpleNamespace):
    """`attn_metadata` of a step; with pages for FlashInfer."""

    def __init__(self, sequences: Sequence[tuple[int, int, int]], cache: KVCacheManager, backend: str) -> None:
        held = [cache.hold(sequence, first + count) for sequence, first, count in sequences]
        super().__init__(
            sequences=sequences, num_contexts=sum(first == 0 for _, first, _ in sequences), kv_cache_manager=cache,
            positions=torch.cat([torch.arange(first, first + count) for _, first, count in sequences]),
        )  # fmt: skip
        if backend == "FLASHINFER":
            self.kv_layout = "NHD" if stand_in.api == "1.2" else "HND"
            self.batch_indices = torch.tensor(
                [row for row, (_, _, count) in enumerate(sequences) for _ in range(count)]
            )
            self.paged_kv_indptr = torch.tensor([0, *(len(pages) for pages in held)]).cumsum(0)
            self.paged_kv_last_page_len = torch.tensor([(f + c - 1) % PAGE + 1 for _, f, c in sequences])
            indices = torch.tensor([page for pages in held for page in pages])
            if stand_in.api == "1.2":
                self.paged_kv_indices = indices
            else:  # a layer's pool has to be chosen first
                self.swap_paged_kv_indices_for_layer = lambda layer: setattr(self, "paged_kv_indices", indices)


def append_paged_kv_cache(append_key, append_value, batch_indices, positions, paged_kv_cache, kv_indices, kv_indptr,
                          kv_last_page_len, kv_layout="NHD") -> None:  # fmt: skip
    """`flashinfer.page`'s."""
    stand_in.counts["append"] += 1
    cache = paged_kv_cache.transpose(2, 3) if kv_layout == "HND" else paged_kv_cache
    for row, position, key, value in zip(batch_indices, positions, append_key, append_value, strict=True):
        page = kv_indices[kv_indptr[row] + position // PAGE]
        cache[page, 0, position % PAGE], cache[page, 1, position % PAGE] = key, value


def merged(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of both, the overlay's first; dictionaries are merged."""
    both = {**base, **overlay}
    return {
        key: merged(base[key], value) if isinstance(base.get(key), dict) and isinstance(value, dict) else value
        for key, value in both.items()
    }


@functools.cache
def _config_class(folder: Path, trust_remote_code: bool) -> type:
    from transformers import AutoConfig

    return type(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))


class Session:
    """Load a directory with whatever class is registered for it; run steps of packed tokens, prompts first.

    Args:
        settings: the user's, by the names in `LLM_ARGS`.
        trust_remote_code: the backend's loader passes True, so that the config's class comes out of the directory.
        mapping: of TensorRT-LLM's `Mapping`.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, trust_remote_code: bool = True, **mapping: Any
    ) -> None:
        config = _config_class(folder, trust_remote_code).from_pretrained(folder)
        assert (type(config).__name__ == "EarlyExitConfig") == trust_remote_code
        name = config.architectures[0]
        cls = MODEL_CLASS_MAPPING[name] if stand_in.api == "1.2" else get_registered_model_class(name)
        defaults = {}
        if stand_in.api == "1.4" and hasattr(cls, "get_model_defaults"):
            defaults = cls.get_model_defaults(SimpleNamespace(model=folder, revision=None))
        self.llm_args = merged(merged(LLM_ARGS, defaults), settings)
        self.model = cls(
            SimpleNamespace(
                pretrained_config=config, attn_backend=self.llm_args["attn_backend"],
                mapping=SimpleNamespace(**{"tp_size": 1, "pp_size": 1, "enable_attention_dp": False, **mapping}),
                quant_config=SimpleNamespace(kv_cache_quant_algo=None),
            )
        )  # fmt: skip
        weights: dict[str, Tensor] = {}
        for file in folder.glob("*.safetensors"):
            weights |= load_file(file)
        self.model.load_weights(weights)
        assert not any(p.isnan().any() for p in self.model.parameters()), "a parameter that nothing was loaded into"
        self.cache = KVCacheManager(config)

    @torch.no_grad()
    def step(self, tokens: Mapping[int, tuple[int, Sequence[int]]]) -> Tensor:
        """Sequence -> (first position, tokens). Returns logits `[sequences, v]`."""
        sequences = [(sequence, first, len(own)) for sequence, (first, own) in tokens.items()]
        metadata = _Metadata(sequences, self.cache, self.llm_args["attn_backend"])
        # Graphs are captured of steps without prompts.
        metadata.is_cuda_graph = self.llm_args["cuda_graph_config"] is not None and not metadata.num_contexts
        logits = self.model(
            attn_metadata=metadata,
            input_ids=torch.tensor([t for _, own in tokens.values() for t in own]),
            position_ids=metadata.positions[None],
        )
        for sequence, first, count in sequences:
            for layer in range(len(self.cache.pool)):
                for side in self.cache.read(layer, sequence, first + count):
                    assert not side.isnan().any(), "a position without keys and values"
        return logits


@contextlib.contextmanager
def installed(follows: str = "1.2", version: str | None = None) -> Iterator[None]:
    """`import tensorrt_llm` finds the stand-in inside this context.

    Args:
        follows: the API, a key of `VERSIONS`.
        version: the version that it gives itself, if another one.
    """
    stand_in.api = follows
    registry = {"get_registered_model_class": get_registered_model_class}
    if stand_in.api == "1.2":
        MODEL_CLASS_MAPPING.update(stock_classes)
        registry = {"MODEL_CLASS_MAPPING": MODEL_CLASS_MAPPING}
    parts = {
        "tensorrt_llm": {"__version__": version or VERSIONS[follows]},
        "tensorrt_llm.logger": {"logger": SimpleNamespace(info=stand_in.lines.append)},
        "tensorrt_llm._torch": {},
        "tensorrt_llm._torch.models": {},
        "tensorrt_llm._torch.models.modeling_utils": {
            "register_auto_model": stand_in.register_auto_model, **registry
        },
        "tensorrt_llm._torch.modules": {},
        "tensorrt_llm._torch.modules.embedding": {"LMHead": stand_in.LMHead},
        "tensorrt_llm._torch.modules.gated_mlp": {"GatedMLP": stand_in.GatedMLP},
        "tensorrt_llm._torch.modules.linear": {"TensorParallelMode": SimpleNamespace(COLUMN="column")},
        "tensorrt_llm._torch.modules.rms_norm": {"RMSNorm": stand_in.RMSNorm},
        "flashinfer": {"page": SimpleNamespace(append_paged_kv_cache=append_paged_kv_cache)},
    }  # fmt: skip
    assert not any(name in sys.modules for name in parts), "a real tensorrt_llm is here"
    try:
        for name, contents in parts.items():
            module = ModuleType(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None), []
            vars(module).update(contents)
            sys.modules[name] = module
        yield
    finally:
        MODEL_CLASS_MAPPING.clear()
        for name in parts:
            sys.modules.pop(name, None)
