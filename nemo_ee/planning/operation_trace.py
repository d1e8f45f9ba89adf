# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What a piece of work computes, sends and holds: operations are watched as they are dispatched.

One trace serves real runs and dry ones. In a dry run tensors are fake (torch's `FakeTensorMode`) and ranks are on
torch's `fake` backend, so a rank of any layout runs on one machine without memory. There the trace supplies what only
a real run has: finished transfers, and a number for each that is read from a tensor.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_READ_FROM_FAKE = 1.0  # every number that is read from a fake tensor: a norm, a loss


@dataclass(frozen=True)
class Compute:
    """Matrix products and attention between two transfers, `flops` floating-point operations."""

    flops: float


@dataclass(frozen=True)
class Transfer:
    """A collective or a transfer between two ranks.

    Attributes:
        kind: name of torch's operation: allreduce_, send, recv_, ...
        ranks: size of its group.
        bytes: size of the largest of its tensor arguments.
        stride: distance of neighbouring ranks of the group, 1 inside tensor parallelism.
    """

    kind: str
    ranks: int
    bytes: int
    stride: int


class OperationTrace(TorchDispatchMode):
    """Watches what runs inside the block.

    Args:
        dry: tensors are fake and ranks are on the `fake` backend.

    Attributes:
        events: `Compute` and `Transfer`, in their order.
        live: bytes of the tensors that were made inside the block and still exist.
        peak: largest `live` since `reset`.
        at_peak: number of a storage, by the order in which they were made -> its bytes, at the peak.
    """

    def __init__(self, *, dry: bool) -> None:
        super().__init__()
        self.dry = dry
        self.events: list[Compute | Transfer] = []
        self.live = self.peak = 0
        self.at_peak: dict[int, int] = {}
        self._storages: dict[int, tuple[int, int, Any]] = {}  # address -> number, bytes, weak reference
        self._made = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.dry and function is _aten._local_scalar_dense.default:
            return _READ_FROM_FAKE
        if function.namespace == "c10d":
            self.events.append(_transfer(function, args))
            if self.dry:
                work = FakeWork().boxed()
                return work if len(function._schema.returns) == 1 else (args[0], work)
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        if flops := flops_of(function, args, kwargs, result):
            before = self.events.pop().flops if self.events and isinstance(self.events[-1], Compute) else 0.0
            self.events.append(Compute(before + flops))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._keep(leaf.untyped_storage())
        return result

    def _keep(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or not size:
            return

        def gone(_: Any) -> None:
            self.live -= self._storages.pop(key)[1]

        self._made += 1
        self._storages[key] = self._made, size, weakref.ref(storage, gone)
        self.live += size
        if self.live > self.peak:
            self._keep_peak()

    def _keep_peak(self) -> None:
        self.peak = self.live
        self.at_peak = {number: size for number, size, _ in self._storages.values()}

    def reset(self) -> None:
        """Forget the events, and measure the peak from now on."""
        self.events = []
        self._keep_peak()

    @property
    def flops(self) -> float:
        """Floating-point operations of all events."""
        return sum(event.flops for event in self.events if isinstance(event, Compute))

    def bytes_at_peak(self, kinds: Mapping[str, Iterable[Tensor]]) -> dict[str, int]:
        """Bytes at the peak by kind; what is of no kind is `temporary`.

        Args:
            kinds: kind -> its tensors, which exist now.
        """
        left, found = dict(self.at_peak), {}
        for kind, tensors in kinds.items():
            known = (self._storages.get(tensor.untyped_storage()._cdata) for tensor in tensors)
            found[kind] = sum(left.pop(number, 0) for number in {entry[0] for entry in known if entry})
        return {**found, "temporary": sum(left.values())}


def _transfer(function: Any, args: tuple) -> Transfer:
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
    group = ProcessGroup.unbox(boxed)
    ranks = torch.distributed.get_process_group_ranks(group)
    sizes = [
        sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(arg) if isinstance(leaf, Tensor))
        for arg in args
    ]
    stride = ranks[1] - ranks[0] if len(ranks) > 1 else 0
    return Transfer(function.__name__.split(".")[0], len(ranks), max(sizes), stride)


def flops_of(function: Any, args: tuple, kwargs: dict, result: Any) -> float:
    """Floating-point operations of a call of one of torch's operations: of products and attention, else 0.

    Causal attention counts half of the square, of which its kernels skip the rest.
    """
    packet = function._overloadpacket
    if packet is _aten.addmm_:  # torch's table has `addmm` alone
        return 2.0 * math.prod(args[1].shape) * args[2].shape[-1]
    factor = _ATTENTION.get(packet.__name__)
    if factor is not None:
        given = {**dict(zip((one.name for one in function._schema.arguments), args, strict=False)), **kwargs}
        query, key = given["query"], given["key"]
        return factor * 4.0 * query.numel() * key.shape[-2] * (0.5 if given.get("is_causal") else 1.0)
    return float(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0.0


# Attention in one call -> its cost in forward passes. A forward pass is two products, a backward pass five.
_ATTENTION = {
    f"_scaled_dot_product_{kind}{direction}": factor
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    for direction, factor in (("", 1.0), ("_backward", 2.5))
}
