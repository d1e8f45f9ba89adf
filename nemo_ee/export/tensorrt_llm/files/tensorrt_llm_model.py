# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit in a TensorRT engine: classes for `trtllm-build --model_cls_file`. Legacy: `VERSIONS` are the last of
TensorRT-LLM that have this backend.

    trtllm-build --checkpoint_dir trtllm_ckpt --model_cls_file tensorrt_llm_model.py \
        --model_cls_name EarlyExitLlamaForCausalLM --workers 1 --reduce_fusion disable ...

or another name of `CLASSES`, by the `architecture` in trtllm_ckpt/config.json. Exits with a threshold in that file's
`early_exit.thresholds` are built in; others are left out. No real TensorRT-LLM has loaded this file.

An engine has no branches per sequence. TensorRT's if-conditional decides once per step, so all tokens of a step leave
at an exit iff each one's confidence passes its threshold. The conditional cannot hold the attention plugin, so the
skipped layers' attention runs in every step. Its input is the hidden state at the exit, from which it computes their
keys and values (`kv: propagate`); its output is dropped. Early exit saves the MLPs (about two thirds of a Llama layer)
and the final output projection. Steps with a prompt in them run to full depth.

The file is stand-alone: the export copies it, and the host that builds does not need nemo_ee.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# Name for --model_cls_name -> (stock class, `architecture` in config.json).
CLASSES = {
    "EarlyExitLlamaForCausalLM": ("LLaMAForCausalLM", "LlamaForCausalLM"),
    "EarlyExitQwen2ForCausalLM": ("QWenForCausalLM", "Qwen2ForCausalLM"),
    "EarlyExitQwen3ForCausalLM": ("QWenForCausalLM", "Qwen3ForCausalLM"),  # TensorRT-LLM 1.0 and later
}
CRITERIA = ("max_probability", "entropy")
VERSIONS = "0.20.0 to 1.2.1, or a release candidate of 1.3.0 up to rc20"
EXIT_INDEX_OUTPUT = "early_exit_index"


class Exit(NamedTuple):
    """An exit that is evaluated. `stop`: its tap in half layers, 2k - 1 (before layer k's MLP) for `mlp`, else 2k."""

    name: str
    stop: int
    architecture: str
    own_output: bool
    threshold: float


class Settings(NamedTuple):
    """`early_exit` of config.json. `mark_exit_index`: whether the engine has an extra output with a step's exit."""

    criterion: str
    exits: tuple[Exit, ...]
    mark_exit_index: bool


def read_settings(block: Mapping[str, Any]) -> Settings:
    """Read and check `early_exit` of config.json.

    Raises:
        ValueError: every problem in one message.
    """
    criterion, thresholds = block.get("criterion", CRITERIA[0]), dict(block.get("thresholds") or {})
    problems, exits = [], []
    if criterion not in CRITERIA:
        problems.append(f"criterion={criterion!r}: an engine has {' and '.join(CRITERIA)}")
    for row in block.get("exits", ()):
        threshold = thresholds.pop(row["name"], None)
        if threshold is None:
            continue
        if row["architecture"] == "layer":
            problems.append(f"exit {row['name']!r} has an attention layer, for which an engine has no keys and values")
        stop = 2 * row["layer"] - (row["architecture"] == "mlp")
        exits.append(Exit(row["name"], stop, row["architecture"], row["output"] == "own", float(threshold)))
    problems += [f"thresholds names {name!r}, which is no exit in this directory" for name in thresholds]
    if problems:
        raise ValueError(
            f"early_exit in config.json: {'; '.join(problems)}; change early_exit.thresholds or criterion"
        )
    ordered = tuple(sorted(exits, key=lambda exit: exit.stop))
    return Settings(criterion, ordered, bool(block.get("mark_exit_index", False)))


def check_mapping(mapping: Any) -> None:
    """Raises ValueError for parallelism that this file does not build."""
    if mapping.pp_size > 1 or getattr(mapping, "cp_size", 1) > 1:
        raise ValueError(
            f"pipeline parallelism {mapping.pp_size}, context parallelism {getattr(mapping, 'cp_size', 1)}: early "
            "exit in an engine has neither; export with pipeline_parallel=1, or build with the stock class"
        )


def exit_head(config: Any, exit: Exit) -> Any:
    """The module of an exit; its parameters' paths are the names in the checkpoint."""
    from tensorrt_llm._utils import pad_vocab_size
    from tensorrt_llm.layers import ColumnLinear, GatedMLP, RmsNorm
    from tensorrt_llm.module import Module

    group = {"tp_group": config.mapping.tp_group, "tp_size": config.mapping.tp_size}
    norm = {"normalized_shape": config.hidden_size, "eps": config.norm_epsilon, "dtype": config.dtype}
    head = Module()
    if exit.architecture == "mlp":
        head.post_layernorm = RmsNorm(**norm)
        head.mlp = GatedMLP(
            hidden_size=config.hidden_size, ffn_hidden_size=config.intermediate_size, hidden_act=config.hidden_act,
            dtype=config.dtype, bias=config.mlp_bias, quant_mode=config.quant_mode, **group,
        )  # fmt: skip
    if exit.architecture != "embedding":
        head.norm = RmsNorm(**norm)
    if exit.own_output:
        vocabulary = pad_vocab_size(config.vocab_size, config.mapping.tp_size)
        head.unembed = ColumnLinear(
            config.hidden_size, vocabulary, bias=False, dtype=config.dtype, gather_output=True, **group
        )
    return head


