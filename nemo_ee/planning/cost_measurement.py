# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Time the operations of `nemo_ee.planning.cost_model` on the device that will run them.

Each distinct operation runs for a moment on random tensors of its real shape and dtype, alone, and those tensors are
freed before the next one: the memory needed is that of the largest. Point-wise work that the cost model's FLOPs leave
out is timed too; rotary embeddings, residual additions and transfers are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from nemo_ee.planning.cost_model import Attention, Operation, Pointwise, Price, Product

_REPETITIONS = range(2, 21)  # fewest and most timed calls
_MOMENT = 0.2  # seconds for one operation


def stopwatch(device: torch.device, dtype: torch.dtype) -> Price:
    """A price in seconds. Each operation is timed once.

    Args:
        device: device to run on.
        dtype: dtype of the products (that of autocast).
    """
    known: dict[Operation, float] = {}

    def price(operation: Operation) -> float:
        if operation not in known:
            known[operation] = _seconds(operation, device, dtype)
        return known[operation]

    return price


def _seconds(operation: Operation, device: torch.device, dtype: torch.dtype) -> float:
    rows_at_once = getattr(operation, "rows_at_once", None)
    times = operation.rows / rows_at_once if rows_at_once else 1.0
    if isinstance(operation, Product):
        works = _product(operation, device, dtype)
    elif isinstance(operation, Attention):
        works = [_attention(operation, device, dtype)]
    else:
        works = [_POINTWISE[operation.kind](operation, device, dtype)]
    return times * sum(_time(work, device) for work in works)


@torch.enable_grad()
def _time(work: Callable[[], object], device: torch.device) -> float:
    """Fewest seconds of one call, after a warm-up call. Other processes only add time, so the minimum is taken."""

    def once() -> float:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - start

    once()
    times: list[float] = []
    while len(times) < _REPETITIONS[0] or (len(times) < _REPETITIONS[-1] and sum(times) < _MOMENT):
        times.append(once())
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product(product: Product, device: torch.device, dtype: torch.dtype) -> list[Callable[[], object]]:
    rows = product.rows_at_once or product.rows
    x = torch.randn(rows, product.inputs, device=device, dtype=dtype)
    weight = torch.randn(product.outputs, product.inputs, device=device, dtype=dtype)
    y = torch.randn(rows, product.outputs, device=device, dtype=dtype)
    works: list[Callable[[], object]] = [lambda: functional.linear(x, weight)]
    if product.input_gradient:
        works.append(lambda: y @ weight)
    if product.weight_gradient:
        total = torch.zeros(product.outputs, product.inputs, device=device)
        same = dtype == total.dtype
        works.append(lambda: total.addmm_(y.t(), x) if same else total.add_(y.t() @ x))
    return works


def _attention(operation: Attention, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Fused: one kernel on [batch, heads, sequence, head_dim]. Otherwise as Megatron's own attention does it, on
    transposed views of [sequence, batch * heads, head_dim]: products, mask, softmax, product."""
    batch, heads, sequence, width = operation.batch, operation.heads, operation.sequence, operation.head_dim
    size = (batch, heads, sequence, width) if operation.fused else (sequence, batch * heads, width)
    q, k, v = (torch.randn(size, device=device, dtype=dtype, requires_grad=operation.backward) for _ in range(3))
    hidden = torch.ones(sequence, sequence, dtype=torch.bool, device=device).triu(1)
    empty = torch.empty(0 if operation.fused else batch * heads, sequence, sequence, device=device, dtype=dtype)

    def attend() -> Tensor:
        if operation.fused:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        queries, keys, values = q.transpose(0, 1), k.permute(1, 2, 0), v.transpose(0, 1)
        scores = torch.baddbmm(empty, queries, keys, beta=0.0, alpha=width**-0.5).masked_fill_(hidden, -1e4)
        return torch.bmm(scores.float().softmax(dim=-1).to(dtype), values)

    def attend_and_return() -> None:
        attended = attend()
        attended.backward(torch.ones_like(attended))

    return attend_and_return if operation.backward else attend


def _norm(operation: Pointwise, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    x = torch.randn(operation.rows, operation.columns, device=device, requires_grad=operation.backward)
    weight = torch.ones(operation.columns, device=device, requires_grad=operation.backward)

    def work() -> None:
        y = functional.rms_norm(x, (operation.columns,), weight, 1e-5)
        if operation.backward:
            y.backward(x.detach())

    return work


def _activation(operation: Pointwise, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    columns = operation.columns * (2 if operation.gated else 1)
    x = torch.randn(operation.rows, columns, device=device, dtype=dtype, requires_grad=operation.backward)
    upstream = torch.randn(operation.rows, operation.columns, device=device, dtype=dtype)

    def work() -> None:
        if operation.gated:
            gate, up = x.chunk(2, dim=-1)
            y = functional.silu(gate) * up
        else:
            y = functional.gelu(x)
        if operation.backward:
            y.backward(upstream)

    return work


def _lookup(operation: Pointwise, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    table = torch.randn(1024, operation.columns, device=device)
    tokens = torch.randint(0, 1024, (operation.rows,), device=device)
    return lambda: functional.embedding(tokens, table)


def _loss(operation: Pointwise, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """The passes over a chunk of logits that the fused loss makes; see `megatron.loss.linear_cross_entropy`."""
    rows = operation.rows_at_once or operation.rows
    logits = torch.randn(rows, operation.columns, device=device, dtype=dtype)

    def work() -> None:
        chunk = logits.float()
        chunk.sub_(chunk.amax(dim=-1, keepdim=True)).exp_()
        total = chunk.sum(dim=-1, keepdim=True)
        if operation.backward:
            chunk.div_(total).to(dtype)

    return work


_POINTWISE = {"norm": _norm, "activation": _activation, "lookup": _lookup, "loss": _loss}
