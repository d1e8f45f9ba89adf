# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token: the most likely one, or a draw from the shaped distribution.

Logits are shaped in vLLM's order: bias, repetition penalty (Keskar et al., CTRL, arXiv 1909.05858, section 4.1),
frequency and presence penalty (OpenAI's), temperature, min-p (Nguyen et al., arXiv 2407.01082), top-k, top-p (Holtzman
et al., arXiv 1904.09751). A random number is a hash of (seed, position, purpose), so it never depends on a batch
neighbour, on the order of work, or on the device.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import LongTensor, Tensor

from nemo_ee.generation.decoding_model import TokenPositions

_NUCLEUS = 1024  # tokens looked through for top-p before the whole vocabulary is


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Parameters for choosing the next token.

    Attributes:
        greedy: take the most likely token; temperature, top_k, top_p, min_p and seed are then not used.
        temperature: divides the logits, > 0.
        top_k: keep the k most likely tokens; None = all.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least this, in (0, 1].
        repetition_penalty: logits of tokens already in the sequence are divided (if positive) or multiplied (if
            negative) by this, > 0; 1.0 = none.
        seed: random seed of this sequence, at least 0.
        min_p: keep the tokens whose probability is at least this share of the most likely one's, in [0, 1]; 0 = all.
        presence_penalty: subtracted from the logits of tokens in the answer so far; 0 = none.
        frequency_penalty: subtracted once for each time a token is in the answer so far; 0 = none.
        logit_bias: (token id, number to add to its logit) pairs, each id once.

    Raises:
        ValueError: with every problem.
    """

    greedy: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        problems = []
        for key in ("temperature", "repetition_penalty"):
            value = getattr(self, key)
            if not _is_number(value) or value <= 0:
                way_out = "; for the most likely token set greedy=True" if key == "temperature" else "; 1.0 = none"
                problems.append(f"{key} = {value!r} must be a finite number above 0{way_out}")
        if self.top_k is not None and (not _is_whole(self.top_k) or self.top_k < 1):
            problems.append(f"top_k = {self.top_k!r} must be a whole number from 1; None keeps every token")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            problems.append(f"top_p = {self.top_p!r} must be above 0 and at most 1; 1.0 keeps every token")
        if not _is_whole(self.seed) or self.seed < 0:
            problems.append(f"seed = {self.seed!r} must be a whole number from 0")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            problems.append(f"min_p = {self.min_p!r} must be from 0 to 1; 0 keeps every token")
        for key in ("presence_penalty", "frequency_penalty"):
            if not _is_number(getattr(self, key)):
                problems.append(f"{key} = {getattr(self, key)!r} must be a finite number; 0 = none")
        bad = [pair for pair in self.logit_bias if not (_is_whole(pair[0]) and pair[0] >= 0 and _is_number(pair[1]))]
        if bad or len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            shown = repr(bad[0]) if bad else "a token twice"
            problems.append(f"logit_bias holds {shown}; it must hold (token id, finite number) pairs, each id once")
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))

    @property
    def takes_the_most_likely(self) -> bool:
        """Whether the token of the largest raw logit is chosen, whatever came before and whatever the seed."""
        return self.greedy and not self.logit_bias and not self.looks_back

    @property
    def looks_back(self) -> bool:
        """Whether the choice of a token depends on the tokens before it (beyond the logits)."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


GREEDY = SamplingParams()