def exit_logits(head: Any, exit: Exit, hidden: Any, output: Any) -> Any:
    """`[sequences, h]` at the exit's stop -> logits. `output`: the backbone's projection, for exits without one."""
    if exit.architecture == "mlp":
        hidden = hidden + head.mlp(head.post_layernorm(hidden))
    if exit.architecture != "embedding":
        hidden = head.norm(hidden)
    return head.unembed(hidden) if exit.own_output else output(hidden)


def all_confident(logits: Any, exit: Exit, criterion: str, vocab_size: int) -> Any:
    """Whether every sequence's confidence in the step passes the threshold: bool `[1]`. The softmax is in fp32."""
    from tensorrt_llm.functional import cast, concat, gt, log, lt, max, maximum, min, shape, slice, softmax, sum

    logits = cast(logits, "float32")
    if logits.shape[-1] != vocab_size:  # rows of zeros up to a multiple of the ranks are not tokens
        logits = slice(logits, [0, 0], concat([shape(logits, 0), vocab_size]))
    probabilities = softmax(logits, dim=-1)
    if criterion == "max_probability":
        return gt(min(max(probabilities, dim=-1), dim=0, keepdim=True), exit.threshold)
    # p ln p is 0 at p = 0; the clamp only keeps the logarithm finite there.
    entropy = sum(probabilities * log(maximum(probabilities, 1e-30)), dim=-1) * -1.0
    return lt(max(entropy, dim=0, keepdim=True), exit.threshold)


def decoding_step(input_ids: Any, last_token_ids: Any) -> Any:
    """Whether a step has one token per sequence and no prompt of two or more: bool `[1]`, from the shapes alone."""
    from tensorrt_llm.functional import eq, shape, view

    return view(eq(shape(input_ids, 0), shape(last_token_ids, 0)), [1])


def unless(left: Any | None, work: Callable[..., Any], hidden: Any, *others: Any) -> Any:
    """`work(hidden, *others)`, or `hidden` unchanged if the step has left. `left` None: no exit was evaluated yet."""
    from tensorrt_llm.functional import Conditional

    if left is None:
        return work(hidden, *others)
    conditional = Conditional(left)
    kept = conditional.add_input(hidden)
    # TensorRT skips only operations on the conditional's inputs.
    return conditional.add_output(kept, work(*(conditional.add_input(tensor) for tensor in (hidden, *others))))


def early_exit_class(stock: type, architecture: str, name: str) -> type:
    """The stock class with exits."""
    from tensorrt_llm.layers import Attention
    from tensorrt_llm.module import Module

    class EarlyExit(stock):
        def __init__(self, config: Any) -> None:
            if config.architecture != architecture:
                raise ValueError(f"{name} builds {architecture}, config.json has {config.architecture}; see CLASSES")
            check_mapping(config.mapping)
            super().__init__(config)
            self.early_exit = read_settings(getattr(config, "early_exit", None) or {})
            self.exit_heads = Module()
            for exit in self.early_exit.exits:
                setattr(self.exit_heads, exit.name, exit_head(config, exit))

        def prepare_inputs(self, *sizes: Any, max_draft_len: int | None = 0, **options: Any) -> Any:
            # A verification step has several tokens per sequence; it would leave with all by the confidence in one.
            if max_draft_len:
                raise ValueError(
                    f"early exit in an engine: --max_draft_len {max_draft_len}: a target of draft-target decoding has "
                    "to run to full depth; build it with the stock class (no --model_cls_file)"
                )
            return super().prepare_inputs(*sizes, max_draft_len=max_draft_len, **options)

        def forward(
            self, input_ids: Any, position_ids: Any = None, use_cache: bool = False, last_token_ids: Any = None,
            attention_mask: Any = None, kv_cache_params: Any = None, attention_params: Any = None, **others: Any,
        ) -> Any:  # fmt: skip
            _check_build(last_token_ids, use_cache, others)
            attention = {
                "attention_mask": attention_mask, "use_cache": use_cache,
                "attention_params": Attention.fill_attention_params(self, attention_params),
            }  # fmt: skip
            hidden = self.transformer.vocab_embedding(input_ids)
            step = _Step(self, decoding_step(input_ids, last_token_ids), last_token_ids)
            kv_cache_params.fill_none_tensor_list(self.config.num_hidden_layers)
            for index, layer in enumerate(self.transformer.layers):
                cache = copy.copy(kv_cache_params)
                cache.past_key_value = [kv_cache_params.past_key_value[index]]
                attended, _ = layer.attention(layer.input_layernorm(hidden), kv_cache_params=cache, **attention)
                hidden = unless(step.left, lambda x, attended: x + attended, hidden, attended)
                step.evaluate(2 * index + 1, hidden)
                hidden = unless(step.left, lambda x, layer=layer: x + layer.mlp(layer.post_layernorm(x)), hidden)
                step.evaluate(2 * index + 2, hidden)
            logits = step.final(hidden)
            logits.mark_output("logits", self.config.logits_dtype)
            if self.early_exit.mark_exit_index:
                step.exit_index().mark_output(EXIT_INDEX_OUTPUT, "float32")
            return logits

    EarlyExit.__name__ = EarlyExit.__qualname__ = name
    return EarlyExit


