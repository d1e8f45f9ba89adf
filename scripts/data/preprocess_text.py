# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Turn text or JSONL files into Megatron's indexed dataset (`.bin` token ids, `.idx` document boundaries).

python scripts/data/preprocess_text.py input=corpus/train.jsonl.gz output=data/train tokenizer=<Hugging Face directory>

Options: conf/preprocess_text.yaml. Both files are written under temporary names and appear together at the end, so a
killed run leaves no half-written dataset. Faults of the settings are reported together before any work; faults in the
data (file:line) are collected over all input, then reported together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import hydra
import numpy
from omegaconf import DictConfig, OmegaConf
from preprocess_settings import DOCUMENT_BYTES, DTYPES, PreprocessError, check_end, read_settings
from tqdm import tqdm

from nemo_ee.checkpoint.atomic import atomic_file
from nemo_ee.commands.command import command
from nemo_ee.settings.files import PREPROCESS_TEXT
from nemo_ee.text.json_values import JsonError, read_json
from nemo_ee.text.text_files import TextError, is_gzipped, read_document, read_json_lines, sample_index_folder

logger = logging.getLogger(__name__)

_BATCH = 64  # documents per tokenizer call; fast tokenizers share a batch out over cores


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """The settings of conf/preprocess_text.yaml, one field per key."""

    input: tuple[str, ...]
    output: str
    tokenizer: str
    jsonl_extensions: tuple[str, ...]
    text_extensions: tuple[str, ...]
    text_key: str
    append_eod: bool
    max_documents: int | None
    max_document_bytes: int | None
    dtype: str
    overwrite: bool

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> PreprocessConfig:
        """Read the settings.

        Raises:
            PreprocessError: values of the wrong kind.
        """
        whole = {"max_documents": (1, "a whole number from 1, or null for all"), "max_document_bytes": DOCUMENT_BYTES}
        return read_settings(
            cls, mapping, lists=("jsonl_extensions", "text_extensions"), texts=("text_key",), whole=whole
        )


@dataclasses.dataclass(frozen=True)
class PreprocessResult:
    """What was written."""

    documents: int
    tokens: int
    empty_documents: int  # left out
    dtype: str


def _ending(path: Path) -> str:
    """The last suffix, in lower case, below a .gz if there is one."""
    return Path(path.stem if is_gzipped(path) else path.name).suffix.lower()


def find_files(config: PreprocessConfig) -> tuple[list[Path], list[str]]:
    """The input files in order (directories sorted by path), and what is wrong with the list."""
    known = {ending.lower() for ending in (*config.jsonl_extensions, *config.text_extensions)}
    rule = f"known endings: {', '.join(sorted(known))}, each also with .gz"
    files: list[Path] = []
    faults: list[str] = []
    for name in config.input:
        path = Path(name)
        if path.is_dir():
            inside = sorted(entry for entry in path.rglob("*") if entry.is_file())
            chosen = [entry for entry in inside if _ending(entry) in known]
            if not chosen:
                faults.append(f"input: directory {name} has no file of a known type ({rule})")
            if len(chosen) < len(inside):
                logger.info("%s: %d files of other types left out", name, len(inside) - len(chosen))
            files += chosen
        elif not path.exists():
            faults.append(f"input: {name} does not exist")
        elif _ending(path) not in known:
            settings = "text_extensions and jsonl_extensions" if config.text_extensions else "jsonl_extensions"
            faults.append(f"input: {name} has an unknown ending ({rule}); see {settings}")
        else:
            files.append(path)
    return files, faults


