# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Verification of drafts by the full model, so that the output is the full model's own.

Greedy: a draft is accepted iff it is the full model's most likely token. Sampled (Leviathan et al., arXiv 2211.17192,
algorithm 1), with q the distribution that draft x was drawn from and p the full model's, both shaped alike:

    accept x with probability min(1, p(x) / q(x)); else draw the token from max(0, p - q) / sum max(0, p - q)

so the token is distributed as p for every q. Verification ends at the first rejected draft, because later drafts
followed a token that is not in the output. Drafting, accepting and redrawing use separate random numbers at each
position; after a rejection a position is drafted again with the same number, which does not depend on earlier tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import Tensor

from nemo_ee.generation.sampling import SamplingParams, accepts, distribution, draw, penalised, uniform


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """A token that an early exit proposed.

    Attributes:
        token: its id.
        exit, layer, confidence: the exit that proposed it, see `ExitOutput`.
        distribution: `[v]`, fp64, the distribution q it was drawn from; None if it was chosen greedily.
    """

    token: int
    exit: str | None
    layer: int
    confidence: float
    distribution: Tensor | None


def verify(
    logits: Tensor,
    drafts: Sequence[Draft],
    params: SamplingParams,
    position: int,
    previous: Sequence[int],
    num_prompt: int = 0,
) -> Iterator[tuple[int, bool]]:
    """The full model's tokens in place of the drafts, up to the first rejected one.

    Args:
        logits: `[m, v]`, the full model's logits for the drafted tokens; m >= len(drafts).
        drafts: in order, at least one.
        params: the sequence's sampling parameters.
        position: position of the first draft in its sequence.
        previous: the sequence's tokens before it; may be () without a penalty.
        num_prompt: number of these tokens that are the prompt.

    Yields:
        (token, whether the draft is accepted).
    """
    tokens = list(previous)
    best: Sequence[int] = ()
    if params.takes_the_most_likely:
        best = logits[: len(drafts)].argmax(dim=-1).tolist()
    for row, draft in enumerate(drafts):
        if best:
            token = best[row]
        elif params.greedy:
            token = int(penalised(logits[row], params, tokens, num_prompt).argmax())
        else:
            token = _accept_or_redraw(logits[row], draft, params, position + row, tokens, num_prompt)
        yield token, token == draft.token
        if token != draft.token:
            return
        tokens.append(token)


def _accept_or_redraw(
    logits: Tensor, draft: Draft, params: SamplingParams, position: int, previous: Sequence[int], num_prompt: int
) -> int:
    p, q = distribution(logits, params, previous, num_prompt), draft.distribution
    if accepts(float(p[draft.token] / q[draft.token]), uniform(params.seed, position, "accept")):
        return draft.token
    rest = (p - q).clamp(min=0.0)
    # Rejected although p and q differ only by rounding: draw from p itself.
    return draw(rest if float(rest.sum()) > 0.0 else p, uniform(params.seed, position, "redraw"))
