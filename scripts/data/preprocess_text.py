# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Turn text or JSONL files into Megatron's indexed dataset (`.bin` token ids, `.idx` document boundaries).

python scripts/data/preprocess_text.py input=corpus/train.jsonl.gz output=data/train tokenizer=<Hugging Face directory>

Options: conf/preprocess_text.yaml. Both files are written under temporary names and appear together at the end, so a
killed run leaves no half-written dataset. Problems of the settings are reported together before any work; those in the
data (file:line) are collected over all input, then reported together.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import hydra
from omegaconf import DictConfig
from tqdm import tqdm

from nemo_ee.commands.command import command
from nemo_ee.commands.console import messages, show
from nemo_ee.settings.fields import Texts
from nemo_ee.settings.user_input import Positive, Text, rule
from nemo_ee.text.text_files import TextError, read_document

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lib/

from lib.dataset_files import existing_problems, forget_samples, replacing
from lib.input_files import ending, find_files, moving, read_fields
from lib.preprocess_settings import DTYPES, PreprocessError, PreprocessSettings, check_end
from lib.vocabulary import Vocabulary, choose_dtype, load_tokenizer

_BATCH = 64  # documents per tokenizer call; fast tokenizers share a batch out over cores


class PreprocessConfig(PreprocessSettings):
    """The settings of conf/preprocess_text.yaml, one field per key."""

    text_extensions: Texts
    text_key: Text
    max_documents: Annotated[Positive | None, rule("a whole number from 1, or null for all")]


@dataclasses.dataclass(frozen=True)
class PreprocessResult:
    """Counts of the written data."""

    documents: int
    tokens: int
    empty_documents: int  # left out
    dtype: str


def read_documents(path: Path, config: PreprocessConfig, problems: list[str], bar: tqdm) -> Iterator[tuple[str, str]]:
    """(file:line or file, document) of one file; problems of reading are added to `problems` as file:line.

    Args:
        path: a text or JSONL file, possibly .gz.
        config: the settings.
        problems: grows.
        bar: moves on by bytes read from disk.
    """
    if ending(path) in {ending.lower() for ending in config.jsonl_extensions}:
        yield from read_fields(path, config, "text_key", str, problems, bar)
        return
    with moving(bar, path) as moved:
        try:
            yield str(path), read_document(path, config.max_document_bytes, moved)
        except TextError as error:
            problems.append(str(error))


def _batches(
    documents: Iterator[tuple[str, str]], limit: int | None, problems: list[str], counts: dict[str, int]
) -> Iterator[list[tuple[str, str]]]:
    """Batches of non-empty documents with their places, at most `limit` documents in all.

    After the first problem no batch follows: the rest is read only for its problems.
    """
    batch: list[tuple[str, str]] = []
    taken = 0
    for place, text in documents:
        if not text:
            counts["empty"] += 1
            continue
        if problems:
            continue
        batch.append((place, text))
        taken += 1
        if len(batch) == _BATCH or taken == limit:
            yield batch
            batch = []
        if taken == limit:
            return
    if batch and not problems:
        yield batch


def preprocess(config: PreprocessConfig) -> PreprocessResult:
    """Write `<output>.bin` and `<output>.idx`.

    Args:
        config: the settings.

    Returns:
        Counts of what was written.

    Raises:
        PreprocessError: every problem of the settings, or every problem in the data. Nothing is left behind then.
    """
    files, problems = find_files(config)
    finished = [Path(config.output + suffix) for suffix in (".bin", ".idx")]
    if not config.overwrite:
        problems += existing_problems(finished)
    mask = Path(config.output + ".mask.idx")
    if mask.exists():
        problems.append(f"output: {mask} belongs to chat data and would be read with this text; choose another prefix")
    vocabulary, eod, dtype = None, None, config.dtype
    try:
        tokenizer = load_tokenizer(config.tokenizer)
    except PreprocessError as error:
        problems += error.problems
    else:
        eod = tokenizer.eos_token_id if config.append_eod else None
        if config.append_eod and eod is None:
            problems.append(f"tokenizer: {config.tokenizer} has no eos_token for append_eod; set it False")
        problems += check_end(config.tokenizer, eod)
        vocabulary = Vocabulary.of(tokenizer, config.tokenizer)
        dtype, more = choose_dtype(config.dtype, vocabulary.largest + 1)
        problems += more
    if problems:
        raise PreprocessError(problems)

    with replacing(finished) as partial:
        result = _write(config, files, vocabulary, eod, dtype, partial)
        forget_samples(config.output)
    return result


def _write(
    config: PreprocessConfig,
    files: list[Path],
    vocabulary: Vocabulary,
    eod: int | None,
    dtype: str,
    targets: list[Path],
) -> PreprocessResult:
    """Tokenize all documents into `targets` (data, index); raises PreprocessError for problems in the data."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(targets[0]), dtype=DTYPES[dtype])
    problems: list[str] = []
    counts = {"documents": 0, "tokens": 0, "empty": 0}
    end = [] if eod is None else [eod]
    total = sum(path.stat().st_size for path in files)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="read", dynamic_ncols=True, file=messages()) as bar:
            documents = (document for path in files for document in read_documents(path, config, problems, bar))
            for batch in _batches(documents, config.max_documents, problems, counts):
                places, texts = zip(*batch, strict=True)
                encoded = vocabulary.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
                for place, tokens in zip(places, encoded, strict=True):
                    tokens = tokens + end
                    if problem := vocabulary.problem(tokens):
                        problems.append(f"{place}: {problem}")
                        continue
                    builder.add_document(tokens, [len(tokens)])
                    counts["documents"] += 1
                    counts["tokens"] += len(tokens)
                bar.set_postfix(documents=counts["documents"], tokens=counts["tokens"], refresh=False)
    finally:
        builder.data_file.close()
    if not problems and counts["tokens"] == 0:
        problems.append(f"input: no tokens in {len(files)} files ({counts['empty']} empty documents)")
    if problems:
        raise PreprocessError(problems)
    builder.finalize(str(targets[1]))
    return PreprocessResult(counts["documents"], counts["tokens"], counts["empty"], dtype)


@hydra.main(version_base="1.3", config_path="../../conf", config_name="preprocess_text")
def main(cfg: DictConfig) -> None:
    """Run with the options of conf/preprocess_text.yaml."""
    with command(cfg):
        result = preprocess(PreprocessConfig.from_config(cfg))
        show(
            f"{cfg.output}.bin, {cfg.output}.idx: {result.documents} documents, {result.tokens} tokens "
            f"({result.dtype}), {result.empty_documents} empty documents left out"
        )


if __name__ == "__main__":
    main()
