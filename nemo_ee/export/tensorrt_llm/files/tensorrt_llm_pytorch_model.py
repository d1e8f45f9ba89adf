# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit in TensorRT-LLM's PyTorch backend (1.0 to 1.4): importing this file adds exits to Llama, Mistral,
Qwen2 and Qwen3.

    TLLM_WORKER_USE_SINGLE_PROCESS=1 trtllm-serve hf_early_exit --backend pytorch \
        --custom_module_dirs hf_early_exit/early_exit_trtllm

A directory with thresholds needs the settings in `DEFAULTS`: no CUDA graphs and no overlap scheduler, since a step's
exit depends on its data, and no reuse of cache blocks, since keys and values of a request that left early are
approximate. Versions with the hook `get_model_defaults` (1.3 and later) take them from here. Earlier versions need
them in a yaml file (`--extra_llm_api_options serve.yaml`). A line `early exit: EarlyExit... evaluates ...` in the log
shows that a class of this file is in use. Exits with a threshold in config.json's `early_exit.thresholds` are
evaluated; a directory without thresholds is served as before. No real TensorRT-LLM has loaded this file.

A step leaves at an exit iff the confidence passes the threshold for every sequence in it. The cache manager keeps one
length for all layers, so the skipped layers still compute keys and values for the new tokens, from the hidden state at
the exit (`kv: propagate`). Early exit saves their MLPs, their attention's output projections with the all-reduce, and
the final output projection; with `attn_backend: FLASHINFER` also the attention itself. Steps with a prompt in them,
with LoRA or with speculative decoding run in the stock class, to full depth.

The file is stand-alone: the export copies it, and the host that serves does not need nemo_ee.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
CRITERIA = ("max_probability", "margin", "entropy")
FINAL = "final"
LOG_EVERY = 1000  # decoding steps
VERSIONS = "1.0 to 1.4"
# Settings of a directory with thresholds, by the names of TensorRT-LLM's `TorchLlmArgs`.
DEFAULTS: dict[str, Any] = {
    "cuda_graph_config": None,
    "disable_overlap_scheduler": True,
    "kv_cache_config": {"enable_block_reuse": False},
}


class Exit(NamedTuple):
    """An exit that is evaluated. `stop`: its tap in half layers, 2k - 1 (before layer k's MLP) for `mlp`, else 2k."""

    name: str
    stop: int
    architecture: str
    own_output: bool
    threshold: float


class Settings(NamedTuple):
    """`early_exit` of config.json: the criterion, and the exits to evaluate, in the order of their stops."""

    criterion: str
    exits: tuple[Exit, ...]


def read_settings(block: Mapping[str, Any], mapping: Any) -> Settings:
    """Read and check `early_exit` of config.json.

    Args:
        mapping: TensorRT-LLM's parallelism for serving.

    Raises:
        ValueError: every problem in one message.
    """
    criterion, thresholds = block.get("criterion", CRITERIA[0]), dict(block.get("thresholds") or {})
    problems, exits = [], []
    if criterion not in CRITERIA:
        problems.append(f"criterion={criterion!r} is unknown, use one of {', '.join(CRITERIA)}")
    for row in block.get("exits", ()):
        threshold = thresholds.pop(row["name"], None)
        if threshold is None:
            continue
        if row["architecture"] == "layer":
            problems.append(f"exit {row['name']!r} has an attention layer, for which the cache has no place")
        stop = 2 * row["layer"] - (row["architecture"] == "mlp")
        exits.append(Exit(row["name"], stop, row["architecture"], row["output"] == "own", float(threshold)))
    problems += [f"thresholds names {name!r}, which is no exit in this directory" for name in thresholds]
    if exits and (mapping.pp_size > 1 or mapping.enable_attention_dp):
        problems.append("pipeline parallelism and attention data parallelism are not supported with thresholds")
    if problems:
        raise ValueError(
            f"early_exit in config.json: {'; '.join(problems)}; change early_exit.thresholds or criterion"
        )
    return Settings(criterion, tuple(sorted(exits, key=lambda exit: exit.stop)))


