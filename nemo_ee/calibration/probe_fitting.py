# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Fits the probes of `criterion: probe` on the model's own answers.

prompts -> the full model's answers -> hidden states at every tap, agreement of every exit -> a probe for each exit on
some of the prompts, its quality on the others

The answers are greedy, so a token of an answer is the final exit's most likely one, and an exit agrees where its own
most likely token is that token.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor
from tqdm import tqdm

from nemo_ee.calibration.calibration_prompts import make_prompts
from nemo_ee.calibration.calibration_request import PromptFile, check_folder
from nemo_ee.commands.console import messages
from nemo_ee.evaluation.report import format_table
from nemo_ee.exits.confidence import confidence
from nemo_ee.exits.criteria import OF_LOGITS, PROBE
from nemo_ee.exits.probe import ExitProbe, fit_probe
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.teacher_forcing import TeacherForcedPass
from nemo_ee.runtime.model import RuntimeModel
from nemo_ee.settings.fields import AboveZero, FilePath, ModelFile, Seed
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Positive
from nemo_ee.text.special_tokens import prompt_ids

logger = logging.getLogger(__name__)

_SHARE_TO_TEST = 4  # one prompt in so many
_MAY_DISAGREE = 0.05


class ProbeSettings(ScriptInput):
    """conf/megatron_gpt_early_exit_probe.yaml, a field for each key; `data` is the content of the file."""

    headline: ClassVar = "no probe was fitted"

    checkpoint: ModelFile
    backbone: ModelFile | None
    max_document_bytes: Positive | None
    data: PromptFile
    prompt_tokens: Positive
    prompts_per_document: Positive
    num_prompts: Annotated[Positive | None, Field(ge=_SHARE_TO_TEST)]
    tokens_to_generate: Annotated[Positive, Field(ge=2)]
    batch_size: Positive
    l2: AboveZero
    seed: Seed
    threads: Positive
    save_to: FilePath | None

    @field_validator("save_to")
    @classmethod
    def _can_be_written(cls, save_to: Path | None, info: ValidationInfo) -> Path | None:
        if save_to is not None and save_to.exists():
            raise ValueError("exists; give another name, or null to put the probes into the model")
        path = info.data.get("checkpoint")
        if save_to is not None:
            check_folder("save_to", save_to.parent)
        elif path is not None:
            check_folder("checkpoint", path if path.is_dir() else path.resolve().parent)
        return save_to


class FittedProbes(NamedTuple):
    """The result.

    Attributes:
        probes: by the names of their exits; an exit whose tokens all agree, or none of them, has none.
        rows: quality of each exit on the prompts that no probe saw, as plain values.
        data: sha256 of the file of prompts.
    """

    probes: dict[str, ExitProbe]
    rows: list[dict[str, Any]]
    data: str

    def table(self) -> str:
        """The rows as text."""
        columns = {
            "exit": lambda row: row["exit"],
            "tokens": lambda row: f"{row['tokens']:,}",
            "agree": lambda row: f"{row['agreement']:.1%}",
            f"leave ({PROBE})": lambda row: f"{row['leave_probe']:.1%}",
            f"leave ({OF_LOGITS[0]})": lambda row: f"{row['leave_max_probability']:.1%}",
            "threshold": lambda row: "none" if row["threshold"] is None else f"{row['threshold']:.4f}",
        }
        return format_table([[*columns], *([cell(row) for cell in columns.values()] for row in self.rows)])


