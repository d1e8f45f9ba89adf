# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder in which Megatron caches the order of a run's samples; it belongs to the content of the data.

Megatron names a cached index after the path of the data. It depends on the lengths of the documents, which are in
`<prefix>.idx`, so after the data is made again under the same path an index of the old data would be read. Here

    <index_mapping_dir, or <first prefix>/cache/GPTDataset_indices>/<hash of the content of every .idx>/

is the folder that Megatron gets as `path_to_cache`. `data.json` in it lists its prefixes; folders of content that a
prefix no longer has are removed. Other ranks take the folder that rank 0 names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, open_dict

from nemo_ee.data.token_files import listed_prefixes, vocabulary_problem
from nemo_ee.text.json_values import JsonError, read_json
from nemo_ee.text.text_files import sample_index_folder, sha256_of

_RECORD = "data.json"


@contextlib.contextmanager
def content_keyed_index(cfg: DictConfig, vocab_size: int) -> Iterator[None]:
    """While it is entered, `cfg.data.index_mapping_dir` is the folder of this content. Every rank must enter it.

    Args:
        cfg: the model's config.
        vocab_size: the model's; the data is checked against it where the config did not state it before the model was
            built.

    Raises:
        ValueError: tokens outside the vocabulary, or a folder that cannot be made; on every rank.
    """
    if cfg.data.get("data_impl") == "mock":
        yield
        return
    given, prefixes = cfg.data.get("index_mapping_dir"), listed_prefixes(cfg.data.data_prefix)

    def prepare() -> str:
        if not cfg.get("vocab_size"):
            problems = [problem for prefix in prefixes if (problem := vocabulary_problem(prefix, vocab_size))]
            if problems:
                raise ValueError("nothing was trained:\n" + "\n".join(f"  {problem}" for problem in problems))
        return make_index_folder(prefixes, given)

    with open_dict(cfg.data):
        cfg.data.index_mapping_dir = on_rank_0(prepare)
    try:
        yield
    finally:
        with open_dict(cfg.data):
            cfg.data.index_mapping_dir = given


def on_rank_0(make: Callable[[], str]) -> str:
    """The result or the error of `make` on rank 0, on every rank. Every rank must call it."""
    if not torch.distributed.is_initialized():
        return make()
    outcome: list[str | Exception | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = make()
        except Exception as problem:  # noqa: BLE001  the other ranks wait for a result or any error
            outcome[0] = problem
    torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def make_index_folder(prefixes: Sequence[str], given: str | None) -> str:
    """Make the folder for the sample indices of this data and remove those of replaced data.

    Args:
        prefixes: prefixes of all data of the run, whose files exist.
        given: parent folder, None = beside the first data.

    Raises:
        ValueError: the folder cannot be made.
    """
    parent = Path(given) if given else sample_index_folder(prefixes[0])
    try:
        content = {str(Path(prefix).resolve()): sha256_of(Path(f"{prefix}.idx")) for prefix in prefixes}
        text = json.dumps(content, sort_keys=True)
        folder = parent / hashlib.sha256(text.encode()).hexdigest()[:16]
        _remove_outdated(parent, content)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _RECORD).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"the index of the samples cannot be written below {parent} ({error.strerror or error}); give a folder "
            "that can be written to with model.data.index_mapping_dir"
        ) from error
    return str(folder)


def _remove_outdated(parent: Path, content: dict[str, str]) -> None:
    """Remove the folders of data that one of these prefixes held before."""
    for record in parent.glob(f"*/{_RECORD}"):
        with contextlib.suppress(JsonError, FileNotFoundError):
            stored = read_json(record)
            if isinstance(stored, dict) and any(stored.get(one, own) != own for one, own in content.items()):
                shutil.rmtree(record.parent, ignore_errors=True)