def all_confident(logits: Tensor, exit: Exit, criterion: str) -> bool:
    """Whether the confidence passes the threshold in every row of `[sequences, v]`. The softmax is in fp32.
    The call synchronises with the device.

    All tensor-parallel ranks hold the same gathered logits, so their decisions are equal.
    """
    probabilities = logits.float().softmax(dim=-1)
    if criterion == "entropy":
        return bool((torch.special.entr(probabilities).sum(dim=-1) < exit.threshold).all())
    top = probabilities.topk(2, dim=-1).values
    confidence = top[:, 0] if criterion == "max_probability" else top[:, 0] - top[:, 1]
    return bool((confidence > exit.threshold).all())


def exit_head(model_config: Any, exit: Exit) -> nn.Module:
    """The module of an exit; its submodules' paths are the names in the directory."""
    from tensorrt_llm._torch.modules.embedding import LMHead
    from tensorrt_llm._torch.modules.gated_mlp import GatedMLP
    from tensorrt_llm._torch.modules.linear import TensorParallelMode
    from tensorrt_llm._torch.modules.rms_norm import RMSNorm

    config = model_config.pretrained_config
    norm = {"hidden_size": config.hidden_size, "eps": config.rms_norm_eps, "dtype": config.torch_dtype}
    head = nn.Module()
    if exit.architecture == "mlp":
        head.post_attention_layernorm = RMSNorm(**norm)
        head.mlp = GatedMLP(
            hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            bias=getattr(config, "mlp_bias", False), dtype=config.torch_dtype, config=model_config,
        )  # fmt: skip
    if exit.architecture != "embedding":
        head.norm = RMSNorm(**norm)
    if exit.own_output:
        head.unembed = LMHead(
            config.vocab_size, config.hidden_size, dtype=config.torch_dtype, mapping=model_config.mapping,
            tensor_parallel_mode=TensorParallelMode.COLUMN, gather_output=True,
        )  # fmt: skip
    return head


