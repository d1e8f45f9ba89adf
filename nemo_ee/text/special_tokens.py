# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""End-of-text and begin-of-text tokens: one rule for the end of answers and one for prompts, used everywhere.

End-of-text: the first of these that names a token of the vocabulary decides, as in transformers' `generate`. A value
is a token id, a list of them, or null.

    generation_config.json    eos_token_id
    config.json               eos_token_id; without the key, the default of the model's class in transformers
    tokenizer                 its end-of-text token (transformers' `generate` has no tokenizer and would not stop)

Begin-of-text: a prompt gets the special tokens that its tokenizer adds, unless it begins with that token already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ee.families.registry import FAMILIES
from nemo_ee.text.json_values import JsonError, read_json_object

GENERATION_CONFIG, CONFIG = "generation_config.json", "config.json"


@dataclass(frozen=True)
class EndOfText:
    """The tokens that end a text.

    Attributes:
        ids: token ids, in the order in which they are named; () = no token does.
        tokenizer: the tokenizer's own end-of-text token.
    """

    ids: tuple[int, ...]
    tokenizer: int | None

    @property
    def differs(self) -> str | None:
        """A sentence for a warning where the tokenizer's own token does not end a text."""
        if self.tokenizer is None or self.tokenizer in self.ids:
            return None
        if not self.ids:
            return (
                f"nothing ends a text: the tokenizer's end-of-text token, {self.tokenizer}, is outside the vocabulary"
            )
        return (
            f"decoding stops at token {', '.join(map(str, self.ids))}, which {GENERATION_CONFIG} or {CONFIG} names, "
            f"and not at the tokenizer's end-of-text token, {self.tokenizer}"
        )


def end_of_text(
    generation_config: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    tokenizer_id: int | None,
    *,
    vocab_size: int | None = None,
    origin: object = "",
) -> EndOfText:
    """The tokens that end a text of a model.

    Args:
        generation_config, config: the values of the two files; None = there is no such file.
        tokenizer_id: the tokenizer's end-of-text token; None = it has none.
        vocab_size: ids outside of it do not count, since no model gives them; None = all count.
        origin: where the files are, for messages.

    Raises:
        ValueError: an `eos_token_id` that is neither a whole number, a list of them, nor null.
    """
    named = [
        _ids(generation_config or {}, f"{origin}/{GENERATION_CONFIG}"),
        _ids({"eos_token_id": token_of(config, "eos_token_id")}, f"{origin}/{CONFIG}") if config else (),
        () if tokenizer_id is None else (tokenizer_id,),
    ]
    for ids in named:
        known = [one for one in dict.fromkeys(ids) if one >= 0 and (vocab_size is None or one < vocab_size)]
        if known:
            return EndOfText(tuple(known), tokenizer_id)
    return EndOfText((), tokenizer_id)


def end_of_text_of(
    directory: str | Path, tokenizer_id: int | None, *, vocab_size: int | None = None, origin: object = None
) -> EndOfText:
    """`end_of_text` of a model's directory.

    Args:
        origin: name of the directory in messages; None = its own.

    Raises:
        ValueError: as `end_of_text`, or one of the files is damaged.
    """
    origin = directory if origin is None else origin
    names = (GENERATION_CONFIG, CONFIG)
    files = (optional_settings(Path(directory) / name, shown=f"{origin}/{name}") for name in names)
    return end_of_text(*files, tokenizer_id, vocab_size=vocab_size, origin=origin)


def token_of(config: Mapping[str, Any], role: str) -> Any:
    """`bos_token_id`, `eos_token_id` or `pad_token_id` of a config.json; for an absent key the family's default."""
    if role in config:
        return config[role]
    family = FAMILIES.get(str(config.get("model_type")))
    return None if family is None else family.special_tokens.get(role)


def _ids(values: Mapping[str, Any], source: str) -> tuple[int, ...]:
    value = values.get("eos_token_id")
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
        raise ValueError(f"{source}: eos_token_id={value!r} must be a token id, a list of token ids, or null")
    return tuple(ids)


def optional_settings(path: Path, *, shown: object = None) -> dict[str, Any] | None:
    """The values of a directory's JSON file; None where there is none.

    Args:
        shown: name of the file in messages; None = its path.

    Raises:
        ValueError: it is damaged, or something else than an object.
    """
    try:
        return read_json_object(path, shown=shown) if path.is_file() else None
    except JsonError as error:
        raise ValueError(f"{error}; fetch or write the file again") from error


def prompt_ids(tokenizer: Any, text: str, add_bos: bool | None = None) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: a `JsonTokenizer`, or transformers'.
        text: special tokens spelled out in it are read as such.
        add_bos: True = the begin-of-text token in front, False = no special tokens but those in the text, None = those
            that the tokenizer itself adds. A text that begins with the begin-of-text token gets none in any case.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if add_bos is False or (bos is not None and ids[:1] == [bos]):
        return ids
    return [bos, *ids] if add_bos else list(tokenizer(text, verbose=False)["input_ids"])
