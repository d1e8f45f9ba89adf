# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What the decoding engine itself costs for a token: a model whose segments and heads return at once.

    python benchmarks/engine_overhead.py --json engine.json       # about half a minute

`<case>_us` is the microseconds of `DecodingSession.step` for each token of a sequence, one torch thread, vocabulary
4096, median over the rounds; softmax, argmax and ln p of the logits are in it. Beside it stands its share of 3,300 us,
what a plain PyTorch loop takes for a token of the reference model on one thread; target at most 10 %.

May import: torch, `nemo_ee.generation`, `benchmarks.measure`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # isort: skip  # after the path is set

from benchmarks.measure import provenance
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.items import ExitPoint
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request

VOCABULARY, TOKEN_US, TARGET = 4096, 3300.0, 0.10
EXITS = tuple(ExitPoint(f"layer{k}", k, 2 * k - 1) for k in (3, 6, 9))


class Nothing:
    """A `DecodingModel` and its cache that compute nothing. `sure`: the exits that are."""

    num_layers, vocab_size, max_positions, exits = 12, VOCABULARY, 4096, EXITS

    def __init__(self, sure: frozenset[str | None]) -> None:
        self.sure, self.hidden = sure, torch.zeros(256, 8)
        self.unsure_logits = torch.randn(256, VOCABULARY, generator=torch.Generator().manual_seed(0))
        self.sure_logits = self.unsure_logits.clone()
        self.sure_logits[:, 5] += 20.0

    def new_cache(self, *sizes: Any) -> Nothing:
        """Itself."""
        return self

    def truncate(self, sequence: int, length: int) -> None:
        """Nothing is kept."""

    def embed(self, tokens: torch.Tensor, items: Any) -> torch.Tensor:
        """Zeros."""
        return self.hidden[: tokens.shape[0]]

    def run(self, hidden: torch.Tensor, *segment: Any) -> torch.Tensor:
        """What it is given."""
        return hidden

    def observe_exit(self, *call: Any) -> None:
        """Nothing."""

    def exit_logits(self, name: str | None, hidden: torch.Tensor, items: Any, cache: Any) -> torch.Tensor:
        """Always the same."""
        return (self.sure_logits if name in self.sure else self.unsure_logits)[: hidden.shape[0]]


# name -> (exits that are sure, sequences together, how `start` is called)
CASES: dict[str, tuple[tuple[str | None, ...], int, dict[str, Any]]] = {
    "full": ((None,), 1, {"mode": "full"}),
    "static_depth": (("layer6",), 1, {"mode": "static_depth", "policy": ExitPolicy(1.0, active=("layer6",))}),
    "early_exit_never_sure": ((), 1, {"policy": ExitPolicy(0.9)}),
    "early_exit_sure_at_first": ((None, "layer3"), 1, {"policy": ExitPolicy(0.9, max_waiting=8)}),
    "early_exit_sure_at_last": ((None, "layer9"), 1, {"policy": ExitPolicy(0.9, max_waiting=8)}),
    "self_speculative": (
        (None, "layer3"), 1, {"mode": "self_speculative", "policy": ExitPolicy(0.9, max_waiting=4)},
    ),
    "early_exit_batch_8": ((None, "layer3"), 8, {"policy": ExitPolicy(0.9, max_waiting=8)}),
}  # fmt: skip


def microseconds(case: str, num_tokens: int) -> float:
    """Per token of a sequence, the prompt's step left out."""
    sure, batch, call = CASES[case]
    requests = [Request((1, 2, 3), num_tokens) for _ in range(batch)]
    session = EarlyExitEngine(Nothing(frozenset(sure))).start(requests, **call)
    session.step()
    started, count = time.perf_counter(), 0
    while not session.finished:
        count += len(session.step())
    return (time.perf_counter() - started) / count * 1e6


def main() -> None:
    """Time every case in turn, print and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the numbers, one flat object")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # few tokens: the numbers mean nothing
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, num_tokens = (2, 8) if options.quick else (9, 400)
    result: dict[str, Any] = {**provenance(), "vocab_size": VOCABULARY, "new_tokens": num_tokens, "rounds": rounds}
    print(", ".join(f"{key}={value}" for key, value in result.items()), flush=True)
    times: dict[str, list[float]] = {case: [] for case in CASES}
    for turn in range(rounds + 1):  # the first round warms up
        for case, own in times.items():
            own += [microseconds(case, num_tokens)] * (turn > 0)
    for case, own in times.items():
        result[f"{case}_us"] = round(statistics.median(own), 1)
        share = result[f"{case}_us"] / TOKEN_US
        print(f"{case}_us {result[f'{case}_us']:.1f} ({100 * share:.1f} % of {TOKEN_US:.0f} us, target {TARGET:.0%})")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