class _Step:
    """One decoding step: a forward pass of the new token of every sequence. Hidden states are `[sequences, h]`."""

    def __init__(self, model: Any, attn_metadata: Any, position_ids: Tensor) -> None:
        self.model, self.attn_metadata, self.position_ids = model, attn_metadata, position_ids

    def attention(self, layer: Any, hidden: Tensor) -> Tensor:
        """A layer's attention, without its residual; writes the new keys and values."""
        return layer.self_attn(
            position_ids=self.position_ids,
            hidden_states=layer.input_layernorm(hidden),
            attn_metadata=self.attn_metadata,
        )

    def write_keys_and_values(self, layer: Any, hidden: Tensor) -> None:
        """Write a skipped layer's new keys and values with the least work that its attention backend allows.

        FlashInfer's cache write is a call of its own. The other backends write inside `forward`, so the attention
        runs; its output projection does not.
        """
        attention = layer.self_attn
        if getattr(attention.quant_config, "kv_cache_quant_algo", None) == "NVFP4":
            self.attention(layer, hidden)  # passes on the scales of such a cache
            return
        projected = attention.qkv_proj(layer.input_layernorm(hidden))
        # apply_rope has the norms of query and key heads, too; convert_qkv gives the backend's form.
        query, key, value = attention.apply_rope(projected, None, None, self.position_ids)
        query, key, value = attention.convert_qkv(query, key, value)
        if attention.attn_backend == "FLASHINFER":
            self._append(attention.attn, key, value)
        else:
            attention.attn.forward(query, key, value, self.attn_metadata)

    def _append(self, backend: Any, key: Tensor, value: Tensor) -> None:
        """Append `[sequences, heads * size]` to FlashInfer's paged cache."""
        import flashinfer

        metadata, layer = self.attn_metadata, backend.layer_idx
        if hasattr(metadata, "swap_paged_kv_indices_for_layer"):  # 1.3 and later: several pools
            metadata.swap_paged_kv_indices_for_layer(layer)
        # Early 1.x versions have one layout, and no argument for it.
        layout = {} if metadata.kv_layout == "NHD" else {"kv_layout": metadata.kv_layout}
        cache = metadata.kv_cache_manager.get_buffers(layer, **layout)
        heads = (-1, backend.num_kv_heads, backend.head_dim)
        flashinfer.page.append_paged_kv_cache(
            append_key=key.view(heads).to(cache.dtype), append_value=value.view(heads).to(cache.dtype),
            batch_indices=metadata.batch_indices, positions=metadata.positions, paged_kv_cache=cache,
            kv_indices=metadata.paged_kv_indices, kv_indptr=metadata.paged_kv_indptr,
            kv_last_page_len=metadata.paged_kv_last_page_len, kv_layout=metadata.kv_layout,
        )  # fmt: skip

    def logits(self, hidden: Tensor, output: Any) -> Tensor:
        """`[sequences, v]`, fp32, gathered over tensor parallelism."""
        return self.model.logits_processor.forward(hidden, output, self.attn_metadata, False)

    def exit_logits(self, exit: Exit, hidden: Tensor) -> Tensor:
        """An exit's logits from the hidden state at its stop."""
        head = self.model.exit_heads[exit.name]
        if exit.architecture == "mlp":
            hidden = hidden + head.mlp(head.post_attention_layernorm(hidden))
        if exit.architecture != "embedding":
            hidden = head.norm(hidden)
        return self.logits(hidden, head.unembed if exit.own_output else self.model.lm_head)

    def run(self, hidden: Tensor) -> Tensor:
        """Run the step from the embeddings to the logits of the exit at which it leaves."""
        # With speculative decoding a model can have further layers.
        settings, layers = self.model.early_exit, self.model.model.layers[: self.model.config.num_hidden_layers]
        at = {stop: [e for e in settings.exits if e.stop == stop] for stop in {e.stop for e in settings.exits}}
        for half in range(2 * len(layers)):
            layer = layers[half // 2]
            if half % 2 == 0:
                hidden = hidden + self.attention(layer, hidden)
            else:
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            for exit in at.get(half + 1, ()):
                logits = self.exit_logits(exit, hidden)
                if all_confident(logits, exit, settings.criterion):
                    for skipped in layers[half // 2 + 1 :]:
                        self.write_keys_and_values(skipped, hidden)
                    self.model.count_step(exit.name)
                    return logits
        self.model.count_step(FINAL)
        return self.logits(self.model.model.norm(hidden), self.model.lm_head)


def _described(settings: Settings) -> str:
    if not settings.exits:
        return "no exit, config.json has no thresholds"
    sign = "<" if settings.criterion == "entropy" else ">"
    exits = ", ".join(f"{exit.name} {sign} {exit.threshold:g}" for exit in settings.exits)
    return f"{exits} ({settings.criterion})"


def _log(line: str) -> None:
    from tensorrt_llm.logger import logger

    logger.info(line)


def has_thresholds(llm_args: Any) -> bool:
    """Whether config.json of the directory, or of the model of the hub, that is served has thresholds."""
    from transformers import PretrainedConfig

    try:  # get_config_dict runs no code of the directory
        config, _ = PretrainedConfig.get_config_dict(str(llm_args.model), revision=getattr(llm_args, "revision", None))
    except OSError:  # a checkpoint of another format, which has no config.json
        return False
    return bool((config.get("early_exit") or {}).get("thresholds"))


def early_exit_class(stock: type) -> type:
    """A stock class with exits."""

    class EarlyExit(stock):
        has_early_exits = True

        @classmethod
        def get_model_defaults(cls, llm_args: Any) -> dict[str, Any]:
            """The settings that TensorRT-LLM 1.3 and later takes where the user gives none: the stock class's, and
            `DEFAULTS` for a directory with thresholds."""
            stock_defaults = getattr(super(), "get_model_defaults", lambda _: {})
            defaults = dict(stock_defaults(llm_args) or {})
            if has_thresholds(llm_args):
                cache = {**(defaults.get("kv_cache_config") or {}), **DEFAULTS["kv_cache_config"]}
                defaults |= {**DEFAULTS, "kv_cache_config": cache}
            return defaults

        def __init__(self, model_config: Any) -> None:
            super().__init__(model_config)
            block = getattr(model_config.pretrained_config, "early_exit", None) or {}
            self.early_exit = read_settings(block, model_config.mapping)
            self.exit_heads = nn.ModuleDict({e.name: exit_head(model_config, e) for e in self.early_exit.exits})
            self.steps_left_at: Counter[str] = Counter()
            _log(f"early exit: {type(self).__name__} evaluates {_described(self.early_exit)}")

        def forward(
            self, attn_metadata: Any, input_ids: Any = None, position_ids: Any = None, inputs_embeds: Any = None,
            return_context_logits: bool = False, spec_metadata: Any = None, **others: Any,
        ) -> Tensor:  # fmt: skip
            stock_step = attn_metadata.num_contexts > 0 or spec_metadata is not None or others.get("lora_params")
            if not self.early_exit.exits or stock_step:
                return super().forward(
                    attn_metadata=attn_metadata, input_ids=input_ids, position_ids=position_ids,
                    inputs_embeds=inputs_embeds, return_context_logits=return_context_logits,
                    spec_metadata=spec_metadata, **others,
                )  # fmt: skip
            if getattr(attn_metadata, "is_cuda_graph", False):
                raise RuntimeError(
                    "early exit depends on data: set cuda_graph_config to null (and enable_block_reuse of "
                    "kv_cache_config to false: keys and values of a request that left early are approximate)"
                )
            hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            return _Step(self, attn_metadata, position_ids).run(hidden)

        def count_step(self, name: str) -> None:
            """Log the number of decoding steps per exit, every `LOG_EVERY` steps."""
            self.steps_left_at[name] += 1
            if self.steps_left_at.total() % LOG_EVERY == 0:
                _log(f"early exit, steps by exit: {dict(self.steps_left_at)}")

    EarlyExit.__name__ = EarlyExit.__qualname__ = f"EarlyExit{stock.__name__}"
    return EarlyExit


def stock_class(name: str) -> type | None:
    """The class that is registered for an architecture."""
    from tensorrt_llm._torch.models import modeling_utils

    # Later 1.3 and 1.4: stock classes are imported when this function looks them up, and an external class wins.
    if hasattr(modeling_utils, "get_registered_model_class"):
        return modeling_utils.get_registered_model_class(name)
    return modeling_utils.MODEL_CLASS_MAPPING.get(name)  # filled by the import of _torch.models


def register() -> None:
    """Replace the stock classes; the last registration of a name counts.

    Raises:
        RuntimeError: the TensorRT-LLM here is of another version.
    """
    import tensorrt_llm

    way_out = f"this file needs TensorRT-LLM {VERSIONS}: install one of them, or serve hf_full without exits"
    if not (1, 0) <= tuple(int(number) for number in tensorrt_llm.__version__.split(".")[:2]) <= (1, 4):
        raise RuntimeError(f"TensorRT-LLM {tensorrt_llm.__version__} is not supported; {way_out}")
    from tensorrt_llm._torch.models.modeling_utils import register_auto_model

    for name in ARCHITECTURES:
        stock = stock_class(name)
        if stock is None:
            raise RuntimeError(f"TensorRT-LLM {tensorrt_llm.__version__} has no class for {name}; {way_out}")
        if not hasattr(stock, "has_early_exits"):
            own = early_exit_class(stock)
            globals()[own.__name__] = own  # worker processes get the class by module and name
            register_auto_model(name)(own)


# TensorRT-LLM requires registration on import. A host without TensorRT-LLM can still import this file.
if importlib.util.find_spec("tensorrt_llm") is not None:
    register()
