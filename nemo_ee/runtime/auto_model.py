# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Early exit for a model class of transformers, 4.51 to 5.x.

`EarlyExitGeneration` in front of a family's class adds the parameters of the exit heads, under the names they have in
`hf_early_exit/`, and decoding with the engine. Everything else is the class's own: `from_pretrained`,
`save_pretrained`, `forward`, and `generate` without early-exit arguments. With them, `generate` of transformers still
reads and checks the call; only its decoding loop (`_sample`) is replaced.

The export copies this file and what it imports into `hf_early_exit/`; nothing here needs nemo_ee to be installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import LongTensor, Tensor, nn

from nemo_ee.exits.block_reader import RENAMED_KEYS
from nemo_ee.exits.criteria import OF_LOGITS, PROBE
from nemo_ee.families.rotary_settings import with_both_spellings
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy, plan_exits
from nemo_ee.generation.validation import raise_all
from nemo_ee.runtime.exit_modules import exit_modules
from nemo_ee.runtime.exported_model import ExportedModel, exported_model
from nemo_ee.runtime.loader import DTYPES, StoredTensors, model_of
from nemo_ee.runtime.sampling_loop import SamplingLoop, unsupported_settings

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
if VERSION < (4, 51):
    raise ImportError(
        f"transformers {transformers.__version__}: early exit needs 4.51 or later; update it, or load the stock class "
        "without trust_remote_code"
    )

_WAY_OUT = "merge adapters and undo changes of the model, or generate without early-exit arguments"
# The loop of the running call of `generate`, in its thread.
_LOOP: ContextVar[SamplingLoop | None] = ContextVar("early_exit_loop", default=None)
# Model -> (state of its parameters, engine over them); not an attribute, so that models can be copied and pickled.
_ENGINES: WeakKeyDictionary[nn.Module, tuple[tuple, EarlyExitEngine]] = WeakKeyDictionary()


class PortableConfig:
    """Goes in front of a family's config class, so that every version reads what any of them saves."""

    def to_dict(self) -> dict[str, Any]:
        """That of transformers, with the rotary settings that this version uses in both spellings."""
        values = super().to_dict()
        unused = ("rope_parameters",) if VERSION < (5, 0) else ("rope_theta", "rope_scaling")
        if "rope_theta" in values or "rope_parameters" in values:
            values = with_both_spellings({key: value for key, value in values.items() if key not in unused})
        return values


