# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A directory with a tokenizer, made readable for the installed transformers, whichever version saved it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_ee.text.huggingface_json import readable_tokenizer_config, without_code
from nemo_ee.text.json_values import JsonError, check_model_files, parse_json, read_json_object

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TOKENIZER_CONFIG = "tokenizer_config.json"
# Files from which transformers reads settings. In the other JSON files a key is a token, whatever its name.
_SETTINGS = (
    TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.json", "config.json", "generation_config.json",
)  # fmt: skip
_BESIDE = "config.json"  # names the class of a tokenizer whose own config does not


def has_settings(name: str) -> bool:
    """Whether transformers reads settings from a file of this name, so that `carried_settings` applies."""
    return name in _SETTINGS


def carried_settings(name: str, data: bytes) -> bytes | None:
    """A settings file as it goes into a `.nemo` or an export: without keys that run code, readable for every version.

    Args:
        name: name of the file.
        data: its contents; they are returned byte for byte where nothing changes.

    Returns:
        None where it is no JSON object, and is to be left out.
    """
    try:
        values = parse_json(data, wide_integers=True)
    except JsonError:
        return None
    if not isinstance(values, dict):
        return None
    carried = readable_tokenizer_config(values) if name == TOKENIZER_CONFIG else without_code(values)
    return data if carried == values else (json.dumps(carried, indent=2) + "\n").encode()


@contextmanager
def readable_tokenizer(directory: str | Path) -> Iterator[Path]:
    """A directory from which transformers 4.51 and later load the tokenizer: the given one, or for as long as the
    context lasts one with links to its files beside a rewritten tokenizer_config.json.

    Raises:
        ValueError: every damaged JSON file of the directory.
    """
    directory = Path(directory)
    check_model_files(directory)
    config = directory / TOKENIZER_CONFIG
    values = read_json_object(config, wide_integers=True) if config.is_file() else {}
    readable = readable_tokenizer_config(values)
    if readable == without_code(values):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="nemo_ee-") as folder:
        for name in (*TOKENIZER_FILES, _BESIDE):
            if name != TOKENIZER_CONFIG and (directory / name).is_file():
                Path(folder, name).symlink_to((directory / name).resolve())
        Path(folder, TOKENIZER_CONFIG).write_text(json.dumps(readable), encoding="utf-8")
        yield Path(folder)
