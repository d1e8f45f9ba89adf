# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of an export without transformers: tokenizer.json, run by the tokenizers library, and chat templates.

It has the part of transformers' interface that decoding and the server use, and gives the same ids and texts as
`PreTrainedTokenizerFast` there (without its clean-up of spaces), the class of every exported tokenizer. Other classes
add rules of their own to tokenizer.json and need transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nemo_ee.text.huggingface_json import readable_tokenizer_config
from nemo_ee.text.json_values import check_model_files, read_json_object
from nemo_ee.text.tokenizer_directory import TOKENIZER_CONFIG

TOKENIZER_JSON = "tokenizer.json"
_TEMPLATE_FILE = "chat_template.jinja"
# transformers 4 stores the second name for the first class; beside a tokenizer.json it reads both as the first.
_CLASSES = ("PreTrainedTokenizerFast", "PreTrainedTokenizer")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class JsonTokenizer:
    """A tokenizer in one file.

    Args:
        directory: a directory that `reads` accepts.

    Attributes:
        chat_template: the Jinja template of conversations, several by name, or None. It may be replaced.
        special_tokens: role -> text, such as `eos_token`, for templates.
        bos_token_id, eos_token_id: ids of the tokens with these roles, or None.

    Raises:
        ValueError: a damaged file.
    """

    def __init__(self, directory: str | Path) -> None:
        check_model_files(Path(directory))
        config = _config(directory)
        try:
            self._backend = Backend.from_file(str(Path(directory) / TOKENIZER_JSON))
            self._backend.no_truncation()
            self._backend.no_padding()
            self.special_tokens: dict[str, Any] = {role: _text(config[role]) for role in _ROLES if config.get(role)}
            listed = [_text(token) for token in config.get("additional_special_tokens") or ()]
            self._add_tokens(config.get("added_tokens_decoder") or {}, [*self.special_tokens.values(), *listed])
            self._set_prefix_space(config.get("add_prefix_space"))
            self.chat_template = _chat_template(Path(directory), config)
        except Exception as problem:  # of values of any kind, and the tokenizers library has no class of its own
            raise ValueError(f"{directory}: the tokenizer is damaged ({problem}); write it again") from problem
        self.bos_token_id, self.eos_token_id = (self._id_of(role) for role in ("bos_token", "eos_token"))
        if listed:
            self.special_tokens["additional_special_tokens"] = listed

    @staticmethod
    def reads(directory: str | Path) -> bool:
        """Whether the tokenizer of a directory is its tokenizer.json, without rules of a class of transformers.

        Raises:
            ValueError: tokenizer_config.json is damaged.
        """
        files = (TOKENIZER_JSON, TOKENIZER_CONFIG)
        if not all((Path(directory) / name).is_file() for name in files):
            return False
        return _config(directory).get("tokenizer_class") in _CLASSES

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        """`input_ids`: the token ids of a text.

        Args:
            add_special_tokens: with those that tokenizer.json puts around a text.
            verbose: no effect.
        """
        return {"input_ids": self._backend.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """The text of token ids.

        Args:
            skip_special_tokens: leave special tokens out.
            clean_up_tokenization_spaces: only False.
        """
        if clean_up_tokenization_spaces:
            raise ValueError("clean_up_tokenization_spaces=True: only transformers does this; leave it out")
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            conversation: messages, each with `role` and `content`.
            tools, documents: descriptions of functions, and texts to answer from, for templates that know them.
            add_generation_prompt: begin an answer.
            tokenize: only False.
            variables: further variables of the template.

        Raises:
            jinja2.TemplateError: the template refuses the conversation.
            ValueError: there is no template.
        """
        template = self.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use") if tools and "tool_use" in template else template.get("default")
        if not template or tokenize:
            raise ValueError("no default chat template in the tokenizer" if not template else "tokenize=True")
        given = {"messages": conversation, "tools": tools, "documents": documents}
        given["add_generation_prompt"] = add_generation_prompt
        return _environment().from_string(template).render(**given, **{**self.special_tokens, **variables})

    def _add_tokens(self, listed: Mapping[str, Mapping[str, Any]], special: Sequence[str]) -> None:
        """Add tokens of tokenizer_config.json that tokenizer.json does not have, or has with another rule."""
        known = {repr(token) for token in self._backend.get_added_tokens_decoder().values()}
        tokens = [AddedToken(**listed[number]) for number in sorted(listed, key=int)]
        tokens = [token for token in tokens if repr(token) not in known]
        texts = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        texts |= {token.content for token in tokens}
        tokens += [AddedToken(text, special=True) for text in dict.fromkeys(special) if text not in texts]
        for token in tokens:
            token.special = token.special or token.content in special
        if tokens:
            self._backend.add_tokens(tokens)

    def _set_prefix_space(self, wanted: bool | None) -> None:
        """`add_prefix_space` of tokenizer_config.json, if it is there, replaces that of tokenizer.json."""
        splitter = self._backend.pre_tokenizer
        state = {} if splitter is None else json.loads(splitter.__getstate__())
        if wanted is not None and state.get("add_prefix_space", wanted) != wanted:
            kind = getattr(pre_tokenizers, state.pop("type"))
            self._backend.pre_tokenizer = kind(**{**state, "add_prefix_space": wanted})

    def _id_of(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self._backend.token_to_id(text)


def _config(directory: str | Path) -> dict[str, Any]:
    return readable_tokenizer_config(read_json_object(Path(directory) / TOKENIZER_CONFIG, wide_integers=True))


def _text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    file = directory / _TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    return {own["name"]: own["template"] for own in template} if isinstance(template, list) else template


def _environment() -> Any:
    """The Jinja sandbox that templates are written for: the functions and the tag that transformers gives them."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks an answer for training; its text is written as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
