# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Time of the decoding engine itself for a token, with a model whose segments and heads return at once.

    python benchmarks/engine_overhead.py --json engine.json       # about a minute

`<case>_us` is the microseconds of `DecodingSession.step` for each token of a sequence, one torch thread, vocabulary
4096; softmax, argmax and ln p of the logits are in it. `plain_loop_us` is the time of a token in a bare PyTorch loop
over the reference model on the same thread, measured in turn with the cases; `<case>_share` is the ratio of the two.
Medians over the rounds; target: a share of at most 0.10.
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

from benchmarks.measure import median_of_ratios, provenance
from benchmarks.plain_decoding import PlainDecoder
from nemo_ee.generation.decoding_model import DecodingModel, ExitPoint
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request

VOCABULARY, LONGEST, TARGET = 4096, 4096, 0.10
EXITS = tuple(ExitPoint(f"layer{k}", k, 2 * k - 1) for k in (3, 6, 9))


class Nothing(DecodingModel):
    """A `DecodingModel` and its cache that compute nothing. `passing`: exits whose confidence passes the threshold."""

    num_layers, vocab_size, max_positions, exits = 12, VOCABULARY, LONGEST, EXITS

    def __init__(self, passing: frozenset[str | None]) -> None:
        self.passing, self.hidden = passing, torch.zeros(LONGEST, 8)
        self.flat_logits = torch.randn(16, VOCABULARY, generator=torch.Generator().manual_seed(0))
        self.peaked_logits = self.flat_logits.clone()
        self.peaked_logits[:, 5] += 20.0

    def new_cache(self, *sizes: Any) -> Nothing:
        """The model itself."""
        return self

    def truncate(self, sequence: int, length: int) -> None:
        """Does nothing."""

    def embed(self, tokens: torch.Tensor, positions: Any) -> torch.Tensor:
        """Zeros."""
        return self.hidden[: tokens.shape[0]]

    def run(self, hidden: torch.Tensor, *segment: Any) -> torch.Tensor:
        """The hidden states unchanged."""
        return hidden

    def write_exit_kv(self, *call: Any) -> None:
        """Does nothing."""

    def exit_logits(self, name: str | None, hidden: torch.Tensor, positions: Any, cache: Any) -> torch.Tensor:
        """Constant logits."""
        return (self.peaked_logits if name in self.passing else self.flat_logits)[: hidden.shape[0]]


SHORT, LONG = (3,), (3500,)  # tokens of each sequence's prompt
# name -> (exits that pass the threshold, prompts, how `start` is called)
CASES: dict[str, tuple[tuple[str | None, ...], tuple[int, ...], dict[str, Any]]] = {
    "full": ((None,), SHORT, {"mode": "full"}),
    "static_depth": (("layer6",), SHORT, {"mode": "static_depth", "policy": ExitPolicy(1.0, active=("layer6",))}),
    "early_exit_no_exit_passes": ((), SHORT, {"policy": ExitPolicy(0.9)}),
    "early_exit_first_exit_passes": ((None, "layer3"), SHORT, {"policy": ExitPolicy(0.9, max_pending_tokens=8)}),
    "early_exit_last_exit_passes": ((None, "layer9"), SHORT, {"policy": ExitPolicy(0.9, max_pending_tokens=8)}),
    "self_speculative": (
        (None, "layer3"), SHORT, {"mode": "self_speculative", "policy": ExitPolicy(0.9, num_draft_tokens=4)},
    ),
    "early_exit_batch_8": ((None, "layer3"), SHORT * 8, {"policy": ExitPolicy(0.9, max_pending_tokens=8)}),
    # The time must not grow with the length of the text.
    "early_exit_long_context": ((None, "layer3"), LONG, {"policy": ExitPolicy(0.9, max_pending_tokens=8)}),
    "self_speculative_long_context": (
        (None, "layer3"), LONG, {"mode": "self_speculative", "policy": ExitPolicy(0.9, num_draft_tokens=4)},
    ),
}  # fmt: skip


def microseconds(case: str, num_tokens: int) -> float:
    """Microseconds per token of a sequence, without the prompt's step."""
    passing, prompts, call = CASES[case]
    requests = [Request((1,) * own, num_tokens) for own in prompts]
    session = EarlyExitEngine(Nothing(frozenset(passing))).start(requests, **call)
    session.step()
    started, count = time.perf_counter(), 0
    while not session.finished:
        count += len(session.step())
    return (time.perf_counter() - started) / count * 1e6


def plain_microseconds(decoder: PlainDecoder, num_tokens: int) -> float:
    """Microseconds per token, after a prompt of three tokens."""
    token = decoder.next_token((1, 2, 3), 0)
    started = time.perf_counter()
    for position in range(3, 3 + num_tokens):
        token = decoder.next_token((token,), position)
    return (time.perf_counter() - started) / num_tokens * 1e6


def main() -> None:
    """Time every case in turn, print and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the numbers, one flat object")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # few tokens, for tests only
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, num_tokens = (2, 8) if options.quick else (9, 400)
    result: dict[str, Any] = {**provenance(), "vocab_size": VOCABULARY, "new_tokens": num_tokens, "rounds": rounds}
    print(", ".join(f"{key}={value}" for key, value in result.items()), flush=True)
    times: dict[str, list[float]] = {"plain_loop": []} | {case: [] for case in CASES}
    decoder = PlainDecoder()
    for turn in range(rounds + 1):  # the first round warms up
        for case, own in times.items():
            spent = microseconds(case, num_tokens) if case in CASES else plain_microseconds(decoder, num_tokens)
            own += [spent] * (turn > 0)
    for case, own in times.items():
        result[f"{case}_us"] = round(statistics.median(own), 1)
    print(f"plain_loop_us {result['plain_loop_us']:.1f}")
    for case in CASES:
        result[f"{case}_share"] = round(median_of_ratios(times[case], times["plain_loop"]), 4)
        share = f"{100 * result[f'{case}_share']:.1f} % of plain_loop, target {TARGET:.0%}"
        print(f"{case}_us {result[f'{case}_us']:.1f} ({share})")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
