# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A stand-in, not TensorRT-LLM: the part of its engine API that the exported model class uses, eager, on torch.

Written from TensorRT-LLM's documentation and sources of 0.20 to 1.2 (names, arguments, what each call returns). It
computes at once what a network would compute later, and is strict where an engine is:

* a tensor that hangs on a conditional's input carries that conditional; the attention plugin refuses such a tensor;
* a branch must hang on its conditional's own inputs (nothing else is skipped); MLPs that ran or were skipped are
  counted;
* `load` demands every parameter of the class, and only warns about tensors nobody asks for.

One rank only. `installed()` puts it into `sys.modules`.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.helpers.tensorrt_llm_reference import _inverse_frequencies

counts: Counter[str] = Counter()  # `mlp`: MLPs that ran, `skipped`: MLPs in a branch not taken
outputs: dict[str, Tensor] = {}
plugins = SimpleNamespace(
    remove_input_padding=True, paged_kv_cache=True, reduce_fusion=False, user_buffer=False, norm_quant_fusion=False,
    pp_reduce_scatter=False,
)  # fmt: skip


class Tensor(torch.Tensor):
    """A tensor that knows the conditionals it hangs on."""

    conditionals: frozenset = frozenset()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        parents = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
        inherited = frozenset().union(*(p.conditionals for p in parents))
        for each in result if isinstance(result, tuple) else (result,):
            if isinstance(each, Tensor):
                each.conditionals = inherited
        return result

    def mark_output(self, name: str, dtype: str) -> None:
        assert name not in outputs and isinstance(dtype, str)
        assert not self.conditionals, "an output inside a conditional"
        outputs[name] = self.as_subclass(torch.Tensor)