def uniform(seed: int, position: int, purpose: str) -> float:
    """A number in [0, 1), uniform over 2**53 values, which depends only on the arguments.

    Args:
        seed: seed of the sequence.
        position: position of the decided token in its sequence.
        purpose: use of the number ("token", "draft", "accept", "redraw"), so that two uses at one position are
            independent.
    """
    digest = hashlib.blake2b(f"{seed}/{position}/{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def penalised(logits: Tensor, params: SamplingParams, previous: Sequence[int], num_prompt: int = 0) -> Tensor:
    """Logits after the bias and the penalties.

    Args:
        logits: `[v]`, raw.
        params: the sequence's sampling parameters.
        previous: the sequence's tokens so far, to which the repetition penalty applies.
        num_prompt: number of them that are the prompt, to which the presence and frequency penalties do not apply.

    Returns:
        `[v]`, fp32.
    """
    logits = logits.float()
    if params.logit_bias:
        logits = _add(logits, dict(params.logit_bias))
    if params.repetition_penalty != 1.0 and previous:
        seen = torch.tensor(sorted(set(previous)), dtype=torch.long, device=logits.device)
        old = logits[seen]
        new = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
        logits = logits.index_copy(0, seen, new)
    answer = previous[num_prompt:]
    if answer and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(answer)
        penalties = {t: -params.presence_penalty - params.frequency_penalty * counts[t] for t in counts}
        logits = _add(logits, penalties)
    return logits


def _add(logits: Tensor, numbers: dict[int, float]) -> Tensor:
    """`logits` `[v]` with a number added at each of these tokens."""
    tokens = torch.tensor(list(numbers), dtype=torch.long, device=logits.device)
    return logits.index_add(0, tokens, logits.new_tensor(list(numbers.values())))


def distribution(logits: Tensor, params: SamplingParams, previous: Sequence[int] = (), num_prompt: int = 0) -> Tensor:
    """The distribution the next token is drawn from; one-hot when greedy.

    Args:
        logits: `[v]`, raw.
        params: the sequence's sampling parameters.
        previous, num_prompt: the sequence's tokens so far, and the number of them that are the prompt (for the
            penalties).

    Returns:
        `[v]`, fp64, sums to 1.
    """
    logits = penalised(logits, params, previous, num_prompt)
    if params.greedy:
        return torch.nn.functional.one_hot(logits.argmax(), logits.shape[0]).double()
    logits = logits.double() / params.temperature
    if params.min_p > 0:
        logits = logits.masked_fill(logits < logits.max() + math.log(params.min_p), -math.inf)
    if params.top_k is not None and params.top_k < logits.shape[0]:
        smallest_kept = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    probabilities = torch.softmax(logits, dim=0)
    if params.top_p < 1.0:
        probabilities = _nucleus(probabilities, params.top_p)
    return probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """`[v]` with the fewest most likely tokens whose probabilities reach `top_p`, of equal ones those of lower id."""
    # Sorting a vocabulary costs more than forming its distribution; the nucleus is nearly always among a few tokens.
    floor = probabilities.topk(min(_NUCLEUS, len(probabilities))).values[-1]
    # Ascending, and whole groups of equal ones; top-k and min-p leave zeros.
    candidates = ((probabilities >= floor) & (probabilities > 0)).nonzero().squeeze(-1)
    if probabilities[candidates].sum() < top_p:
        candidates = torch.arange(len(probabilities), device=probabilities.device)
    ordered, places = probabilities[candidates].sort(descending=True, stable=True)
    # A token stays while the more likely ones before it have not reached top_p; the first always stays.
    kept = candidates[places[ordered.cumsum(0) - ordered < top_p]]
    nucleus = torch.zeros_like(probabilities).index_copy_(0, kept, probabilities[kept])
    return nucleus / nucleus.sum()


class Choice(NamedTuple):
    """A token, and the `[v]` fp64 distribution it was drawn from; None if it is the most likely token."""

    token: int
    distribution: Tensor | None


def choose(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    previous: Sequence[Sequence[int]],
    purpose: str = "token",
    num_prompt: Sequence[int] | None = None,
) -> list[Choice]:
    """Choose the next token of n sequences, each independently of the others.

    Args:
        logits: `[n, v]`, raw.
        params: n, one per sequence.
        positions: n, position of each new token in its sequence.
        previous: n, each sequence's tokens so far; may be () without a penalty.
        purpose: use of the random numbers, see `uniform`.
        num_prompt: n, number of these tokens that are the prompt; None = none of them.

    Returns:
        n tokens.
    """
    plain = [own.takes_the_most_likely for own in params]
    # One argmax over all rows is cheaper than selecting the rows that need it.
    best = logits.argmax(dim=-1).tolist() if any(plain) else [0] * len(plain)
    return [
        Choice(best[row], None)
        if plain[row]
        else _choose_one(
            logits[row], own, positions[row], previous[row], purpose, num_prompt[row] if num_prompt else 0
        )
        for row, own in enumerate(params)
    ]


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    previous: Sequence[Sequence[int]],
    purpose: str = "token",
) -> list[int]:
    """The tokens of `choose` alone."""
    return [choice.token for choice in choose(logits, params, positions, previous, purpose)]


def _choose_one(
    logits: Tensor, params: SamplingParams, position: int, previous: Sequence[int], purpose: str, num_prompt: int
) -> Choice:
    if params.greedy:
        return Choice(int(penalised(logits, params, previous, num_prompt).argmax()), None)
    shaped = distribution(logits, params, previous, num_prompt)
    return Choice(draw(shaped, uniform(params.seed, position, purpose)), shaped)


def accepts(probability: float, number: float) -> bool:
    """Whether an event of this probability happens for `number` in [0, 1)."""
    return number < probability


def draw(probabilities: Tensor, number: float) -> int:
    """The token at `number` in [0, 1) of the cumulative distribution. `probabilities`: `[v]`, fp64, with any sum."""
    cumulative: Tensor = probabilities.cumsum(0)
    threshold = torch.tensor([number], dtype=cumulative.dtype, device=cumulative.device) * cumulative[-1]
    index: LongTensor = torch.searchsorted(cumulative, threshold, right=True)
    # Rounding may put the threshold at the very end: then take the last token of non-zero probability.
    last = int(probabilities.nonzero()[-1])
    return min(int(index), last)


class MinLengthMask:
    """Per slot: token ids that are masked out before a given position (stop tokens before the minimum length)."""

    def __init__(self) -> None:
        self._by_slot: dict[int, tuple[int, Sequence[int], int]] = {}

    def __len__(self) -> int:
        """Number of slots with masked tokens."""
        return len(self._by_slot)

    def mask(self, slot: int, first: int, tokens: Collection[int], num_prompt: int = 0) -> None:
        """Mask these tokens at the positions of the slot's answer, after `num_prompt` tokens, before `first`."""
        self._by_slot[slot] = (first, sorted(tokens), num_prompt)

    def release(self, slot: int, position: int | None = None) -> None:
        """Remove a slot's tokens. With `position`, only if no later row than that position's is masked."""
        if slot in self._by_slot and (position is None or position + 1 >= self._by_slot[slot][0]):
            del self._by_slot[slot]

    def masked(self, logits: Tensor, positions: TokenPositions) -> Tensor:
        """`-inf` for the masked tokens; the same tensor where there are none.

        Args:
            logits: `[n, v]`, for the tokens after the rows; not changed.
            positions: the n rows.
        """
        rows: list[int] = []
        columns: list[int] = []
        for row, (slot, position) in enumerate(zip(*(side.tolist() for side in positions.on_host), strict=True)):
            first, tokens, num_prompt = self._by_slot.get(slot, (0, (), 0))
            if num_prompt <= position + 1 < first:
                rows += [row] * len(tokens)
                columns += tokens
        if not rows:
            return logits
        index = torch.tensor([rows, columns], device=logits.device)
        return logits.index_put((index[0], index[1]), logits.new_tensor(float("-inf")))