def fit_probes(
    model: RuntimeModel, tokenizer: Any, stop_tokens: Sequence[int], settings: ProbeSettings
) -> FittedProbes:
    """Fit a probe for each exit.

    Raises:
        ValueError: a prompt is too long or empty, the data gives too few prompts, or the model has no exits.
    """
    if not model.exits:
        raise ValueError(
            f"{settings.checkpoint} has no exits; add some with examples/megatron_gpt_early_exit_convert.py"
        )
    file = settings.data.facts["file"]
    prompts = make_prompts(
        settings.data.entries,
        lambda text: prompt_ids(tokenizer, text),
        bos=tokenizer.bos_token_id if prompt_ids(tokenizer, "x")[:1] == [tokenizer.bos_token_id] else None,
        prompt_tokens=settings.prompt_tokens,
        prompts_per_document=settings.prompts_per_document,
        num_prompts=settings.num_prompts,
        longest=model.max_positions - settings.tokens_to_generate,
        vocab_size=model.vocab_size,
        seed=settings.seed,
        facts={},
    ).ids
    if len(prompts) < _SHARE_TO_TEST:
        raise ValueError(f"{file} gives {len(prompts)} prompts; give at least {_SHARE_TO_TEST}")
    measured = _measure(model, prompts, stop_tokens, settings)
    probes, rows = {}, []
    for name, (hidden, certain, agrees, prompt) in measured.items():
        tested = prompt % _SHARE_TO_TEST == 0
        if not tested.any():
            raise ValueError(f"the prompts of {file} kept to test have answers of one token; give more prompts")
        try:
            probe = probes[name] = fit_probe(hidden[~tested], agrees[~tested], settings.l2)
        except ValueError as problem:
            logger.warning("exit %s gets no probe: %s", name, problem)
            continue
        own, theirs = agrees[tested], certain[tested]
        left, threshold = leaving(probe(hidden[tested]), own)
        rows.append(
            {
                "exit": name,
                "tokens": len(own),
                "agreement": float(own.double().mean()),
                "leave_probe": left,
                "leave_max_probability": leaving(theirs, own)[0],
                "threshold": threshold,
            }
        )
    if not probes:
        raise ValueError(f"no exit got a probe from {file}; give more or other prompts, or tune the exits")
    return FittedProbes(probes, rows, settings.data.facts["sha256"])


def leaving(confidences: Tensor, agrees: Tensor) -> tuple[float, float | None]:
    """The largest share of tokens that leave while at most `_MAY_DISAGREE` of all tokens leave and disagree.

    Args:
        confidences: `[n]`.
        agrees: `[n]`, bool.

    Returns:
        The share, and a threshold with four decimals at which no more tokens leave; None = no token leaves.
    """
    ordered, order = confidences.sort(descending=True)
    wrong = (~agrees[order]).double().cumsum(0) / len(order)
    # Tokens of one confidence leave together.
    ends = torch.cat([ordered[1:] < ordered[:-1], torch.ones(1, dtype=torch.bool)])
    good = ((wrong <= _MAY_DISAGREE) & ends).nonzero()
    if not len(good):
        return 0.0, None
    last = int(good[-1, 0])
    return (last + 1) / len(order), 0.0 if last + 1 == len(order) else math.ceil(float(ordered[last + 1]) * 1e4) / 1e4


@torch.inference_mode()
def _measure(
    model: RuntimeModel, prompts: Sequence[Sequence[int]], stop_tokens: Sequence[int], settings: ProbeSettings
) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Exit -> of every token of the answers: hidden state at the tap `[n, h]`, largest probability `[n]`, whether the
    exit agrees `[n]`, and the number of its prompt `[n]`."""
    engine, found = EarlyExitEngine(model), {point.name: [] for point in model.exits}
    size = settings.batch_size
    for first in tqdm(range(0, len(prompts), size), desc=f"answers, batches of {size}", file=messages()):
        batch = [list(own) for own in prompts[first : first + size]]
        answers = engine.generate(
            batch, max_new_tokens=settings.tokens_to_generate, mode="full", stop_tokens=tuple(stop_tokens)
        ).tokens
        texts = [[*prompt, *answer] for prompt, answer in zip(batch, answers, strict=True)]
        text = TeacherForcedPass(model, texts, tuple(found))
        # The first token of an answer comes from the prompt's forward pass, which evaluates no exit.
        owner = {
            text.first_rows[i] + row: first + i
            for i, own in enumerate(texts)
            for row in range(len(batch[i]), len(own) - 1)
        }
        if not owner:
            continue
        for stop in text.run_to({point.stop for point in model.exits}):
            for point in model.exits:
                if point.stop != stop:
                    continue
                for rows, logits, tokens, _ in text.evaluate(point.name, list(owner)):
                    numbers = torch.tensor([owner[row] for row in rows])
                    agrees = logits.argmax(dim=1) == tokens
                    found[point.name].append(
                        (text.hidden[list(rows)].cpu(), confidence(logits, OF_LOGITS[0]).cpu(), agrees.cpu(), numbers)
                    )
    if not all(found.values()):
        raise ValueError("every answer has one token at most; give other prompts")
    return {name: tuple(map(torch.cat, zip(*parts, strict=True))) for name, parts in found.items()}
