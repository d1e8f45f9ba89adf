# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Run NeMo and Megatron-core, which assume CUDA and Apex, on a host without a GPU (torch.distributed on gloo).

The one place in the package that patches anything. `trainer.accelerator=cpu` switches it on, before torch touches a
device; every CUDA device is then hidden. Switched off (the default) it changes nothing. The same NeMo and Megatron
code paths run afterwards; only calls that name a CUDA device are answered on the CPU:

* `torch.cuda.current_device()` answers `"cpu"`; device switches, synchronisation, streams and memory statistics do
nothing.
* `.cuda()` returns the tensor or module itself; factory functions read `device="cuda"` as `device="cpu"`.
* `torch.cuda` random-state calls reach the CPU generator, which Megatron's RNG tracker then forks and restores.
* CUDA tensor type names, which Megatron and NeMo assert on before clipping gradients, mean the CPU types.
* NeMo's Apex guards are answered with Megatron-core's own equivalents.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

_ENABLED = False

# Factory functions that NeMo and Megatron call with a `device` argument.
_FACTORIES = (
    "arange empty empty_like eye full full_like linspace ones ones_like rand rand_like randint randn randn_like "
    "randperm tensor as_tensor zeros zeros_like"
).split()

_NO_OPS = (
    "set_device synchronize empty_cache reset_peak_memory_stats reset_max_memory_allocated ipc_collect init nvtx_push"
).split()

# Model settings without which NeMo and Megatron need GPU kernels; laid over a model's config, never stored.
MODEL_SETTINGS = {
    "use_cpu_initialization": True,
    "transformer_engine": False,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}


def enabled() -> bool:
    """Whether this process runs on the CPU host."""
    return _ENABLED


def enable() -> None:
    """Switch the CPU host on for the rest of this process. Calling it again does nothing.

    Raises:
        ImportError: this version of Megatron-core is not supported.
        RuntimeError: when torch has already initialised a CUDA device.
    """
    global _ENABLED
    if _ENABLED:
        return
    from nemo_ee.megatron.versions import refuse_unsupported_version

    refuse_unsupported_version()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "25.07")  # NeMo parses it as YY.MM and fails on None
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # NeMo and Megatron need it for TP overlap
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron compiles small functions; here they run as written
    import torch
    import torch._dynamo  # tabulates torch's functions by identity when imported, so before they are replaced
    from torch.utils._device import _device_constructors

    if torch.cuda.is_initialized():
        raise RuntimeError(
            "trainer.accelerator=cpu was requested after torch initialised a CUDA device; "
            "call nemo_ee.cpu_host.enable() before any CUDA call"
        )
    _ENABLED = True
    _device_constructors()  # tabulates them too, for `with torch.device(...)`, in which transformers 5 builds models
    _answer_cuda_module(torch)
    _answer_tensor_methods(torch)
    _answer_factories(torch)
    _answer_random_state(torch)
    _answer_megatron_random_state(torch)


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _answer_cuda_module(torch) -> None:
    for name in _NO_OPS:
        if hasattr(torch.cuda, name):
            setattr(torch.cuda, name, _nothing)
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.is_available = lambda: False
    torch.cuda.device_count = lambda: 0
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda *args, **kwargs: 0)

    class NoStream:
        """Stands for a CUDA stream: work on the CPU is already in order."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            pass

        synchronize = wait_stream = wait_event = record_event = _nothing

    torch.cuda.Stream = NoStream
    torch.cuda.current_stream = NoStream
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = _nothing
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "LongTensor", "IntTensor"):
        setattr(torch.cuda, name, getattr(torch, name))


def _answer_tensor_methods(torch) -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    to, tensor_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(to)
    def to_here(self, *args, **kwargs):
        args = tuple(_here(a) for a in args)
        if "device" in kwargs:
            kwargs["device"] = _here(kwargs["device"])
        return to(self, *args, **kwargs)

    @functools.wraps(tensor_type)
    def cuda_type_name(self, *args, **kwargs):
        result = tensor_type(self, *args, **kwargs)
        # Megatron's optimizers and gradient clipping compare with "torch.cuda.FloatTensor".
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.to = to_here
    torch.Tensor.type = cuda_type_name


def _here(device: object) -> object:
    """`"cuda"`, `"cuda:1"` and CUDA devices become `"cpu"`; anything else stays as it is."""
    kind = device if isinstance(device, str) else getattr(device, "type", None)
    return "cpu" if isinstance(kind, str) and kind.startswith("cuda") else device


def _answer_factories(torch) -> None:
    torch.jit._state.disable()  # NeMo scripts functions that call factories; the compiler supports only torch's own

    def on_cpu(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def create(*args, **kwargs):
            if kwargs.get("device") is not None:
                kwargs["device"] = _here(kwargs["device"])
            return factory(*args, **kwargs)

        return create

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _answer_random_state(torch) -> None:
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(int(seed))


def _answer_megatron_random_state(torch) -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    def set_state(new_state, *args, **kwargs):
        torch.set_rng_state(new_state)

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = set_state


def adapt_nemo() -> None:
    """Answer NeMo's Apex guards. Called by `nemo_ee.models` when the CPU host is on; does nothing when it is off."""
    if not _ENABLED:
        return
    from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
    from nemo.collections.nlp.modules.common.megatron import build_model, utils
    from nemo.collections.nlp.parts import nlp_overrides

    nlp_overrides.HAVE_APEX = True
    megatron_gpt_model.get_specs = _local_layer_spec  # NeMo's builds every Transformer-Engine spec before it chooses
    utils.listify_model = lambda model: model if isinstance(model, list) else [model]
    build_model.set_defaults_if_not_set_tensor_model_parallel_attributes = (
        set_defaults_if_not_set_tensor_model_parallel_attributes
    )


def _local_layer_spec(spec_name, transformer_config=None, *args, **kwargs):
    from nemo_ee.megatron.model.layer_spec import backbone_specs

    return backbone_specs(transformer_config, transformer_engine=False).layer
