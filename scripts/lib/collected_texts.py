# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The three files of a collection of texts: training texts, held-out texts, and the list of their sources."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from nemo_ee.settings.fields import FilePath
from nemo_ee.settings.user_input import Sentence

from .dataset_files import existing_problems, replacing

_ENDINGS = (".jsonl", ".jsonl.gz")


@dataclasses.dataclass(frozen=True)
class Source:
    """One text that was taken.

    Attributes:
        digest: sha256 of the text; the order of the texts in a file.
        source: where it lies in its distribution.
    """

    digest: str
    text: str
    source: str
    distribution: str
    licence: str

    def line(self) -> str:
        """The text as a line of JSONL."""
        record = {key: getattr(self, key) for key in ("text", "source", "distribution", "licence")}
        return json.dumps(record, ensure_ascii=False) + "\n"


def digest_of(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def files_of(output: Path) -> list[Path]:
    """Training texts, held-out texts, list of sources."""
    stem, dot, ending = output.name.partition(".jsonl")
    names = (f"{stem}.held-out{dot}{ending}", f"{output.name}.sources.json")
    return [output, *(output.with_name(name) for name in names)]


def _is_new(output: Path, info: ValidationInfo) -> Path:
    if not output.name.endswith(_ENDINGS):
        raise ValueError("must end in .jsonl or .jsonl.gz")
    problems = [] if info.data.get("overwrite", True) else existing_problems(files_of(output))
    if problems:
        raise Sentence(*problems)
    return output


# The setting `output` of a script that collects; its model has `overwrite` before it.
CollectionPath = Annotated[FilePath, AfterValidator(_is_new)]


def write_collection(output: Path, taken: Mapping[str, Sequence[Source]], report: Mapping[str, Any]) -> None:
    """Write the files of a collection; they appear under their names together.

    Args:
        output: name of the training texts.
        taken: training texts, held-out texts.
        report: the list of sources.
    """
    paths = files_of(output)
    with replacing(paths) as partial:
        for target, path, sources in zip(partial, paths, taken.values(), strict=False):
            opener = gzip.open if path.name.endswith(".gz") else open
            with opener(target, "wt", encoding="utf-8") as stream:
                stream.writelines(source.line() for source in sorted(sources, key=lambda source: source.digest))
        partial[2].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
