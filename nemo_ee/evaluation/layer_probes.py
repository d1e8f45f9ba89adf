# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Search for the placement of exits on a model without exits: one full-depth pass with probes, and a verdict.

text -> windows -> hidden states after every layer (one pass)
     -> a probe for each layer, fitted on the first half of the windows (nemo_ee.planning.placement_search)
     -> placements chosen on the next quarter, with the times of the model's parts
     -> what they give on the last quarter
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nemo_ee.commands.console import messages
from nemo_ee.evaluation.exit_report import NOT_WORTH, WORTH
from nemo_ee.evaluation.forced_decoding import measured_costs, touched_costs
from nemo_ee.evaluation.report import format_table
from nemo_ee.evaluation.text_settings import VERDICT_AT, PlacementSettings
from nemo_ee.exits.confidence import confidence
from nemo_ee.exits.criteria import OF_LOGITS
from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.generation.teacher_forcing import TeacherForcedPass
from nemo_ee.planning.placement_search import Placement, ProbeTable, check_tokens, fit_probe, placements
from nemo_ee.planning.threshold_search import DecodingCosts
from nemo_ee.runtime.model import RuntimeModel

ROWS = 256  # tokens whose logits are formed at a time
FEWEST_WINDOWS = 4


@torch.inference_mode()
def probe_tables(model: RuntimeModel, windows: Sequence[Sequence[int]]) -> tuple[ProbeTable, ProbeTable]:
    """Run the text once, fit a probe for each layer but the last on the first half of the windows, and evaluate the
    probes on the next quarter and on the last one.

    The first token of a window is left out: a decoded text's first token comes from the final exit, and in many models
    its hidden state is far larger than all others.

    Args:
        windows: token ids, at least four windows of the same length.

    Raises:
        ValueError: too few windows, or too few tokens to fit on.
    """
    if len(windows) < FEWEST_WINDOWS:
        raise ValueError(
            f"{len(windows)} windows of {len(windows[0])} tokens are too few, at least {FEWEST_WINDOWS} are needed; "
            "give more text, or raise max_windows"
        )
    num_layers, per_window, width = model.num_layers, len(windows[0]) - 2, model.architecture.hidden_size
    fitted, chosen = len(windows) // 2 * per_window, len(windows) * 3 // 4 * per_window
    check_tokens(fitted, width)
    hidden = torch.empty(num_layers, len(windows) * per_window, width)
    shown = tqdm(windows, "windows", dynamic_ncols=True, file=messages(), leave=False)
    for index, window in enumerate(shown):
        text = TeacherForcedPass(model, [window], ())
        rows = slice(index * per_window, (index + 1) * per_window)
        for stop in text.run_to({2 * layer for layer in range(1, num_layers + 1)}):
            hidden[stop // 2 - 1, rows] = text.hidden[1:].float()
    targets = torch.tensor([token for window in windows for token in window[2:]])[fitted:]
    layers = tuple(range(1, num_layers))
    evaluated = []
    for layer in tqdm([*layers, num_layers], "probes", dynamic_ncols=True, file=messages(), leave=False):
        rows = hidden[layer - 1, fitted:]
        if layer < num_layers:
            weight, bias = fit_probe(hidden[layer - 1, :fitted], hidden[-1, :fitted])
            rows = rows @ weight + bias
        evaluated.append(_evaluate(model, rows, targets))
    logprobs, tokens = (torch.stack([one[index] for one in evaluated], 1) for index in (1, 2))
    table = ProbeTable(
        layers=layers,
        num_layers=num_layers,
        confidences={name: torch.stack([one[0][name] for one in evaluated[:-1]], 1) for name in OF_LOGITS},
        nats=(logprobs[:, -1:] - logprobs).double(),
        differs=(tokens != tokens[:, -1:]).float(),
    )
    return table.rows(slice(0, chosen - fitted)), table.rows(slice(chosen - fitted, None))


def _evaluate(model: RuntimeModel, hidden: Tensor, targets: Tensor) -> tuple[Mapping[str, Tensor], Tensor, Tensor]:
    """(confidences, ln p of the next token, most likely token) of the final exit on `hidden`, `[n, h]`."""
    # The final exit looks at neither.
    positions, cache = TokenPositions.of({0: range(1)}), model.new_cache(1, 1, ())
    confidences: dict[str, list[Tensor]] = {name: [] for name in OF_LOGITS}
    logprobs, tokens = [], []
    for rows, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        logits = model.exit_logits(None, rows.to(model.dtype), positions, cache)
        for name in OF_LOGITS:
            value = confidence(logits, name)
            confidences[name].append(torch.exp(-value) if name == "entropy" else value)
        logprobs.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0])
        tokens.append(logits.argmax(-1))
    return {name: torch.cat(values) for name, values in confidences.items()}, torch.cat(logprobs), torch.cat(tokens)