class EarlyExitGeneration:
    """Goes in front of a `...ForCausalLM` class; see the module.

    Attributes:
        exit_heads: the parameters of the exits. The class's own `forward` does not use them.
    """

    def __init__(self, config: Any, *args: Any, **settings: Any) -> None:
        super().__init__(config, *args, **settings)
        values = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
        self._exported: ExportedModel = exported_model(values, "config")
        self.exit_heads = exit_modules(self._exported)

    @classmethod
    def from_pretrained(cls, *args: Any, **settings: Any) -> Any:
        """That of transformers; `dtype` and `torch_dtype` are the same."""
        if "dtype" in settings and VERSION < (4, 56):  # that version renamed torch_dtype
            settings["torch_dtype"] = settings.pop("dtype")
        return super().from_pretrained(*args, **settings)

    @property
    def engine(self) -> EarlyExitEngine:
        """The decoding engine over the model's parameters, with all of its modes; made again if one has changed.

        Raises:
            ValueError: the parameters are on several devices or not in memory, of an unsupported dtype, or not those
                of the model's config.
        """
        tensors = {name: one.detach() for name, one in self.named_parameters(remove_duplicate=False)}
        devices = {one.device for one in tensors.values()}
        if len(devices) > 1 or any(device.type == "meta" for device in devices):
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"early exit needs all parameters on one device, and they are on {names}; load the model with "
                "device_map={'': 'cuda:0'} or {'': 'cpu'}, or generate without early-exit arguments"
            )
        state = tuple(_state(one) for one in self.parameters())
        found = _ENGINES.get(self)
        if found is None or found[0] != state:
            _ENGINES.pop(self, None)  # its memory is free before the new one takes some
            found = _ENGINES[self] = (
                state,
                EarlyExitEngine(_runtime_model(self._exported, tensors, *devices, self.dtype)),
            )
        return found[1]

    def generate(
        self,
        inputs: LongTensor | None = None,
        generation_config: Any = None,
        *args: Any,
        early_exit_threshold: float | Mapping[str, float] | None = None,
        early_exit_criterion: str | None = None,
        early_exits: Sequence[str] | None = None,
        max_pending_tokens: int | None = None,
        seed: int | None = None,
        return_result: bool = False,
        **settings: Any,
    ) -> Any:
        """`generate` of transformers; with one of the arguments below, each token leaves at the first exit whose
        confidence passes its threshold.

        Args:
            inputs, generation_config, args, settings: those of transformers. Early exit decodes greedily or by
                sampling, with the settings named in docs/export-huggingface.md; others are refused.
            early_exit_threshold: one for all exits, or one for each by name; None = full depth.
            early_exit_criterion: default `max_probability`; with `early_exits` and `max_pending_tokens` the fields
                `criterion`, `active` and `max_pending_tokens` of `ExitPolicy`.
            seed: random seed of the sequences; None = drawn from torch's generator, which `set_seed` seeds.
            return_result: also return the engine's result: exits, layers, confidences.

        Returns:
            That of transformers; with `return_result` a pair of it and a `GenerationResult`.

        Raises:
            ValueError: every problem of the call.
        """
        raise_all([f"{key} is now {RENAMED_KEYS[key]}" for key in settings if key in RENAMED_KEYS])
        policy = (early_exit_criterion, early_exits, max_pending_tokens)
        if (early_exit_threshold, *policy, seed) == (None,) * 5 and not return_result:
            return super().generate(inputs, generation_config, *args, **settings)
        token_types = settings.get("token_type_ids")
        if token_types is not None and not token_types.any():  # some tokenizers return them for every text
            del settings["token_type_ids"]
        loop = SamplingLoop(self._policy(early_exit_threshold, *policy), seed)
        config, others = self._prepare_generation_config(generation_config, **settings)
        raise_all(
            ["arguments after generation_config need their names"] * bool(args) + unsupported_settings(config, others)
        )
        before = _LOOP.set(loop)
        try:
            output = super().generate(inputs, generation_config, **settings)
        finally:
            _LOOP.reset(before)
        if loop.result is None:
            raise RuntimeError(
                f"transformers {transformers.__version__} did not decode with early exit; measured are 4.51 to 5.24"
            )
        return (output, loop.result) if return_result else output

    def _policy(
        self, thresholds: Any, criterion: str | None, active: Sequence[str] | None, max_pending_tokens: int | None
    ) -> ExitPolicy | None:
        """The policy of a call, checked against the model's exits before the engine is made; None = full depth."""
        if thresholds is None:
            keys = {"early_exit_criterion": criterion, "early_exits": active, "max_pending_tokens": max_pending_tokens}
            unused = [f"{key}={value!r}" for key, value in keys.items() if value is not None]
            if unused:
                raise ValueError(
                    f"{', '.join(unused)}: without effect; give early_exit_threshold too, or leave it out"
                )
            return None
        if criterion == PROBE:
            raise ValueError(
                f"early_exit_criterion={PROBE!r}: a loaded model has no probes; use one of {', '.join(OF_LOGITS)}, or "
                "decode the directory with nemo_ee.runtime"
            )
        active = None if active is None else active if isinstance(active, str) else tuple(active)
        policy = ExitPolicy(thresholds, criterion or "max_probability", active, max_pending_tokens)
        points = [exit.point for exit in self._exported.exits]
        plan_exits("early_exit", policy, points, self._exported.architecture.num_layers)
        return policy

    def _sample(self, input_ids: LongTensor, *args: Any, **settings: Any) -> Any:
        """The decoding loop of `generate` for greedy decoding and sampling."""
        loop = _LOOP.get()
        if loop is None:
            return super()._sample(input_ids, *args, **settings)
        return loop.run(lambda: self.engine, input_ids, *args, **settings)


def _state(tensor: Tensor) -> tuple:
    """Changes if the tensor was replaced or written to.

    The version counter does not see writes through `.data`, so some of the numbers are compared too.
    """
    some = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)]
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device, tuple(some.tolist())


def _runtime_model(exported: ExportedModel, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype):
    wrong = {one.dtype for one in tensors.values()} - set(DTYPES.values())
    if wrong:
        raise ValueError(
            f"early exit decodes parameters in {', '.join(DTYPES)}, and some are in {', '.join(map(str, wrong))}; use "
            ".to(torch.bfloat16), load without quantisation, or generate without early-exit arguments"
        )
    on_cpu = device.type == "cpu"

    def tensor(name: str) -> Tensor | None:
        found = tensors.get(name)
        # transformers 4 loads half precision as fp32; the runtime's products of half-precision weights are faster.
        if on_cpu and found is not None and found.dtype is torch.float32 and found.ndim == 2:
            half = found.bfloat16()
            return half if torch.equal(half.float(), found) else found
        return found

    source = StoredTensors("the model", exported, tensor, _WAY_OUT)
    with torch.no_grad():
        return model_of(exported, source, device, torch.float32 if on_cpu else dtype, share=True)
