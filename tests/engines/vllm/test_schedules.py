# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Prompts in pieces, requests that join, end and are preempted: every step of real vLLM, repeated by the runtime.

What vLLM runs in each step is recorded and given to `PropagatingBatch`, which must read the same tokens at the same
exits. Exits may be evaluated only in steps of one sampled token for each request.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.forward_context import get_forward_context

from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.loader import load_model
from nemo_ee.runtime.propagation import PropagatingBatch
from tests.engines.vllm.engine import generate, model_of, save_model, served

PROMPTS = [[(7 * row + 5 * i) % 120 + 3 for i in range(length)] for row, length in enumerate((3, 25, 9, 14, 1, 22))]
NEW_TOKENS = [40, 22, 30, 33, 41, 25]
THRESHOLD = 0.06


@dataclass
class Step:
    """A forward pass of vLLM: request -> (first position, tokens), and the exits that its rows were read from."""

    tokens: dict[int, tuple[int, list[int]]]
    read_at: dict[int, int] | None


def record(llm: Any) -> list[Step]:
    """Record every later step."""
    model, steps = model_of(llm), []
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    forward = model.forward

    def recording(input_ids: Any, positions: Any, *others: Any, **named: Any) -> Any:
        hidden = forward(input_ids, positions, *others, **named)
        metadata = get_forward_context().attn_metadata
        if metadata is not None:
            starts = next(iter(metadata.values())).query_start_loc.tolist()
            requests = [int(name.partition("-")[0]) for name in runner.input_batch.req_ids]
            tokens = {
                request: (int(positions[begin]), input_ids[begin:end].tolist())
                for request, begin, end in zip(requests, starts, starts[1:], strict=False)
            }
            outcome = model._running and model._running.outcome
            steps.append(Step(tokens, outcome and dict(zip(requests, outcome.read_at, strict=True))))
        return hidden

    model.forward = recording
    return steps


@pytest.mark.parametrize("preempting", [False, True])
def test_every_step_is_the_runtime_s(preempting: bool, tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    arguments = {"max_num_batched_tokens": 16, "max_num_seqs": 3, "block_size": 32}
    if preempting:
        arguments["num_gpu_blocks_override"] = 5
    with served(tmp_path, {"thresholds": THRESHOLD, "only_if_faster": False}, **arguments) as llm:
        steps = record(llm)
        tokens = generate(llm, PROMPTS, NEW_TOKENS, [None] * len(PROMPTS))
    first = min(request for step in steps for request in step.tokens)
    model = load_model(tmp_path)
    evaluated = ExitPolicy(THRESHOLD).evaluated_exits(model.exits)
    batch = PropagatingBatch(model, [evaluated] * len(PROMPTS), "max_probability", 128, row_by_row=True)
    names, lengths, sampled, recomputed = [exit.point.name for exit in evaluated] + [None], {}, {}, {}
    kinds = set()
    for step in steps:
        feed = {request - first: step.tokens[request] for request in sorted(step.tokens)}
        for row, (begin, own) in feed.items():
            if begin < lengths.get(row, 0):
                recomputed[row] = lengths[row]
                batch.cache.truncate(row, begin)
            for position, token in enumerate(own, begin):
                assert token == (PROMPTS[row] + tokens[row])[position]
            lengths[row] = begin + len(own)
        decoding = all(
            len(own) == 1 and begin >= max(len(PROMPTS[row]), recomputed.get(row, 0) + 1)
            for row, (begin, own) in feed.items()
        )
        assert (step.read_at is not None) == decoding
        exits, logits = batch.run(feed, evaluating=decoding)
        if step.read_at is not None:
            assert list(exits) == [names[step.read_at[row + first]] for row in feed]
        kinds.add((len(feed) > 1, decoding, any(len(own) > 1 for _, own in feed.values())))
        for row, token in zip(feed, logits.argmax(dim=-1).tolist(), strict=True):
            if lengths[row] >= max(len(PROMPTS[row]), recomputed.get(row, 0) + 1):  # else vLLM samples nothing
                sampled[row, lengths[row] - len(PROMPTS[row])] = token
    for (row, index), token in sampled.items():
        assert index >= len(tokens[row]) or lengths[row] < index or token == tokens[row][index]
    assert {(True, True, False), (True, False, True)} <= kinds, (
        "control: decoding steps, and steps with prompts in them"
    )
    assert bool(recomputed) == preempting, "control"
