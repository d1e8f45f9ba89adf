# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Decode on two tensor-parallel gloo ranks and write what each of them saw.

python -m tests.unit.megatron.decode_as_rank <Hugging Face directory> <file with the request> <output prefix>
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any


def decode(directory: Path, request: dict[str, Any]) -> list[list[Any]]:
    """[sequence, position, token, exit, confidence] of every token, mode after mode, on the layout that is set up; in
    each mode by the largest probability, then by probes."""
    from nemo_ee.generation.policy import ExitPolicy
    from nemo_ee.generation.sampling import SamplingParams
    from tests.helpers.stub_models import random_probes
    from tests.unit.megatron.test_decoding_adapter import build, engine_of

    engine = engine_of(build(directory, request["exits"], drawn=False))
    model, events = engine.model, []
    model.exits = random_probes(model.exits, model.model.config.hidden_size, seed=1)
    policies = [ExitPolicy(request["thresholds"]), ExitPolicy(0.5, criterion="probe")]
    for mode, policy in product(request["modes"], policies):
        result = engine.generate(
            request["prompts"],
            max_new_tokens=request["max_new_tokens"],
            mode=mode,
            policy=policy,
            sampling=SamplingParams(**request["sampling"]),
        )
        events += [[one.sequence, one.position, one.token, one.exit, one.confidence] for one in result.events]
    return events


def main(directory: str, request: str, output: str) -> None:
    """Fork two ranks; rank r writes `<output>.<r>.json`."""
    from nemo_ee import cpu_host

    cpu_host.enable()
    import torch
    from megatron.core import parallel_state, tensor_parallel

    import tests.unit.megatron.test_decoding_adapter  # noqa: F401  (imported once, before the fork)
    from tests.helpers.ranks import run_ranks

    def rank_program(rank: int) -> None:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        events = decode(Path(directory), json.loads(Path(request).read_text()))
        Path(f"{output}.{rank}.json").write_text(json.dumps(events))

    run_ranks(rank_program, 2, timeout=120, log=output)


if __name__ == "__main__":
    main(*sys.argv[1:])
