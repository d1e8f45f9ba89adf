# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Parts of a model as compiled graphs, like vLLM's own whole models: traced once, for any number of rows.

vLLM compiles a model as one graph. A step with exits runs parts of it, and without compilation the small operations
of a layer cost as much as its matrix products (twice the time of a layer on a CPU). Parts are compiled where vLLM
traces a model once for plain Inductor, which is on CPUs. Elsewhere vLLM has compiler passes of its own, and parts run
as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import CompilationMode, VllmConfig

WARM_UP_ROWS = 8
_FEWEST_ROWS = 2  # to trace with: a graph that is traced with one row is for one row only


def compiled(function: Callable[..., Any], config: VllmConfig) -> Callable[..., Any]:
    """A function of tensors `[rows, ...]`, compiled at its first call with several rows; `function` itself where
    nothing is compiled.

    Args:
        function: the function; what it closes over must not change.
        config: the configuration of the engine.
    """
    settings = config.compilation_config
    if settings.mode != CompilationMode.DYNAMO_TRACE_ONCE or settings.backend != "inductor":
        return function
    options = {**settings.inductor_compile_config, "guard_filter_fn": _no_guards}
    graph: Callable[..., Any] | None = None

    def call(*arguments: Any) -> Any:
        nonlocal graph
        # No guard looks at strides.
        arguments = tuple(one.contiguous() if isinstance(one, torch.Tensor) else one for one in arguments)
        if graph is None:
            if arguments[0].shape[0] < _FEWEST_ROWS:
                return function(*arguments)
            for tensor in arguments:
                if isinstance(tensor, torch.Tensor):
                    torch._dynamo.mark_dynamic(tensor, 0)
            # Ahead of time: a call through dynamo takes 0.1 ms longer.
            with torch._dynamo.config.patch(enable_aot_compile=True):
                lazy = torch.compile(function, fullgraph=True, dynamic=False, backend="inductor", options=options)
                graph = lazy.aot_compile((arguments, {}))
            graph.disable_guard_check()
        return graph(*arguments)

    return call


def _no_guards(guards: Any) -> list[bool]:
    """Nothing that a guard would look at changes: weights, layers and the rank are those of the process."""
    return [False for _ in guards]
