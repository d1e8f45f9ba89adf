# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Calibration prompts: lines of a JSONL file, or pieces cut from documents.

    {"prompt": ...}                    used unchanged
    {"prompt": ..., "answer": ...}     with the answer that the task risk compares with
    {"text": ...}                      a document: `prompt_tokens` tokens from a random place of it
    any other file                     one document

The guarantee needs independent prompts, so a document gives one prompt by default (`prompts_per_document`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_ee.generation.validation import token_problems
from nemo_ee.text.text_files import (
    MAX_DOCUMENT_BYTES,
    data_prefix,
    is_jsonl,
    read_document,
    read_json_lines,
    sha256_of,
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of the file. `is_document`: `text` is cut into prompts; otherwise it is one prompt."""

    text: str
    answer: str | None
    is_document: bool


@dataclasses.dataclass(frozen=True)
class CalibrationPrompts:
    """The prompts of a calibration.

    Attributes:
        ids: token ids of each prompt.
        answers: the answer of each prompt, None without one.
        facts: for the certificate: file, sha256, num_prompts, cut, seed.
    """

    ids: tuple[tuple[int, ...], ...]
    answers: tuple[str | None, ...]
    facts: dict[str, Any]


def read_entries(path: Path, max_bytes: int | None = MAX_DOCUMENT_BYTES) -> tuple[list[Entry], str]:
    """The entries of a file and its sha256. `.gz` is unpacked; `.jsonl` is read line by line.

    Args:
        max_bytes: limit of a document or line; None = no limit.

    Raises:
        ValueError: every problem of the file, with line numbers.
    """
    prefix = Path(data_prefix(str(path)))
    if not path.is_file() or prefix != path:
        tokens = [f"{prefix}{ending}" for ending in (".bin", ".idx")]
        if all(Path(file).is_file() for file in tokens):
            raise ValueError(f"{path} is tokenised data ({' and '.join(tokens)}); give the text it was made of")
    if not is_jsonl(path):
        return [Entry(read_document(path, max_bytes), None, True)], sha256_of(path)
    problems: list[str] = []
    entries = [entry for _, entry in read_json_lines(path, _entry, max_bytes=max_bytes, problems=problems)]
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError("\n  ".join(problems[:10] + more))
    if not entries:
        raise ValueError(f"{path} is empty; give a line per prompt or document")
    return entries, sha256_of(path)


def _entry(line: Any) -> Entry:
    if isinstance(line, dict):
        answer = line.get("answer")
        if answer is not None and not isinstance(answer, str):
            raise ValueError(f'"answer" is {answer!r}, not a text; put it in quotes')
        for key in ("prompt", "text"):
            if isinstance(line.get(key), str):
                return Entry(line[key], answer, key == "text")
    raise ValueError('must be an object with a text under "prompt", or a document under "text"')


def make_prompts(
    entries: Sequence[Entry],
    to_ids: Callable[[str], Sequence[int]],
    *,
    bos: int | None,
    prompt_tokens: int,
    prompts_per_document: int,
    num_prompts: int | None,
    longest: int,
    seed: int,
    facts: dict[str, Any],
    vocab_size: int | None = None,
) -> CalibrationPrompts:
    """Tokenize entries, cut documents into prompts, and choose `num_prompts` of them.

    Args:
        to_ids: text -> token ids, the begin-of-text token included where it belongs.
        bos: the begin-of-text token, also put in front of pieces of documents; None = prompts get none.
        prompt_tokens, prompts_per_document: a document's tokens are divided into `prompts_per_document` equal spans,
            and each span gives `prompt_tokens` tokens from a random place. Documents that are too short are left out.
        num_prompts: number of prompts to take, at random; None = all.
        longest: most tokens of a prompt.
        seed: random seed of the choices.
        facts: facts about the data, copied into the result.
        vocab_size: the model's vocabulary size; None = token ids are not checked.

    Raises:
        ValueError: a prompt is empty, too long or holds tokens that the model does not have, or there is no prompt.
    """
    chance = random.Random(seed)
    found: list[tuple[tuple[int, ...], str | None]] = []
    problems, short = [], 0
    for number, entry in enumerate(entries):
        ids = list(to_ids(entry.text))
        if vocab_size is not None and ids:
            problems += token_problems(vocab_size, f"prompt {number}", ids)
        if entry.is_document:
            pieces = _pieces(ids, bos, prompt_tokens, prompts_per_document, chance)
            short += not pieces
            found += [(tuple(piece), entry.answer) for piece in pieces]
        elif 1 <= len(ids) <= longest:
            found.append((tuple(ids), entry.answer))
        else:
            problems.append(f"prompt {number} has {len(ids)} tokens; it may have 1 to {longest}")
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError("\n  ".join(problems[:10] + more))
    chance.shuffle(found)
    if num_prompts is not None and num_prompts > len(found):
        raise ValueError(
            f"num_prompts={num_prompts}, but the data gives {len(found)} prompts ({short} documents are shorter than "
            f"{prompt_tokens} tokens); lower it, or give more data"
        )
    found = found[:num_prompts]
    documents = sum(entry.is_document for entry in entries)
    cut = f"{prompts_per_document} x {prompt_tokens} tokens of each document" if documents else "a line each"
    return CalibrationPrompts(
        ids=tuple(ids for ids, _ in found),
        answers=tuple(answer for _, answer in found),
        facts={
            **facts,
            "num_prompts": len(found),
            "cut": cut,
            "independent": not documents or prompts_per_document == 1,
            "seed": seed,
            "documents_too_short": short,
        },
    )


def _pieces(ids: list[int], bos: int | None, length: int, count: int, chance: random.Random) -> list[list[int]]:
    if bos is not None and ids[:1] == [bos]:
        ids, length = ids[1:], length - 1
    else:
        bos = None
    span = len(ids) // count
    if span < length or length < 1:
        return []
    starts = [index * span + chance.randrange(span - length + 1) for index in range(count)]
    return [([] if bos is None else [bos]) + ids[start : start + length] for start in starts]
