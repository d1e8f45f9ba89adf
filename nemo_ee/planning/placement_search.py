# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Where exits would pay, before any is tuned: a cheap probe at every layer, and the search for thresholds over them.

A probe stands for a tuned exit. It is the linear map from the hidden state after k layers to the one after all layers
with the least squared error on one part of a text (a "tuned lens", arXiv 2303.08112, fitted in closed form), in front
of the backbone's own norm and output:

    probe_k(x) = W_k x + b_k,   W_k, b_k = argmin sum |W x + b - y|^2 + ridge |W - I|^2

With little text W_k stays near the identity, and the probe is the logit lens. On a second part of the text the probes
give what `ThresholdSearch` needs, with every layer as a candidate for an exit; a third part says what the thresholds
found give on other text.

An `mlp` exit taps layer k in front of its MLP and runs an MLP of its own: as much work as a `norm` exit for a token
that leaves, one MLP more for a token that goes on. Its probe is that of the `norm` exit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from nemo_ee.planning.threshold_search import DecodingCosts, ThresholdSearch

RIDGE = 0.01  # of the inputs' mean square (of the median token: some have huge hidden states), times their number
FEWEST_TOKENS = 256  # to fit on; with fewer the probes say little


@dataclasses.dataclass(frozen=True)
class ProbeTable:
    """What the probes do at n tokens, c candidate layers.

    Attributes:
        layers: the candidates, ascending; 1 <= k < number of layers.
        num_layers: layers of the model.
        confidences: criterion -> `[n, c]`, fp32, in 0..1, higher is more certain.
        nats: `[n, c + 1]`, fp64, -ln p of the next token above that of the full model, which is the last.
        differs: `[n, c + 1]`, fp32, 1 where the most likely token is not the full model's.
    """

    layers: tuple[int, ...]
    num_layers: int
    confidences: Mapping[str, Tensor]
    nats: Tensor
    differs: Tensor

    def rows(self, part: slice) -> ProbeTable:
        """Some of the tokens."""
        confidences = {name: own[part] for name, own in self.confidences.items()}
        return dataclasses.replace(self, confidences=confidences, nats=self.nats[part], differs=self.differs[part])

    @property
    def agreement(self) -> dict[int, float]:
        """Layer -> share of tokens at which the probe agrees with the full model."""
        means = 1 - self.differs.double().mean(0)
        return dict(zip(self.layers, means.tolist(), strict=False))


@dataclasses.dataclass(frozen=True)
class Placement:
    """A set of exits with thresholds, and what it gives on text that did not choose them.

    Attributes:
        architecture: architecture of the exits, `norm` or `mlp`.
        criterion: criterion of the confidence.
        thresholds: layer -> threshold in the criterion's own unit.
        perplexity: over that of full depth.
        agreement: share of tokens, 0..1.
        depth: mean share of the layers that run before a token leaves.
        speed: over full depth, one sequence at a time.
        bound: weights that full depth reads over those that this reads.
    """

    architecture: str
    criterion: str
    thresholds: Mapping[int, float]
    perplexity: float
    agreement: float
    depth: float
    speed: float
    bound: float


def check_tokens(count: int, width: int) -> None:
    """Raises ValueError if so many tokens are too few for a probe of a hidden state of this width."""
    if count < FEWEST_TOKENS:
        raise ValueError(
            f"{count} tokens are too few to fit a probe on; give at least {FEWEST_TOKENS}, better {4 * width} (four "
            "times the hidden size)"
        )


def fit_probe(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The probe of one layer: (W^T `[h, h]`, b `[h]`), fp32.

    Args:
        inputs, targets: `[n, h]`, hidden states after the layer and after all layers.

    Raises:
        ValueError: too few tokens.
    """
    check_tokens(*inputs.shape)
    x, y = inputs.double(), targets.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    ridge = RIDGE * len(x) * x.square().mean(1).median()
    gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.T @ y + ridge * torch.eye(x.shape[1], dtype=x.dtype))
    return weight.float(), (mean_y - mean_x @ weight).float()


def placements(
    choosing: ProbeTable,
    holding: ProbeTable,
    costs: DecodingCosts,
    weights: DecodingCosts,
    *,
    architecture: str,
    limits: Sequence[float],
    most_exits: Sequence[int],
) -> list[Placement]:
    """The best placement for each criterion, limit and number of exits, without those that another one beats.

    Args:
        choosing, holding: the probes on the tokens that choose, and on others.
        costs: times of the model's parts; `heads[None]` is that of every exit's output.
        weights: weights that the parts read, for the bound.
        architecture: architecture of the exits, `norm` or `mlp`.
        limits: perplexities to lose on the tokens that choose, such as 0.01.
        most_exits: numbers of exits.
    """
    has_mlp = architecture == "mlp"
    names = [str(layer) for layer in choosing.layers]
    end = 2 * choosing.num_layers
    stops = [*(2 * layer - has_mlp for layer in choosing.layers), end]

    def search(table: ProbeTable, criterion: str, losses: Tensor, parts: DecodingCosts) -> ThresholdSearch:
        own = parts.heads[None] + has_mlp * parts.mlp
        heads = {**dict.fromkeys(names, own), None: parts.heads[None]}
        return ThresholdSearch(
            names, stops, table.confidences[criterion], losses, dataclasses.replace(parts, heads=heads)
        )

    found = []
    for criterion in choosing.confidences:
        by_time = search(choosing, criterion, choosing.nats, costs)
        nats, differs, reads = (
            search(holding, criterion, losses, parts)
            for losses, parts in ((holding.nats, costs), (holding.differs, costs), (holding.nats, weights))
        )
        for limit, count in itertools.product(limits, most_exits):
            thresholds = by_time.fastest(math.log1p(limit), count).thresholds
            own = nats.at(thresholds)
            placement = Placement(
                architecture=architecture,
                criterion=criterion,
                thresholds={int(name): _in_unit(value, criterion) for name, value in thresholds.items()},
                perplexity=math.exp(own.lost),
                agreement=1 - differs.at(thresholds).lost,
                depth=own.depth / end,
                speed=nats.full_depth_seconds / own.seconds,
                bound=reads.full_depth_seconds / reads.at(thresholds).seconds,
            )
            found.append(placement)
    return pareto(found)


def _in_unit(certainty: float, criterion: str) -> float:
    """A threshold in 0..1 (`ProbeTable.confidences`) in the criterion's own unit; entropy is there as exp(-nats)."""
    return -math.log(certainty) if criterion == "entropy" else certainty


def pareto(placements: Iterable[Placement]) -> list[Placement]:
    """Those that no other beats in speed and perplexity, or equals with fewer exits; the slowest first."""
    ordered = sorted(placements, key=lambda one: (-one.speed, one.perplexity, len(one.thresholds)))
    kept: list[Placement] = []
    for one in ordered:
        if not kept or one.perplexity < kept[-1].perplexity:
            kept.append(one)
    return kept[::-1]
