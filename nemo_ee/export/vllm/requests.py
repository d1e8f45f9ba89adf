# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The thresholds of each request, and the rows of the next step.

A request states them in `vllm_xargs` of the OpenAI API, or in `SamplingParams(extra_args=...)`:

    early_exit_threshold    number, for every loaded exit; or JSON text {"exit": number} for some of them; "off"

vLLM's logits processors are the interface that gets the parameters of every request before the forward pass, in the
order of its rows. This one changes no logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from nemo_ee.exits.criteria import NEVER_LEAVES
from nemo_ee.export.vllm.served_exits import ServedExits, ServerRecord
from nemo_ee.generation.policy import ExitPolicy

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

THRESHOLD = "early_exit_threshold"
OFF = "off"


def policy_of(arguments: Mapping[str, Any] | None, criterion: str) -> ExitPolicy | str | None:
    """The policy that a request states, `OFF`, or None if it states none.

    Raises:
        ValueError: with every problem that is visible without the model's exits.
    """
    unknown = [key for key in arguments or () if key.startswith("early_exit") and key != THRESHOLD]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: unknown; the argument for early exit is {THRESHOLD}")
    value = (arguments or {}).get(THRESHOLD)
    if value is None or value == OFF:
        return value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
        if not isinstance(value, dict) or not value:
            raise ValueError(f'{THRESHOLD} must be a number, JSON text such as {{"layer4-mlp": 0.9}}, or {OFF!r}')
    active = tuple(value) if isinstance(value, Mapping) else None
    return ExitPolicy(value, criterion, active=active)


@dataclass
class _Request:
    """A request in the batch.

    Attributes:
        thresholds: one for each exit; None = it never leaves.
        output: vLLM's list of its output tokens.
        before: length of that list when the request entered the batch. vLLM recomputes a request that it preempted:
            its prompt and these tokens then run as a prompt does.
    """

    thresholds: tuple[float, ...] | None
    output: list[int]
    before: int

    @property
    def is_decoding(self) -> bool:
        """Whether its next row is the token that was sampled last."""
        return len(self.output) > self.before


class RequestThresholds(LogitsProcessor):
    """vLLM makes one in each worker, before the model."""

    _made: WeakValueDictionary[str, RequestThresholds] = WeakValueDictionary()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request with other arguments than the served model takes; the server answers 400.

        Raises:
            ValueError: every problem.
        """
        served = ServerRecord.read()
        policy = policy_of(sampling_params.extra_args, served.criterion)
        if isinstance(policy, ExitPolicy):
            policy.evaluated_exits([exit.point for exit in served.exits])

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> RequestThresholds:
        """The object of this worker."""
        return cls._made[vllm_config.instance_id]

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        served = ServedExits.of(vllm_config)
        self.device, self.exits, self.criterion = device, served.exits, served.criterion
        self.default = self._thresholds(served.policy)
        self._requests: dict[int, _Request] = {}
        self._started = 0  # the first rows whose requests are known to be past their prompts
        self._matrix: Tensor | None = None
        self._all_leave = False
        self._made[vllm_config.instance_id] = self

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow vLLM's batch."""
        if process_dict_updates(self._requests, batch_update, self._new_request):
            self._matrix, self._started = None, 0

    def thresholds(self) -> Tensor | None:
        """`[exits, rows]`, fp32: thresholds of the next step; None if it must run to full depth.

        That is a step in which a row belongs to a prompt, since prompts run at full depth, and a step with a row that
        never leaves, since the others would wait for it.
        """
        rows = len(self._requests)
        if self._started < rows:
            while self._started < rows and self._requests[self._started].is_decoding:
                self._started += 1
            if self._started < rows:
                return None
        if self._matrix is None and rows:
            columns = [self._requests[row].thresholds for row in range(rows)]
            self._matrix = torch.tensor([column or self._never for column in columns], device=self.device).T
            self._all_leave = all(column is not None for column in columns)
        return self._matrix if rows and self._all_leave else None

    def apply(self, logits: Tensor) -> Tensor:
        """The logits, as they are."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """True: logits do not change."""
        return True

    @property
    def _never(self) -> tuple[float, ...]:
        return (NEVER_LEAVES[self.criterion],) * len(self.exits)

    def _new_request(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> _Request:
        policy = policy_of(params.extra_args, self.criterion)
        thresholds = self.default if policy is None else self._thresholds(None if policy == OFF else policy)
        return _Request(thresholds, output, len(output))

    def _thresholds(self, policy: ExitPolicy | None) -> tuple[float, ...] | None:
        evaluated = () if policy is None else policy.evaluated_exits([exit.point for exit in self.exits])
        by_name = {exit.point.name: exit.threshold for exit in evaluated}
        never = NEVER_LEAVES[self.criterion]
        return tuple(by_name.get(exit.name, never) for exit in self.exits) if by_name else None
