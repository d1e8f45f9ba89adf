# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Everything that the report on a model's exits says, measured on one text with the runtime.

    text -> windows -> one full-depth pass that evaluates every exit (ExitTrace)
         -> loss, agreement and calibration of every exit
         -> thresholds chosen on the first half of the windows (ThresholdSearch)
         -> their quality on the second half, and their speed on its first tokens, beside full depth

Agreement is with the full model's most likely token at the same position of the given text. A bound is the number of
weights that full depth reads by those that the policy reads (`touched_weights`).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nemo_ee.commands.console import messages
from nemo_ee.evaluation.forced_decoding import (
    excess_nats,
    force,
    measured_costs,
    now,
    policy_of,
    threshold_search,
    touched_costs,
    trace,
)
from nemo_ee.evaluation.touched_weights import CountingModel
from nemo_ee.generation.exit_trace import ExitTrace
from nemo_ee.planning.threshold_search import Choice, ThresholdSearch
from nemo_ee.runtime.model import RuntimeModel
from nemo_ee.text.text_files import is_jsonl, read_document, read_json_lines
from nemo_ee.text.token_view import Detokenizer, TokenText

LIMITS = (0.01, 0.05)  # the perplexity that a policy may lose
FRONTIER = (1.0, 0.9, 0.8, 0.6, 0.4, 0.2)  # one threshold for all exits, as in the paper's Figure 5
BINS = 10
SAMPLE_TOKENS = 300
FULL = "full depth"
WORTH, NOT_WORTH = 1.10, 1.03  # speed at 5 % perplexity: worth it from the first, not worth it below the second


@dataclass(frozen=True)
class Bin:
    """Tokens whose confidence lies in one tenth of its range: their number, mean confidence, and agreement."""

    tokens: int
    confidence: float
    agreement: float


@dataclass(frozen=True)
class ExitRow:
    """One exit, or the full model.

    Attributes:
        name, layer, architecture: of the exit.
        loss: nats per token.
        agreement: share of tokens, 0..1.
        confidence: mean largest probability.
        cost: time of one evaluation over that of a token at full depth.
        bins: calibration.
    """

    name: str
    layer: int
    architecture: str
    loss: float
    agreement: float
    confidence: float
    cost: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class PolicyRow:
    """A policy on the second half of the windows.

    Attributes:
        label: what it is.
        thresholds: exit -> threshold; empty: full depth.
        perplexity: over that of full depth.
        agreement: share of tokens, 0..1.
        depth: mean share of the half layers below the exits.
        expected: speed over full depth that the costs of the parts give.
        bound: weights read at full depth over weights read here, see `touched_weights`.
        measured: speed over full depth in forced decoding; 1.0 by definition where the policy is full depth; None: not
            measured.
    """

    label: str
    thresholds: Mapping[str, float]
    perplexity: float
    agreement: float
    depth: float
    expected: float
    bound: float
    measured: float | None = None


@dataclass(frozen=True)
class ExitReport:
    """The content of the report.

    Attributes:
        exits: rows of the exits; `full_loss`: loss of the full model.
        frontier: one threshold at every exit.
        policies: the fastest within each limit, and their names.
        histogram: exit -> share of tokens that leave there, under the last of `policies`; FULL: the others.
        sample: a text under that policy.
        verdict: (worth it: True, False, or None for little, the sentence).
        facts: what was measured, and where: name -> value.
    """

    exits: tuple[ExitRow, ...]
    full_loss: float
    frontier: tuple[PolicyRow, ...]
    policies: tuple[PolicyRow, ...]
    histogram: Mapping[str, float]
    sample: tuple[TokenText, ...]
    verdict: tuple[bool | None, str]
    facts: Mapping[str, str]