def load_tokenizer(directory: str) -> Any:
    """The Hugging Face tokenizer in a local directory; nothing is downloaded and no code from the directory runs.

    Raises:
        PreprocessError: no directory, or no tokenizer in it.
    """
    if not Path(directory).is_dir():
        raise PreprocessError([f"tokenizer: {directory} is not a local directory; nothing is downloaded"])
    from nemo_ee.runtime import loader

    try:
        return loader.load_tokenizer(directory)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PreprocessError([f"tokenizer: cannot load one from {directory}: {error}"]) from error


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The token ids of a tokenizer against those of the model it lies beside.

    Attributes:
        largest: of the tokenizer's ids.
        size: ids of the model, by its config.json; None where the tokenizer has no id beyond them, or nothing says.
    """

    tokenizer: Any
    config: Path
    largest: int
    size: int | None

    @classmethod
    def of(cls, tokenizer: Any, directory: str) -> Vocabulary:
        """The vocabulary of the tokenizer in a directory."""
        largest, config, size = max(tokenizer.get_vocab().values()), Path(directory, "config.json"), None
        with contextlib.suppress(OSError, JsonError):
            values = read_json(config)
            size = values.get("vocab_size") if isinstance(values, dict) else None
        return cls(tokenizer, config, largest, size if isinstance(size, int) and 0 < size <= largest else None)

    def fault(self, tokens: Sequence[int]) -> str | None:
        """What is wrong with the tokens of a document, or None."""
        if self.size is None or max(tokens, default=0) < self.size:
            return None
        token = next(token for token in tokens if token >= self.size)
        return (
            f"the tokenizer gives token {token} ({self.tokenizer.convert_ids_to_tokens(token)!r}), which is outside "
            f"the model's vocabulary 0..{self.size - 1} ({self.config}); leave that text out, or give the model more "
            "rows"
        )


def choose_dtype(name: str, vocab_size: int) -> tuple[str, list[str]]:
    """The token type on disk for a vocabulary, and what is wrong with the choice.

    Args:
        name: auto, uint16 or int32.
        vocab_size: largest token id + 1.
    """
    if name == "auto":
        # 65500, not 65536: the limit Megatron-core itself draws.
        return ("uint16" if vocab_size < 65500 else "int32"), []
    largest = int(numpy.iinfo(DTYPES[name]).max)
    if vocab_size - 1 > largest:
        return name, [f"dtype: {name} holds ids to {largest}, the tokenizer has {vocab_size - 1}; use int32 or auto"]
    return name, []


def read_documents(path: Path, config: PreprocessConfig, faults: list[str], bar: tqdm) -> Iterator[tuple[str, str]]:
    """(file:line or file, document) of one file; what cannot be read is added to `faults` as file:line.

    Args:
        path: a text or JSONL file, possibly .gz.
        config: the settings.
        faults: grows.
        bar: moves on by bytes read from disk.
    """
    if _ending(path) in {ending.lower() for ending in config.jsonl_extensions}:
        yield from read_fields(path, config, "text_key", str, faults, bar)
        return
    with _moving(bar, path) as moved:
        try:
            yield str(path), read_document(path, config.max_document_bytes, moved)
        except TextError as error:
            faults.append(str(error))


def read_fields(
    path: Path, config: Any, setting: str, kind: type, faults: list[str], bar: tqdm
) -> Iterator[tuple[str, Any]]:
    """(file:line, value of one field) of every line of a JSONL file; what cannot be read is added to `faults`.

    Args:
        path: the file, possibly .gz.
        config: settings with `max_document_bytes`.
        setting: the setting that names the field.
        kind: type of the field.
        faults: grows.
        bar: moves on by bytes read from disk.
    """
    key = getattr(config, setting)
    with _moving(bar, path) as moved:
        yield from read_json_lines(
            path,
            lambda record: _field(record, key, kind, setting),
            max_bytes=config.max_document_bytes,
            moved=moved,
            faults=faults,
        )


@contextmanager
def _moving(bar: tqdm, path: Path) -> Iterator[Callable[[int], None]]:
    """What moves the bar to a place in the file; at the end it stands behind the file."""
    seen = 0

    def moved(place: int) -> None:
        nonlocal seen
        bar.update(place - seen)
        seen = place

    yield moved
    moved(path.stat().st_size)


def _field(record: Any, key: str, kind: type, setting: str) -> Any:
    """A field of a line's value.

    Raises:
        ValueError: it is absent, or of another type.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object with the field {key!r}")
    if key not in record:
        fields = ", ".join(sorted(map(repr, record))) or "none"
        raise ValueError(f"no field {key!r} (it has {fields}); name the field with {setting}")
    if not isinstance(record[key], kind):
        wanted = {str: "a string", list: "a list"}[kind]
        raise ValueError(f"field {key!r} is a JSON {type(record[key]).__name__}, not {wanted}")
    return record[key]


def _batches(
    documents: Iterator[tuple[str, str]], limit: int | None, faults: list[str], counts: dict[str, int]
) -> Iterator[list[tuple[str, str]]]:
    """Batches of non-empty documents with their places, at most `limit` documents in all.

    After the first fault nothing more is handed out: the rest is only read, for its faults.
    """
    batch: list[tuple[str, str]] = []
    taken = 0
    for place, text in documents:
        if not text:
            counts["empty"] += 1
            continue
        if faults:
            continue
        batch.append((place, text))
        taken += 1
        if len(batch) == _BATCH or taken == limit:
            yield batch
            batch = []
        if taken == limit:
            return
    if batch and not faults:
        yield batch


