# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The parity digest of an export: the written model's predictions for a fixed text, as a few numbers in the manifest.

Sixteen fixed tokens go through the model once, at full depth. For the final exit and every other exit in
the export, the manifest has at every position

    argmax       the most likely next token
    logit        its logit
    margin       its distance from the second largest logit
    logsumexp    ln of the sum of exp(logit) over the vocabulary

to six significant digits. Two exports of one model in one dtype, Hugging Face or TensorRT-LLM, with any shards,
have the same numbers; the logits of a real engine can be compared with them.

Weights are read back from the files in the dtype they were rounded to when written; sums, norms, rotary positions,
attention and softmax are fp32. So bfloat16 differs from float32 by the rounding of the weights (up to 2**-9 of each)
alone. An engine that also computes in half precision differs by more; compare `argmax` where `margin` is large.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nemo_ee.generation.stats import FINAL
from nemo_ee.generation.teacher_forcing import TeacherForcedPass
from nemo_ee.runtime.model import RuntimeModel

logger = logging.getLogger(__name__)

NUM_TOKENS = 16
DEFAULT_GIGABYTES = 4.0
# Tolerance relative to the largest number, for fp32 sums in another order on another machine. A wrong tensor changes
# far more.
TOLERANCE = 1e-4
_STRIDE = 7919  # a prime, so that the tokens spread over any vocabulary
_NUMBERS = ("logit", "margin", "logsumexp")


def probe_tokens(vocab_size: int, max_positions: int) -> list[int]:
    """The fixed text: token i is (7919 i + 1) mod the vocabulary."""
    return [(_STRIDE * index + 1) % vocab_size for index in range(min(NUM_TOKENS, max_positions))]


@torch.inference_mode()
def parity_of(model: RuntimeModel) -> dict[str, Any]:
    """Run a model on the fixed text.

    Returns:
        `tokens`, and `heads`: name of an exit (`final` for the final one) -> argmax, logit, margin (to the second
        largest logit) and logsumexp of each position. All are plain JSON values.
    """
    tokens = probe_tokens(model.vocab_size, model.max_positions)
    text = TeacherForcedPass(model, [[*tokens, tokens[0]]], tuple(exit.name for exit in model.exits))
    rows, heads = range(len(tokens)), {}
    for stop in text.run_to({*(exit.stop for exit in model.exits), 2 * model.num_layers}):
        for exit in model.exits:
            if exit.stop == stop:
                heads[exit.name] = _summary(text, exit.name, rows)
    return {"tokens": tokens, "heads": {FINAL: _summary(text, None, rows), **heads}}


def _summary(text: TeacherForcedPass, exit: str | None, rows: Sequence[int]) -> dict[str, list]:
    logits = torch.cat([answers.logits for answers in text.evaluate(exit, rows)])  # [n, v]
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    numbers = {"logit": first, "margin": first - second, "logsumexp": logits.double().logsumexp(-1)}
    rounded = {name: [float(f"{value:.6g}") for value in values.tolist()] for name, values in numbers.items()}
    return {"argmax": logits.argmax(-1).tolist(), **rounded}


def written_parity(
    folder: Path, load: Callable[[Path], RuntimeModel], *, parity_gigabytes: float
) -> dict[str, Any] | None:
    """The parity digest of a directory that was just written; None if it is too large.

    Args:
        load: reads the directory back as a model.
        parity_gigabytes: largest model, its numbers counted as fp32.
    """
    if not _may_be_run(folder, parity_gigabytes, logging.INFO):
        return None
    return parity_of(load(folder))


def _may_be_run(folder: Path, gigabytes: float, level: int) -> bool:
    """Whether a directory is small enough; logs a message at `level` if not."""
    size = sum(_numbers_in(path) for path in folder.glob("*.safetensors")) * 4 / 1e9
    if size > gigabytes:
        logger.log(level, "%s: %.1f GB in fp32, more than parity_gigabytes, so its parity was not run", folder, size)
    return size <= gigabytes


def _numbers_in(path: Path) -> int:
    with safe_open(path, framework="pt", device="cpu") as file:
        shapes = (file.get_slice(name).get_shape() for name in file.keys())
        return sum(torch.Size(shape).numel() for shape in shapes)


def parity_problems(
    stated: Mapping[str, Any] | None,
    folder: Path,
    load: Callable[[Path], RuntimeModel],
    *,
    parity_gigabytes: float = DEFAULT_GIGABYTES,
) -> Iterator[str]:
    """Differences between a directory's predictions and its manifest; none if the manifest has no parity digest.

    Args:
        parity_gigabytes: see `written_parity`; a larger model is not run, with a warning.
    """
    if stated is None or not _may_be_run(folder, parity_gigabytes, logging.WARNING):
        return
    try:
        found = parity_of(load(folder))
    except ValueError as problem:
        yield f"parity: {problem}"
        return
    except (RuntimeError, IndexError) as problem:  # errors of torch: sizes that do not fit, no memory
        yield f"parity: cannot be run ({problem!r})"
        return
    if found["tokens"] != stated["tokens"] or found["heads"].keys() != stated["heads"].keys():
        yield f"parity: the manifest's tokens or exits ({', '.join(stated['heads'])}) are not those of this model"
        return
    for head, own in stated["heads"].items():
        yield from _head_problems(head, own, found["heads"][head])


def _head_problems(head: str, stated: Mapping[str, list], found: Mapping[str, list]) -> Iterator[str]:
    scale = max(abs(number) for name in _NUMBERS for number in found[name])
    far = [name for name in _NUMBERS if not _close(stated[name], found[name], TOLERANCE * scale)]
    clear = [margin > TOLERANCE * scale for margin in found["margin"]]
    if any(certain and a != b for certain, a, b in zip(clear, stated["argmax"], found["argmax"], strict=True)):
        far.append("argmax")
    if far:
        yield f"parity: {head} gives other numbers than those in the manifest ({', '.join(far)})"


def _close(one: list[float], other: list[float], tolerance: float) -> bool:
    return len(one) == len(other) and all(abs(a - b) <= tolerance for a, b in zip(one, other, strict=True))