class _Step:
    """State of one step: whether it has left, and the logits with which it left."""

    def __init__(self, model: Any, decoding: Any, last_token_ids: Any) -> None:
        self.model, self.decoding, self.last_token_ids = model, decoding, last_token_ids
        self.left: Any = None  # bool [1]; None before the first exit
        self.logits: Any = None
        self.lefts: list[Any] = []

    def newest(self, hidden: Any) -> Any:
        """Rows of each sequence's newest token: `[tokens, h]` -> `[sequences, h]`."""
        from tensorrt_llm.functional import gather_last_token_logits

        return gather_last_token_logits(hidden, self.last_token_ids, True)

    def read(self, project: Callable[[Any], Any], hidden: Any) -> Any:
        """`project(newest hidden states)`, or the logits with which the step has left."""
        from tensorrt_llm.functional import Conditional

        newest = self.newest(hidden)
        if self.left is None:
            return project(newest)
        conditional = Conditional(self.left)
        kept = conditional.add_input(self.logits)
        return conditional.add_output(kept, project(conditional.add_input(newest)))

    def evaluate(self, stop: int, hidden: Any) -> None:
        """Evaluate the exits at this stop, unless the step has left."""
        from tensorrt_llm.functional import op_and, op_or

        model = self.model
        for exit in (exit for exit in model.early_exit.exits if exit.stop == stop):
            head = getattr(model.exit_heads, exit.name)
            self.logits = self.read(lambda x, h=head, e=exit: exit_logits(h, e, x, model.lm_head), hidden)
            confident = all_confident(self.logits, exit, model.early_exit.criterion, model.config.vocab_size)
            leaves = op_and(confident, self.decoding)
            self.left = leaves if self.left is None else op_or(self.left, leaves)
            self.lefts.append(self.left)

    def final(self, hidden: Any) -> Any:
        """The step's logits: the final exit's, or those with which it left."""
        return self.read(lambda x: self.model.lm_head(self.model.transformer.ln_f(x)), hidden)

    def exit_index(self) -> Any:
        """Index of the exit at which the step left; the number of exits for the final exit: fp32 `[1]`."""
        from tensorrt_llm.functional import cast

        index = cast(self.decoding, "float32") * 0.0 + float(len(self.lefts))
        for left in self.lefts:
            index = index - cast(left, "float32")
        return index


def _check_build(last_token_ids: Any, use_cache: bool, others: Mapping[str, Any]) -> None:
    """Raises ValueError for builder options that change the tensors between layers."""
    from tensorrt_llm._common import default_net

    plugins, problems = default_net().plugin_config, []
    for option, wanted, way_out in (
        ("remove_input_padding", True, "--remove_input_padding enable"),
        ("paged_kv_cache", True, "--kv_cache_type paged"),
        ("reduce_fusion", False, "--reduce_fusion disable"),
        ("user_buffer", False, "--user_buffer disable"),
        ("norm_quant_fusion", False, "--norm_quant_fusion disable"),
        ("pp_reduce_scatter", False, "--pp_reduce_scatter disable"),
    ):
        value = getattr(plugins, option, None)  # None: the builder's default, which is the wanted value
        if value is not None and bool(value) != wanted:
            problems.append(f"needs {way_out}")
    if last_token_ids is None:
        problems.append("--gather_context_logits is not supported")
    if not use_cache:
        problems.append("needs a cache")
    problems += [f"{name} is not supported" for name, value in others.items() if value is not None]
    if problems:
        raise ValueError(f"early exit in an engine: {'; '.join(problems)}; change the options of trtllm-build")


def __getattr__(name: str) -> type:
    # trtllm-build gets the class by name; only then is tensorrt_llm imported.
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import tensorrt_llm.models

    stock, architecture = CLASSES[name]
    if not hasattr(tensorrt_llm.models, stock):
        raise RuntimeError(
            f"TensorRT-LLM {tensorrt_llm.__version__} has no engine backend (tensorrt_llm.models.{stock}); this file "
            f"needs TensorRT-LLM {VERSIONS}: install one of them, or serve hf_early_exit with the PyTorch backend"
        )
    globals()[name] = early_exit_class(getattr(tensorrt_llm.models, stock), architecture, name)
    return globals()[name]