def preprocess(config: PreprocessConfig) -> PreprocessResult:
    """Write `<output>.bin` and `<output>.idx`.

    Args:
        config: the settings.

    Returns:
        Counts of what was written.

    Raises:
        PreprocessError: every fault of the settings, or every fault in the data. Nothing is left behind then.
    """
    files, faults = find_files(config)
    finished = [Path(config.output + suffix) for suffix in (".bin", ".idx")]
    if not config.overwrite:
        faults += existing_faults(finished)
    mask = Path(config.output + ".mask.idx")
    if mask.exists():
        faults.append(f"output: {mask} belongs to chat data and would be taken for this text's; choose another prefix")
    vocabulary, eod, dtype = None, None, config.dtype
    try:
        tokenizer = load_tokenizer(config.tokenizer)
    except PreprocessError as error:
        faults += error.faults
    else:
        eod = tokenizer.eos_token_id if config.append_eod else None
        if config.append_eod and eod is None:
            faults.append(f"tokenizer: {config.tokenizer} has no eos_token for append_eod; set it False")
        faults += check_end(config.tokenizer, eod)
        vocabulary = Vocabulary.of(tokenizer, config.tokenizer)
        dtype, problems = choose_dtype(config.dtype, vocabulary.largest + 1)
        faults += problems
    if faults:
        raise PreprocessError(faults)

    with replacing(finished) as partial:
        result = _write(config, files, vocabulary, eod, dtype, partial)
        forget_samples(config.output)
    return result


def forget_samples(prefix: str) -> None:
    """Remove the order of samples that Megatron has cached for the data that is about to be replaced."""
    folder = sample_index_folder(prefix)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or not empty
        folder.parent.rmdir()
        folder.parent.parent.rmdir()


def existing_faults(finished: list[Path]) -> list[str]:
    """What is wrong with writing to these files when none may be replaced."""
    existing = [str(path) for path in finished if path.exists()]
    if not existing:
        return []
    return [f"output: {' and '.join(existing)} exist already; choose another prefix or set overwrite=True"]


@contextmanager
def replacing(finished: list[Path]) -> Iterator[list[Path]]:
    """Temporary names, which become those of `finished` together when the block succeeds, and vanish otherwise.

    Args:
        finished: data and index files in turn, the index that is read first at the end.
    """
    with ExitStack() as stack:
        # The index goes first and comes last: nobody finds an index that belongs to other data.
        partial = [stack.enter_context(atomic_file(path)) for path in reversed(finished)]
        yield partial[::-1]
        finished[-1].unlink(missing_ok=True)


def _write(
    config: PreprocessConfig,
    files: list[Path],
    vocabulary: Vocabulary,
    eod: int | None,
    dtype: str,
    targets: list[Path],
) -> PreprocessResult:
    """Tokenize all documents into `targets` (data, index); raises PreprocessError for faults in the data."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(targets[0]), dtype=DTYPES[dtype])
    faults: list[str] = []
    counts = {"documents": 0, "tokens": 0, "empty": 0}
    end = [] if eod is None else [eod]
    total = sum(path.stat().st_size for path in files)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="read", dynamic_ncols=True) as bar:
            documents = (document for path in files for document in read_documents(path, config, faults, bar))
            for batch in _batches(documents, config.max_documents, faults, counts):
                places, texts = zip(*batch, strict=True)
                encoded = vocabulary.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
                for place, tokens in zip(places, encoded, strict=True):
                    tokens = tokens + end
                    if fault := vocabulary.fault(tokens):
                        faults.append(f"{place}: {fault}")
                        continue
                    builder.add_document(tokens, [len(tokens)])
                    counts["documents"] += 1
                    counts["tokens"] += len(tokens)
                bar.set_postfix(documents=counts["documents"], tokens=counts["tokens"], refresh=False)
    finally:
        builder.data_file.close()
    if not faults and counts["tokens"] == 0:
        faults.append(f"input: no tokens in {len(files)} files ({counts['empty']} empty documents)")
    if faults:
        raise PreprocessError(faults)
    builder.finalize(str(targets[1]))
    return PreprocessResult(counts["documents"], counts["tokens"], counts["empty"], dtype)


@hydra.main(version_base="1.3", config_path="../../conf", config_name="preprocess_text")
def main(cfg: DictConfig) -> None:
    """Run with the options of conf/preprocess_text.yaml."""
    with command(cfg, PREPROCESS_TEXT):
        result = preprocess(PreprocessConfig.from_mapping(OmegaConf.to_container(cfg, resolve=True)))
        logger.info(
            "%s.bin, %s.idx: %d documents, %d tokens (%s), %d empty documents left out",
            cfg.output,
            cfg.output,
            result.documents,
            result.tokens,
            result.dtype,
            result.empty_documents,
        )


if __name__ == "__main__":
    main()
