# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Checking drafted tokens against the full model, so that what is kept is the full model's own output.

Greedy: a draft stays iff it is the full model's most likely token. Sampled (Leviathan et al., arXiv 2211.17192,
algorithm 1), with q the distribution a draft x was drawn from and p the full model's, both shaped alike:

    x stays with probability min(1, p(x) / q(x)); else the token is drawn from max(0, p - q) / sum max(0, p - q)

so that a token is distributed as p whatever q is. The first draft that does not stay ends the check: the drafts after
it followed a token that is not there. Drafting, accepting and redrawing have random numbers of their own at each
position; after a cut a position is drafted again with the same number, which the tokens before it never depended on.
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
        exit, layer, confidence: of the exit it comes from, as in a reading.
        distribution: `[v]`, fp64, q, which it was drawn from; None when it was chosen greedily.
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
    """The full model's tokens in place of drafts, up to the first that differs.

    Args:
        logits: `[m, v]`, the full model's for the places of the drafts; m >= len(drafts).
        drafts: in order, at least one.
        params: of the sequence.
        position: of the first draft in its sequence.
        previous: the sequence's tokens before it; () where no penalty looks at them.
        num_prompt: how many of these tokens are the prompt.

    Yields:
        (token, whether it is the draft).
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
    # Rejected although p and q differ by rounding alone: then p itself is as good.
    return draw(rest if float(rest.sum()) > 0.0 else p, uniform(params.seed, position, "redraw"))