def place(
    model: RuntimeModel, windows: Sequence[Sequence[int]], settings: PlacementSettings
) -> tuple[ProbeTable, DecodingCosts, list[Placement]]:
    """The probes on the last quarter of the windows, the costs, and the placements that no other beats."""
    choosing, holding = probe_tables(model, windows)
    measured, given = measured_costs(model), settings.costs
    half = given.half or measured.mlp
    costs = DecodingCosts(half, half, given.row or measured.row, {None: given.head or measured.heads[None]})
    found = placements(
        choosing,
        holding,
        costs,
        touched_costs(model),
        architecture=settings.architecture,
        limits=sorted({*settings.limits, VERDICT_AT}),
        most_exits=settings.most_exits,
    )
    return holding, costs, found


def fastest_within(found: Sequence[Placement]) -> Placement | None:
    """The fastest placement with exits that keeps the verdict's limit."""
    within = [one for one in found if one.perplexity <= 1 + VERDICT_AT and one.thresholds]
    return max(within, key=lambda one: one.speed, default=None)


def verdict(found: Sequence[Placement], table: ProbeTable, costs: DecodingCosts) -> tuple[bool | None, str]:
    """Whether exits are worth tuning, with the numbers behind it."""
    best = fastest_within(found)
    token = table.num_layers * (costs.attention + costs.mlp) + costs.heads[None]
    deepest = max(table.agreement.items(), key=lambda item: item[1])
    head, halfway = costs.heads[None] / token, table.agreement[max(1, table.num_layers // 2)]
    numbers = (
        f"One output layer costs {head:.0%} of a token ({costs.heads[None] / (costs.attention + costs.mlp):.1f} "
        f"layers). The probes agree with the full model on {halfway:.0%} of the tokens after half of the layers, and "
        f"on {deepest[1]:.0%} after layer {deepest[0]}."
    )
    if best is None:
        return False, f"Not worth it: no placement within {VERDICT_AT:.0%} of perplexity is faster. {numbers}"
    expected = f"{best.speed:.2f} times the speed at {best.perplexity - 1:+.1%} perplexity (bound {best.bound:.2f})"
    if best.speed >= WORTH:
        return True, f"Worth it: {expected}. {numbers}"
    if best.speed >= NOT_WORTH:
        return None, f"Little to gain: {expected}. {numbers}"
    return False, f"Not worth it: {expected}. {numbers}"


def thresholds_text(placement: Placement) -> str:
    """`15 above 0.9, 20 above 0.6`, or with entropy `15 below 0.11 nats`."""
    form = "{} below {:.2f} nats" if placement.criterion == "entropy" else "{} above {:g}"
    return ", ".join(form.format(layer, value) for layer, value in placement.thresholds.items()) or "full depth"


def exits_override(placement: Placement) -> str:
    """The exits of a placement as a setting of the conversion."""
    rows = (f"{{layer: {layer}, architecture: {placement.architecture}}}" for layer in placement.thresholds)
    return f"'model.early_exit.exits=[{', '.join(rows)}]'"


def placement_table(found: Sequence[Placement]) -> str:
    """The placements as a text table."""
    rows = [("exits after layer", "criterion", "perplexity", "agreement", "depth", "speed", "bound")]
    for one in found:
        numbers = (f"{one.perplexity:.3f}x", f"{one.agreement:.1%}", f"{one.depth:.0%}", f"{one.speed:.2f}x")
        rows.append((thresholds_text(one), one.criterion, *numbers, f"{one.bound:.2f}x"))
    return format_table(rows)


def to_mapping(table: ProbeTable, costs: DecodingCosts, found: Sequence[Placement], text: str) -> dict[str, Any]:
    """For JSON: {verdict, agreement: {layer: share}, costs: {half, row, head}, placements: [...]}."""
    return {
        "verdict": text,
        "agreement": table.agreement,
        "costs": {"half": costs.mlp, "row": costs.row, "head": costs.heads[None]},
        "placements": [{**dataclasses.asdict(one), "exits": thresholds_text(one)} for one in found],
    }