def _wrap(tensor: torch.Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


# -- tensorrt_llm.functional ---------------------------------------------------------------------------------------


class Conditional:
    def __init__(self, condition: Tensor) -> None:
        assert condition.dtype is torch.bool and condition.numel() == 1 and not condition.conditionals
        self.condition = bool(condition)

    def add_input(self, tensor: Tensor) -> Tensor:
        inside = _wrap(tensor.clone())
        inside.conditionals = tensor.conditionals | {self}
        return inside

    def add_output(self, true_value: Tensor, false_value: Tensor) -> Tensor:
        assert true_value.shape == false_value.shape and true_value.dtype == false_value.dtype
        for value in (true_value, false_value):
            assert self in value.conditionals, "a branch that hangs on nothing of its conditional is never skipped"
        chosen = _wrap((true_value if self.condition else false_value).clone())
        chosen.conditionals = (true_value.conditionals | false_value.conditionals) - {self}
        return chosen


def gather_last_token_logits(hidden: Tensor, last_token_ids: Tensor, remove_input_padding: bool) -> Tensor:
    assert remove_input_padding and last_token_ids.dtype is torch.int32
    return hidden[last_token_ids.long() - 1]


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    return tensor.to(getattr(torch, dtype))


def _maximum(left: Tensor, right: float) -> Tensor:
    return torch.maximum(left, torch.tensor(right, dtype=left.dtype))


def _concat(parts: Sequence[Any], dim: int = 0) -> list[int]:
    return [int(part) for part in parts]


def _slice(tensor: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    return tensor[tuple(builtins.slice(a, a + n) for a, n in zip(starts, sizes, strict=True))]


def _shape(tensor: Tensor, dim: int) -> Tensor:
    return _wrap(torch.tensor(tensor.shape[dim]))


_FUNCTIONAL = {
    "Conditional": Conditional, "Tensor": Tensor, "cast": _cast, "concat": _concat, "maximum": _maximum,
    "slice": _slice, "shape": _shape, "gather_last_token_logits": gather_last_token_logits,
    "eq": torch.eq, "gt": torch.gt, "lt": torch.lt, "log": torch.log, "op_and": torch.logical_and,
    "op_or": torch.logical_or, "softmax": torch.softmax,
    "max": lambda t, dim, keepdim=False: t.amax(dim, keepdim),
    "min": lambda t, dim, keepdim=False: t.amin(dim, keepdim),
    "sum": lambda t, dim, keepdim=False: torch.sum(t, dim, keepdim), "view": lambda t, shape: t.reshape(shape),
}  # fmt: skip


# -- tensorrt_llm.module, .layers ------------------------------------------------------------------------------------


class Parameter:
    def __init__(self, *shape: int) -> None:
        self.shape, self.value = shape, None


class Module:
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        for name, value in vars(self).items():
            if isinstance(value, Parameter):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from value.named_parameters(f"{prefix}{name}.")


class ModuleList(Module):
    def __init__(self, modules: Sequence[Module]) -> None:
        for index, module in enumerate(modules):
            setattr(self, str(index), module)

    def __iter__(self) -> Iterator[Module]:
        return iter(vars(self).values())


class RmsNorm(Module):
    def __init__(self, normalized_shape: int, eps: float, dtype: str) -> None:
        self.weight, self.eps = Parameter(normalized_shape), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.value


class ColumnLinear(Module):
    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1, gather_output=True):
        assert tp_size == 1
        self.weight = Parameter(out_features, in_features)
        if bias:
            self.bias = Parameter(out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.value, self.bias.value if hasattr(self, "bias") else None)


class Embedding(Module):
    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: str) -> None:
        self.weight = Parameter(num_embeddings, embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        return _wrap(self.weight.value[ids.long()])


class GatedMLP(Module):
    def __init__(
        self,
        hidden_size,
        ffn_hidden_size,
        hidden_act,
        dtype=None,
        bias=True,
        tp_group=None,
        tp_size=1,
        quant_mode=None,
    ):
        assert hidden_act == "silu"
        self.fc = ColumnLinear(hidden_size, ffn_hidden_size, bias, dtype)
        self.gate = ColumnLinear(hidden_size, ffn_hidden_size, bias, dtype)
        self.proj = ColumnLinear(ffn_hidden_size, hidden_size, bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        counts["skipped" if any(c.condition for c in x.conditionals) else "mlp"] += 1
        return self.proj(F.silu(self.fc(x)) * self.gate(x))


class Attention(Module):
    """`attention_params.sequences`: (sequence, first position, number of tokens) of the packed rows."""

    def __init__(self, config: Any, dense_bias: bool) -> None:
        c = self.config = config
        rows = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_size
        self.qkv = ColumnLinear(c.hidden_size, rows, c.attn_bias)
        self.dense = ColumnLinear(c.num_attention_heads * c.head_size, c.hidden_size, dense_bias)
        if getattr(c, "qwen_type", None) == "qwen3":
            self.q_layernorm, self.k_layernorm = (RmsNorm(c.head_size, c.norm_epsilon, c.dtype) for _ in "qk")

    @staticmethod
    def fill_attention_params(model: Any, attention_params: Any) -> Any:
        return SimpleNamespace(**vars(attention_params), filled=True)

    def forward(self, hidden, attention_mask=None, use_cache=False, kv_cache_params=None, attention_params=None):
        assert not hidden.conditionals, "the attention plugin cannot be in a conditional"
        assert attention_params.filled and use_cache and len(kv_cache_params.past_key_value) == 1
        c, cache, outputs = self.config, kv_cache_params.past_key_value[0], []
        d, kv = c.head_size, c.num_key_value_heads
        q, k, v = (
            p.unflatten(-1, (-1, d)) for p in self.qkv(hidden).split([c.num_attention_heads * d, kv * d, kv * d], -1)
        )
        if hasattr(self, "q_layernorm"):
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        row = 0
        for sequence, first, count in attention_params.sequences:
            rows = builtins.slice(row, row + count)
            own = cache.setdefault(sequence, ([], []))
            assert len(own[0]) == first, "a position without keys and values, or with two"
            own[0].extend(self._rotated(k[rows], first))
            own[1].extend(v[rows])
            keys, values = (torch.stack(side).repeat_interleave(c.num_attention_heads // kv, 1) for side in own)
            scores = torch.einsum("qhd,khd->hqk", self._rotated(q[rows], first), keys) / math.sqrt(d)
            mask = torch.arange(first + count) > torch.arange(first, first + count)[:, None]
            outputs.append(
                torch.einsum("hqk,khd->qhd", scores.masked_fill(mask, -math.inf).softmax(-1), values).flatten(1)
            )
            row += count
        return self.dense(torch.cat(outputs)), cache

    def _rotated(self, x: Tensor, first: int) -> Tensor:
        angles = torch.arange(first, first + len(x)).float()[:, None, None] * _inverse_frequencies(vars(self.config))
        one, two = x.chunk(2, -1)
        return torch.cat((one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()), -1)


# -- tensorrt_llm.models ---------------------------------------------------------------------------------------------


class _Layer(Module):
    def __init__(self, c: Any, dense_bias: bool) -> None:
        self.input_layernorm = RmsNorm(c.hidden_size, c.norm_epsilon, c.dtype)
        self.attention = Attention(c, dense_bias)
        self.post_layernorm = RmsNorm(c.hidden_size, c.norm_epsilon, c.dtype)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, c.hidden_act, c.dtype, c.mlp_bias)


class LLaMAForCausalLM(Module):
    qwen = False

    def __init__(self, config: Any) -> None:
        c = self.config = config
        self.transformer = Module()
        self.transformer.vocab_embedding = Embedding(c.vocab_size, c.hidden_size, c.dtype)
        dense_bias = c.attn_bias and not self.qwen
        self.transformer.layers = ModuleList([_Layer(c, dense_bias) for _ in range(c.num_hidden_layers)])
        self.transformer.ln_f = RmsNorm(c.hidden_size, c.norm_epsilon, c.dtype)
        self.lm_head = ColumnLinear(c.hidden_size, c.vocab_size, bias=False, dtype=c.dtype)

    def prepare_inputs(self, max_batch_size: int, *, max_draft_len: int = 0, **options: Any) -> dict[str, int]:
        return {"max_batch_size": max_batch_size, "max_draft_len": max_draft_len, **options}

    @classmethod
    def from_checkpoint(cls, folder: str, config: Any) -> LLaMAForCausalLM:
        model = cls(config)
        model.load(load_file(Path(folder) / "rank0.safetensors"))
        return model

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        parameters = dict(self.named_parameters())
        required = {name for name in parameters if not (name.endswith("lm_head.weight") and name not in weights)}
        missing = required - weights.keys()
        if missing:
            raise RuntimeError(f"Required but not provided tensors: {sorted(missing)}")
        self.not_required = weights.keys() - required
        for name in required:
            assert tuple(weights[name].shape) == parameters[name].shape, name
            parameters[name].value = weights[name]
        if self.lm_head.weight.value is None:
            self.lm_head.weight.value = self.transformer.vocab_embedding.weight.value


class QWenForCausalLM(LLaMAForCausalLM):
    qwen = True


# -- the builder and the runtime -------------------------------------------------------------------------------------


class _KeyValueCacheParams:
    def __init__(self, past_key_value: list[dict]) -> None:
        self.past_key_value = past_key_value

    def fill_none_tensor_list(self, length: int) -> None:
        assert len(self.past_key_value) == length


class Session:
    """What builder and runtime do together: load a checkpoint with a class, run steps of packed tokens."""

    def __init__(self, model_cls: type, folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        mapping = SimpleNamespace(**values.pop("mapping"), tp_group=None, cp_size=1)
        config = SimpleNamespace(**values, mapping=mapping, quant_mode=None)
        self.model = model_cls.from_checkpoint(str(folder), config=config)
        inputs = self.model.prepare_inputs(max_batch_size=8, max_draft_len=0, gather_context_logits=False)
        assert inputs == {"max_batch_size": 8, "max_draft_len": 0, "gather_context_logits": False}, "not delegated"
        self.caches: list[dict] = [{} for _ in range(config.num_hidden_layers)]

    @torch.no_grad()
    def step(self, tokens: Mapping[int, tuple[int, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Sequence -> (first position, tokens). Returns the marked outputs, logits `[sequences, v]`."""
        outputs.clear()
        lengths = torch.tensor([len(own) for _, own in tokens.values()])
        sequences = [(sequence, first, len(own)) for sequence, (first, own) in tokens.items()]
        self.model(
            input_ids=_wrap(torch.tensor([t for _, own in tokens.values() for t in own], dtype=torch.int32)),
            position_ids=None,
            use_cache=True,
            last_token_ids=_wrap(lengths.cumsum(0).int()),
            attention_mask=None,
            kv_cache_params=_KeyValueCacheParams(self.caches),
            attention_params=SimpleNamespace(sequences=sequences),
        )
        return dict(outputs)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """`import tensorrt_llm` finds the stand-in inside this context."""
    parts = {
        "": {},
        ".functional": _FUNCTIONAL,
        ".module": {"Module": Module, "ModuleList": ModuleList},
        ".layers": {"Attention": Attention, "ColumnLinear": ColumnLinear, "GatedMLP": GatedMLP, "RmsNorm": RmsNorm},
        ".models": {"LLaMAForCausalLM": LLaMAForCausalLM, "QWenForCausalLM": QWenForCausalLM},
        "._utils": {"pad_vocab_size": lambda size, tp: -(-size // tp) * tp},
        "._common": {"default_net": lambda: SimpleNamespace(plugin_config=plugins)},
    }
    names = [f"tensorrt_llm{part}" for part in parts]
    assert not any(name in sys.modules for name in names), "a real tensorrt_llm is here"
    try:
        for part, contents in parts.items():
            module = ModuleType(f"tensorrt_llm{part}")
            module.__spec__ = ModuleSpec(module.__name__, None)
            vars(module).update(contents)
            sys.modules[module.__name__] = module
            if part:
                setattr(sys.modules["tensorrt_llm"], part[1:], module)
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
