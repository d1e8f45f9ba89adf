# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Decode on gloo ranks of several layouts and write what the first stage saw.

python -m tests.unit.megatron.decode_over_stages <Hugging Face directory> <file with the request> <output folder>
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# name -> tensor-parallel size, layers of each stage, what is wrong
LAYOUTS = {
    "exits on both stages": (1, [1, 2], None),
    "three stages": (1, [1, 1, 1], None),
    "tensor parallel": (2, [2, 1], None),
    "bf16": (1, [1, 2], "bf16"),
    "control: the state before": (1, [1, 2], "position"),
    "control: a cut is not told": (1, [1, 2], "truncate"),
    "a stage dies": (1, [1, 2], "dies"),
    "a stage raises": (1, [1, 2], "raises"),
    "the first stage dies": (1, [1, 2], "first dies"),
}
# How many tokens wait before they are sent on, where it is not the default.
RUN_PENDING_AFTER = {"exits on both stages": 2, "three stages": 1, "tensor parallel": 3}


def decode(engine: Any, calls: list[dict[str, Any]]) -> list[list[list[Any]]]:
    """[sequence, position, token, exit, confidence, logprob] of every token of every call."""
    from nemo_ee.generation.policy import ExitPolicy
    from nemo_ee.generation.sampling import SamplingParams

    found = []
    for call in calls:
        caps = {key: call.get(key) for key in ("max_pending_tokens", "num_draft_tokens")}
        policy = ExitPolicy(call["thresholds"], active=call.get("active"), **caps)
        if "num_context" in call:
            result = engine.score(call["prompts"], call["num_context"], mode=call["mode"], policy=policy)
        else:
            result = engine.generate(
                call["prompts"],
                max_new_tokens=call["max_new_tokens"],
                mode=call["mode"],
                policy=policy,
                sampling=SamplingParams(**call["sampling"]),
                stop_tokens=call.get("stop_tokens", ()),
            )
        rows = [[e.sequence, e.position, e.token, e.exit, e.confidence, e.logprob] for e in result.events]
        found.append(sorted(rows, key=lambda row: row[:2]))
    return found


def decode_and_flush(engine: Any, call: dict[str, Any]) -> tuple[list[list[int]], Any]:
    """The tokens that were fed of every sequence, and the cache, in which nothing waits any more."""
    from nemo_ee.generation.policy import ExitPolicy
    from nemo_ee.generation.request import Request
    from nemo_ee.generation.sampling import SamplingParams

    requests = [
        Request(tuple(own), call["max_new_tokens"], SamplingParams(**call["sampling"])) for own in call["prompts"]
    ]
    session = engine.start(requests, policy=ExitPolicy(call["thresholds"]))
    tokens = [list(own) for own in call["prompts"]]
    while not session.finished:
        for event in session.step():
            tokens[event.sequence].append(event.token)
    session.flush()
    assert not any(session.num_pending(index) for index in range(len(tokens)))
    return [own[:-1] for own in tokens], session.cache


def layout_program(directory: Path, request: dict[str, Any], output: Path, name: str) -> None:
    """One rank of a layout."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    from nemo_ee.exits.config import EarlyExitConfig
    from nemo_ee.exits.placement import place_exits
    from nemo_ee.generation.engine import EarlyExitEngine
    from nemo_ee.megatron.decoding.pipelined_decoding import DecodingStage, open_decoding_model
    from tests.unit.megatron.test_decoding_adapter import build

    tensor, layers, wrong = LAYOUTS[name]
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=len(layers)
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    stage = build(directory, request["exits"], drawn=False, layers_per_stage=layers)
    if wrong == "bf16":
        stage = stage.bfloat16()
    exits = EarlyExitConfig.from_mapping({"exits": request["exits"]}, num_layers=sum(layers)).exits
    placements = place_exits(
        exits, num_layers=sum(layers), num_stages=len(layers), full_depth=True, layers_per_stage=layers
    )
    # An answer may take this long; a stage may wait longer than that for its next command.
    model = open_decoding_model(stage, placements, timeout_minutes=0.2 if name == "three stages" else 2)
    rank = parallel_state.get_tensor_model_parallel_rank()
    prefix = output / f"{name}.{parallel_state.get_pipeline_model_parallel_rank()}.{rank}"
    if isinstance(model, DecodingStage):
        break_stage(model, wrong)
        with said_in(prefix):
            model.serve()
        caches = {layer: model.caches[max(model.caches)].own for layer in stage_layers(stage)} if not wrong else {}
    else:
        model.run_pending_after = RUN_PENDING_AFTER.get(name, model.run_pending_after)
        with said_in(prefix), model:
            if name == "three stages":
                time.sleep(13)
            engine = EarlyExitEngine(model)
            if wrong == "first dies":
                break_first(model)
            found = decode(engine, request["calls"] if wrong in (None, "bf16") else request["broken_calls"])
            fed, cache = decode_and_flush(engine, request["calls"][0])
            Path(f"{prefix}.json").write_text(json.dumps({"events": found, "fed": fed}))
            caches = {layer: cache.own for layer in stage_layers(stage)}
    torch.save({layer: (own.keys(layer), own.values(layer)) for layer, own in caches.items()}, f"{prefix}.pt")


def stage_layers(stage: Any) -> range:
    return range(stage.placement.first_layer, stage.placement.last_layer + 1)


@contextlib.contextmanager
def said_in(prefix: Path):
    """Write an error to a file, and go on with it."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        Path(f"{prefix}.error").write_text(str(error))
        raise


def break_stage(model: Any, wrong: str | None) -> None:
    """Make a later stage do something wrong."""
    if wrong == "position":
        model._states = lambda cache, positions: cache.states[
            positions.sequence, (positions.position - 1).clamp(min=0)
        ]
    if wrong == "truncate":
        from nemo_ee.generation.kv_cache import KVCache

        KVCache.truncate = lambda self, sequence, length: None
    run, left = model.own.run, [5]

    def run_and_break(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if wrong == "dies":
                os._exit(7)
            raise ValueError("broken on purpose")
        return run(*arguments)

    if wrong in ("dies", "raises"):
        model.own.run = run_and_break


def break_first(model: Any) -> None:
    """Let the first stage end in the middle of a token."""
    run, left = model.own.run, [5]

    def run_and_die(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os._exit(7)
        return run(*arguments)

    model.own.run = run_and_die


def main(directory: str, request: str, output: str) -> None:
    """Fork the ranks of every layout, one layout after the other."""
    from nemo_ee import cpu_host

    cpu_host.enable()
    import nemo_ee.megatron.decoding.pipelined_decoding  # noqa: F401
    import tests.unit.megatron.test_decoding_adapter  # noqa: F401  (imported once, before the forks)
    from tests.helpers.ranks import run_ranks

    wanted = json.loads(Path(request).read_text())
    for name, (tensor, layers, wrong) in LAYOUTS.items():
        ends_well = wrong in (None, "bf16", "position")
        with contextlib.nullcontext() if ends_well else contextlib.suppress(RuntimeError):
            run_ranks(
                lambda rank, name=name: rank_program(rank, directory, wanted, output, name),
                tensor * len(layers),
                timeout=90,
                log=str(Path(output, name)),
                wait_for_all=not ends_well,
            )


def rank_program(rank: int, directory: str, request: dict[str, Any], output: str, name: str) -> None:
    """`layout_program` where the environment says which rank this is."""
    os.environ["RANK"] = str(rank)
    layout_program(Path(directory), request, Path(output), name)


if __name__ == "__main__":
    main(*sys.argv[1:])
