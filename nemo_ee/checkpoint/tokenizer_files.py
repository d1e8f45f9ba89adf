# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer's files in a `.nemo`'s `tokenizer/`: the files that are copied, their special tokens, and the
end-of-text tokens.

A `.nemo` may be untrusted, so nothing else of that folder is copied, and no link is followed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_ee.checkpoint.members import TOKENIZER_FOLDER
from nemo_ee.checkpoint.nemo_archive import NemoArchive
from nemo_ee.checkpoint.unpacked import unpacked
from nemo_ee.text.json_values import JsonError, read_json_object
from nemo_ee.text.special_tokens import EndOfText, end_of_text, end_of_text_of
from nemo_ee.text.tokenizer_directory import TOKENIZER_FILES, carried_settings, has_settings

SPECIAL_TOKENS = ("bos", "eos", "pad")


def is_plain_file(path: Path) -> bool:
    """Whether the path is a file, and neither the file nor its folder is a link."""
    return path.is_file() and not path.is_symlink() and not path.parent.is_symlink()


def copy_tokenizer_files(folder: Path, to: Path) -> list[str]:
    """Copy the files named in `TOKENIZER_FILES`, and no others, into the existing directory `to`. Returns the names.

    Settings go through `carried_settings`; a file that is not a JSON object is left out.
    """
    names = []
    for name in TOKENIZER_FILES:
        if not is_plain_file(folder / name):
            continue
        if has_settings(name):
            data = carried_settings(name, (folder / name).read_bytes())
            if data is None:
                continue
            (to / name).write_bytes(data)
        else:
            shutil.copyfile(folder / name, to / name)
        names.append(name)
    return names


def plain_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if it is not a plain file or holds anything else."""
    try:
        return read_json_object(path, wide_integers=True) if is_plain_file(path) else None
    except JsonError:
        return None


def special_token_ids(folder: Path | None) -> dict[str, int | None]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` from the tokenizer's files; None if not given there."""
    ids: dict[str, int | None] = {f"{role}_token_id": None for role in SPECIAL_TOKENS}
    if folder is None:
        return ids
    named = [plain_json_object(folder / name) or {} for name in ("tokenizer_config.json", "special_tokens_map.json")]
    for role in SPECIAL_TOKENS:
        texts = (_text(values.get(f"{role}_token")) for values in named)
        text = next((text for text in texts if text is not None), None)
        if text is not None:
            ids[f"{role}_token_id"] = next((found for token, found in _tokens(folder) if token == text), None)
    return ids


def stored_end_of_text(path: str | Path, tokenizer_id: int | None = None) -> EndOfText:
    """The end-of-text tokens of the model in a `.nemo`; the tokenizer's if the file has not the Hugging Face model's
    two configs (a file of NeMo, or of an earlier version).

    Args:
        tokenizer_id: the loaded tokenizer's end-of-text token; None = the one in the tokenizer's files.

    Raises:
        ValueError: the `.nemo` or one of the two configs is damaged.
    """
    with NemoArchive(path) as archive:
        config = archive.config_values()
        vocab_size = config.get("vocab_size") if isinstance(config, dict) else None
        if not archive.has(TOKENIZER_FOLDER):
            return end_of_text(None, None, tokenizer_id, vocab_size=vocab_size)
        with unpacked(archive, [TOKENIZER_FOLDER]) as directory:
            folder = directory / TOKENIZER_FOLDER
            if tokenizer_id is None:
                tokenizer_id = special_token_ids(folder)["eos_token_id"]
            origin = f"{path}: {TOKENIZER_FOLDER}"
            return end_of_text_of(folder, tokenizer_id, vocab_size=vocab_size, origin=origin)


def _text(token: Any) -> str | None:
    """The text of a special token, which is stored as a text or as an object with it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _tokens(folder: Path) -> Iterator[tuple[str, int]]:
    """Every (token, id) of the files. The added tokens are first: they have priority over the vocabulary."""
    added = (plain_json_object(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder")
    for number, token in added.items() if isinstance(added, dict) else ():
        if number.isdecimal():
            yield _text(token) or "", int(number)
    whole = plain_json_object(folder / "tokenizer.json") or {}
    for token in whole.get("added_tokens") or ():
        if isinstance(token, dict) and type(token.get("id")) is int:
            yield _text(token) or "", token["id"]
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of ids
        vocabulary = {row[0]: number for number, row in enumerate(vocabulary) if isinstance(row, list) and row}
    added, listed = (plain_json_object(folder / name) for name in ("added_tokens.json", "vocab.json"))
    for table in (added, vocabulary, listed):
        for token, number in (table or {}).items() if isinstance(table, dict) else ():
            if type(number) is int:
                yield token, number