def text_windows(path: Path, tokenizer: Any, size: int, count: int, max_bytes: int | None) -> list[list[int]]:
    """At most `count` windows of `size` tokens in the order of the documents, from as many documents as possible.

    Lines of JSONL hold {"text": ...} or {"messages": [...]}, which the tokenizer's chat template writes.

    Raises:
        ValueError: the file cannot be read, or has less than two windows.
    """
    problems: list[str] = []
    if is_jsonl(path):
        lines = read_json_lines(path, partial(_text_of, tokenizer), problems=problems, max_bytes=max_bytes)
        texts = [text for _, text in lines]
    else:
        texts = [read_document(path, max_bytes)]
    if problems:
        raise ValueError("\n  - ".join([f"{path} cannot be used:", *problems[:20]]))
    tokens: dict[int, list[int]] = {}

    def pieces(index: int, most: int) -> list[list[int]]:
        if index not in tokens:
            tokens[index] = tokenizer(texts[index], add_special_tokens=False)["input_ids"]
        own = tokens[index]
        return [own[first : first + size] for first in range(0, len(own) + 1 - size, size)][:most]

    windows: list[list[int]] = []
    most = -(-count // max(1, len(texts)))  # from one document
    while True:
        before, windows = len(windows), []
        for index in range(len(texts)):
            windows += pieces(index, most)
            if len(windows) >= count:
                return windows[:count]
        if len(windows) == before:
            break
        most *= 2
    if len(windows) < 2:
        raise ValueError(
            f"{path} has {len(windows)} windows of {size} tokens, and at least two are needed, because thresholds are "
            "chosen on one half and measured on the other; a window lies in one document: give longer ones, or a "
            "smaller window_tokens"
        )
    return windows


def _text_of(tokenizer: Any, record: Any) -> str:
    if isinstance(record, Mapping) and isinstance(record.get("text"), str):
        return record["text"]
    if not isinstance(record, Mapping) or not isinstance(record.get("messages"), list):
        raise ValueError('no object with a text in the field "text", or with a list of "messages"')
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError('"messages" need a tokenizer with a chat template; give lines with a "text"')
    try:
        return tokenizer.apply_chat_template(record["messages"], tokenize=False)
    except Exception as problem:  # whatever a template raises
        raise ValueError(f"the chat template fails on these messages: {problem}") from problem


def measure_exits(
    model: RuntimeModel, tokenizer: Any, windows: Sequence[Sequence[int]], measured_tokens: int
) -> ExitReport:
    """Measure a model's exits.

    Args:
        model: a model with exits.
        tokenizer: its tokenizer.
        windows: token ids, at least two windows of the same length.
        measured_tokens: tokens on which speed is measured, at least one window.

    Raises:
        ValueError: the model has no exits.
    """
    if not model.exits:
        raise ValueError("the model has no exits to report on; add some with megatron_gpt_early_exit_convert.py")
    traces = [
        trace(model, [window]) for window in tqdm(windows, "windows", dynamic_ncols=True, file=messages(), leave=False)
    ]
    half = (len(traces) + 1) // 2
    choosing, holding = ExitTrace.join(traces[:half]), ExitTrace.join(traces[half:])
    counting, seconds, weights = CountingModel(model), measured_costs(model), touched_costs(model)
    search = threshold_search(choosing, excess_nats(choosing), seconds)
    held_out = {
        "nats": threshold_search(holding, excess_nats(holding), seconds),
        "differs": threshold_search(holding, differs(holding), seconds),
        "weights": threshold_search(holding, excess_nats(holding), weights),
    }

    def row(label: str, thresholds: Mapping[str, float], measured: float | None = None) -> PolicyRow:
        found = {name: own.at(thresholds) for name, own in held_out.items()}
        return PolicyRow(
            label,
            dict(thresholds),
            math.exp(found["nats"].lost),
            1 - found["differs"].lost,
            found["nats"].depth / (2 * model.num_layers),
            held_out["nats"].full_depth_seconds / found["nats"].seconds,
            held_out["weights"].full_depth_seconds / found["weights"].seconds,
            measured,
        )

    chosen = {f"{limit:.0%}": search.fastest(math.log1p(limit)) for limit in LIMITS}
    timed = windows[half:][: max(1, measured_tokens // len(windows[0]))]
    # A policy without exits is full depth; timing it would show the noise of the machine.
    speeds = measured_speeds(counting, timed, {name: choice for name, choice in chosen.items() if choice.thresholds})
    policies = tuple(
        row(f"perplexity up {name}", choice.thresholds, speeds.get(name, 1.0)) for name, choice in chosen.items()
    )
    names = [point.name for point in model.exits]
    frontier = tuple(
        row(f"{threshold:g}", {} if threshold == 1.0 else dict.fromkeys(names, threshold)) for threshold in FRONTIER
    )
    everything = ExitTrace.join(traces)
    last = policies[-1]
    choices = holding.choices([last.thresholds.get(name, 1.0) for name in names])
    shares = Counter([*names, FULL][index] for index in choices[:, 1:][holding.valid[:, 1:]].tolist())
    sample_tokens = windows[half][: SAMPLE_TOKENS + 1]
    return ExitReport(
        exits=exit_rows(model, everything, search, seconds.heads),
        full_loss=-float(everything.logprobs[..., -1][everything.valid].double().mean()),
        frontier=frontier,
        policies=policies,
        histogram={name: shares[name] / shares.total() for name in [*names, FULL]},
        sample=sample_text(tokenizer, sample_tokens, [[*names, None][index] for index in choices[0].tolist()]),
        verdict=verdict(policies),
        facts={"speed measured on": f"{sum(map(len, timed))} tokens"},
    )


def differs(trace: ExitTrace) -> torch.Tensor:
    """`[n, t, e + 1]`, fp32: 1 where an exit would choose another token than the final exit."""
    return (trace.own_tokens != trace.own_tokens[..., -1:]).float()


def measured_speeds(
    model: CountingModel, windows: Sequence[Sequence[int]], choices: Mapping[str, Choice]
) -> dict[str, float]:
    """Forced decoding under each choice over full depth: sides in turns, the median over the windows."""
    if not choices:
        return {}
    sides = [(FULL, None), *((name, policy_of(choice)) for name, choice in choices.items())]
    for _, policy in sides:  # without measurement
        force(model, windows[0][:8], policy)
    ratios: dict[str, list[float]] = {name: [] for name in choices}
    for window in tqdm(windows, "speed", dynamic_ncols=True, file=messages(), leave=False):
        times = {}
        for name, policy in sides:
            start = now()
            force(model, window, policy)
            times[name] = now() - start
        sides = [*sides[1:], sides[0]]  # none is always the first
        for name in choices:
            ratios[name].append(times[FULL] / times[name])
    return {name: statistics.median(own) for name, own in ratios.items()}


def exit_rows(
    model: RuntimeModel, trace: ExitTrace, search: ThresholdSearch, heads: Mapping[str | None, float]
) -> tuple[ExitRow, ...]:
    """The rows of the exits."""
    architectures = {exit.name: exit.architecture for exit in model.config.exits}
    rows = []
    for index, point in enumerate(trace.exits):
        confidence = trace.confidences[..., index][trace.valid]
        agrees = (trace.own_tokens[..., index] == trace.own_tokens[..., -1])[trace.valid]
        rows.append(
            ExitRow(
                name=point.name,
                layer=point.layer,
                architecture=architectures[point.name],
                loss=-float(trace.logprobs[..., index][trace.valid].double().mean()),
                agreement=float(agrees.double().mean()),
                confidence=float(confidence.double().mean()),
                cost=heads[point.name] / search.full_depth_seconds,
                bins=calibration(confidence, agrees),
            )
        )
    return tuple(rows)


def calibration(confidence: torch.Tensor, agrees: torch.Tensor) -> tuple[Bin, ...]:
    """Agreement by confidence, in tenths; empty tenths are left out. Both `[n]`."""
    place = (confidence * BINS).long().clamp_(0, BINS - 1)
    bins = []
    for index in range(BINS):
        here = place == index
        if here.any():
            bins.append(Bin(int(here.sum()), float(confidence[here].mean()), float(agrees[here].double().mean())))
    return tuple(bins)


def sample_text(tokenizer: Any, tokens: Sequence[int], exits: Sequence[str | None]) -> tuple[TokenText, ...]:
    """The text of a window, with the exit that predicts each token; the first token is given.

    Args:
        exits: of each token after the first.
    """
    detokenizer = Detokenizer(tokenizer.decode)
    texts = [detokenizer.push(token, last=index == len(tokens) - 1) for index, token in enumerate(tokens)]
    return tuple(TokenText(text, exit) for text, exit in zip(texts, [None, *exits], strict=False))


def verdict(policies: Sequence[PolicyRow]) -> tuple[bool | None, str]:
    """Whether the exits pay, from the fastest policy that keeps the largest of `LIMITS` on the second half too."""
    kept = [one for one in policies if one.perplexity <= 1 + LIMITS[-1]]
    if not kept:
        return False, (
            f"Not worth it. No policy that kept {LIMITS[-1]:.0%} of perplexity on one half of the text keeps it on "
            "the other; give more text (max_windows)."
        )
    policy = max(kept, key=lambda one: one.measured or one.expected)
    speed = policy.measured or policy.expected
    numbers = (
        f"At {policy.perplexity - 1:+.1%} perplexity on held-out text, decoding one sequence is {speed:.2f} times as "
        f"fast as at full depth (bound {policy.bound:.2f}); {policy.agreement:.0%} of the tokens are the full "
        f"model's, and tokens leave after {policy.depth:.0%} of the layers on average."
    )
    if speed >= WORTH:
        return True, f"Worth it. {numbers}"
    if speed >= NOT_WORTH:
        return None, f"Little to gain. {numbers}"
    why = (
        "No exit saves more than its evaluation costs: few tokens are certain early, or a head costs too much beside "
        "the layers that it would save."
    )
    return False, f"Not worth it. {numbers} {'' if policy.thresholds else why}".strip()
