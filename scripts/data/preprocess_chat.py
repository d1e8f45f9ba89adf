# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Turn JSONL conversations into Megatron's indexed datasets: the tokens, and beside them a mask of the answers.

python scripts/data/preprocess_chat.py input=chats.jsonl output=data/chat tokenizer=<Hugging Face directory>

A line is {"messages": [{"role": ..., "content": ...}, ...]}. The tokenizer's chat template writes the conversation;
`<output>.bin/.idx` get its tokens, `<output>.mask.bin/.idx` 1 for every token of an assistant's answer and 0 for the
others. Tuning finds the mask beside the tokens (nemo_ee/models/datasets.py) and takes its loss on answers only.

The place of an answer: a template with {% generation %} marks defines it. With any other, answer i is the text that

    template(messages[:i + 1])  has more than  template(messages[:i], add_generation_prompt=True)

and a template for which these are not beginnings of the whole conversation is refused. Of an empty answer the end of
the turn counts, which the template writes behind it.

Options: conf/preprocess_chat.yaml. Problems are collected and reported as in preprocess_text.py; nothing half-written
stays behind.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import hydra
import numpy
from omegaconf import DictConfig
from pydantic import Field
from tqdm import tqdm

from nemo_ee.commands import console
from nemo_ee.commands.command import command
from nemo_ee.settings.user_input import Text, rule
from nemo_ee.text.text_files import TextError, read_document

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lib/

from lib.dataset_files import existing_problems, forget_samples, replacing
from lib.input_files import find_files, read_fields
from lib.preprocess_settings import DTYPES, PreprocessError, PreprocessSettings, check_end
from lib.vocabulary import Vocabulary, choose_dtype, load_tokenizer

ROLES = ("system", "user", "assistant", "tool")
ANSWERS = "assistant"
# The marks as transformers searches for them.
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatConfig(PreprocessSettings):
    """The settings of conf/preprocess_chat.yaml, one field per key."""

    text_extensions: ClassVar[tuple[str, ...]] = ()

    messages_key: Text
    chat_template: Text | None
    pad_to: Annotated[Annotated[int, Field(ge=2)] | None, rule("a whole number of tokens from 2, or null")]


@dataclasses.dataclass
class Counts:
    """Counts of the written data."""

    conversations: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    cut: int = 0  # longer than pad_to, and written
    left_out: int = 0  # no token of an answer within pad_to
    empty_answers: int = 0  # in the written conversations; only the text that the template puts behind them counts


class ChatTokenizer:
    """A tokenizer and its chat template.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        directory: directory of the tokenizer.
    """

    def __init__(self, tokenizer: Any, directory: str) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary.of(tokenizer, directory)
        self.marks_answers = bool(_MARKS_ANSWERS.search(tokenizer.get_chat_template()))

    def encode(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and a mask of those that belong to an assistant's answer.

        Raises:
            ValueError: the template refuses the conversation, the places of the answers are unknown, or the model does
                not have a token.
        """
        if self.marks_answers:
            encoded = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            ids, counts = list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
        else:
            text = self._apply(messages, tokenize=False)
            spans = self._spans(messages, text)
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids = list(encoded["input_ids"])
            counts = [
                any(begin < end_of_answer and end > start_of_answer for start_of_answer, end_of_answer in spans)
                for begin, end in encoded["offset_mapping"]
            ]
        if not any(counts):
            raise ValueError(
                "the template writes no token of an answer; check its text for an assistant's message, or leave a "
                "conversation without an answer out"
            )
        if problem := self.vocabulary.problem(ids):
            raise ValueError(problem)
        return ids, counts

    def _spans(self, messages: Sequence[dict[str, str]], text: str) -> list[tuple[int, int]]:
        """The places of the answers in the template's text."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != ANSWERS:
                continue
            before = self._apply(messages[:index], tokenize=False, add_generation_prompt=True)
            after = self._apply(messages[: index + 1], tokenize=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"the chat template writes the text before messages[{index}] differently when more messages "
                    "follow, so the place of the answer is unknown; use a template with {% generation %} marks "
                    "(chat_template=...), or conversations that end with their only answer"
                )
            spans.append((len(before), len(after)))
        return spans

    def _apply(self, messages: Sequence[dict[str, str]], **options: Any) -> Any:
        try:
            if not messages:  # transformers reads the first message to see whether several conversations are given
                return self.tokenizer.apply_chat_template([[]], **options)[0]
            return self.tokenizer.apply_chat_template(list(messages), **options)
        except Exception as error:  # a template is a program of its own and may fail in any way
            raise ValueError(f"the chat template refuses it: {error}") from error


def message_problem(messages: list[Any]) -> str | None:
    """The problem of a conversation with any template, or None."""
    if not messages:
        return "no messages"
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"messages[{index}] is a JSON {type(message).__name__}, not an object with role and content"
        missing = [key for key in ("role", "content") if key not in message]
        if missing:
            return f"messages[{index}] has no {' and no '.join(missing)}"
        if message["role"] not in ROLES:
            return f"messages[{index}].role = {message['role']!r} is not one of {', '.join(ROLES)}; rename it"
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            return f"messages[{index}].content is a JSON {kind}, not a string; only text is supported"
    if not any(message["role"] == ANSWERS for message in messages):
        return f"no message of the {ANSWERS}, so nothing would count in the loss; leave the conversation out"
    return None


def load_chat_tokenizer(config: ChatConfig) -> ChatTokenizer:
    """The tokenizer with its template, or with that of the file `chat_template`.

    Raises:
        PreprocessError: no tokenizer, no template, or a tokenizer without the places of its tokens in a text.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    problems = []
    if config.chat_template is not None:
        if Path(config.chat_template).is_file():
            try:
                tokenizer.chat_template = read_document(Path(config.chat_template))
            except TextError as error:
                problems.append(f"chat_template: {error}")
        else:
            problems.append(f"chat_template: {config.chat_template} is not a file; null takes the tokenizer's own")
    elif not tokenizer.chat_template:
        problems.append(
            f"tokenizer: {config.tokenizer} has no chat template; give a file with one (Jinja), chat_template=..."
        )
    if not tokenizer.is_fast:
        problems.append(f"tokenizer: {config.tokenizer} has no tokenizer.json, which is needed to locate tokens")
    if (config.append_eod or config.pad_to) and tokenizer.eos_token_id is None:
        problems.append(f"tokenizer: {config.tokenizer} has no eos_token for append_eod, pad_to; set False and null")
    if problems:
        raise PreprocessError(problems)
    return ChatTokenizer(tokenizer, config.tokenizer)


def preprocess(config: ChatConfig) -> Counts:
    """Write `<output>.bin/.idx` and `<output>.mask.bin/.idx`.

    Raises:
        PreprocessError: every problem of the settings, or every problem in the data. Nothing is left behind then.
    """
    files, problems = find_files(config)
    finished = [Path(config.output + suffix) for suffix in (".mask.bin", ".mask.idx", ".bin", ".idx")]
    if not config.overwrite:
        problems += existing_problems(finished)
    chat, dtype = None, config.dtype
    try:
        chat = load_chat_tokenizer(config)
    except PreprocessError as error:
        problems += error.problems
    else:
        dtype, more = choose_dtype(config.dtype, chat.vocabulary.largest + 1)
        problems += more
        problems += check_end(config.tokenizer, chat.tokenizer.eos_token_id if config.append_eod else None)
    if problems:
        raise PreprocessError(problems)
    with replacing(finished) as partial:
        counts = _write(config, files, chat, dtype, partial)
        forget_samples(config.output)
    return counts


def conversations(
    files: Sequence[Path], config: ChatConfig, chat: ChatTokenizer, problems: list[str], bar: tqdm
) -> Iterator[tuple[list[int], list[bool], int]]:
    """Token ids, answers and number of empty answers of every conversation; problems are added to `problems` as
    file:line."""
    for path in files:
        found, known = 0, len(problems)
        for place, messages in read_fields(path, config, "messages_key", list, problems, bar):
            found += 1
            problem = message_problem(messages)
            if problem is None:
                try:
                    encoded = chat.encode(messages)
                except ValueError as error:
                    problem = str(error)
                else:
                    yield *encoded, sum(one["role"] == ANSWERS and not one["content"] for one in messages)
            if problem is not None:
                problems.append(f"{place}: {problem}")
        if not found and len(problems) == known:
            problems.append(f"{path}: holds no conversation")


def _write(config: ChatConfig, files: list[Path], chat: ChatTokenizer, dtype: str, targets: Sequence[Path]) -> Counts:
    """Write into `targets` (mask, its index, data, its index); raises PreprocessError for problems in the data."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    masks = IndexedDatasetBuilder(str(targets[0]), dtype=numpy.uint8)
    tokens = IndexedDatasetBuilder(str(targets[2]), dtype=DTYPES[dtype])
    problems: list[str] = []
    counts = Counts()
    end = chat.tokenizer.eos_token_id
    try:
        with tqdm(
            total=sum(path.stat().st_size for path in files),
            unit="B",
            unit_scale=True,
            desc="read",
            file=console.messages(),
        ) as bar:
            for ids, answers, empty in conversations(files, config, chat, problems, bar):
                if problems:  # the rest is only read for its problems
                    continue
                if config.append_eod and ids[-1] != end:
                    ids, answers = [*ids, end], [*answers, False]
                if config.pad_to is not None:
                    if not any(answers[: config.pad_to]):
                        counts.left_out += 1
                        continue
                    counts.cut += len(ids) > config.pad_to
                    missing = max(0, config.pad_to - len(ids))
                    ids = ids[: config.pad_to] + [end] * missing
                    answers = answers[: config.pad_to] + [False] * missing
                tokens.add_document(ids, [len(ids)])
                masks.add_document([int(answer) for answer in answers], [len(ids)])
                counts.conversations += 1
                counts.empty_answers += empty
                counts.tokens += len(ids)
                counts.answer_tokens += sum(answers)
                bar.set_postfix(conversations=counts.conversations, refresh=False)
    finally:
        masks.data_file.close()
        tokens.data_file.close()
    if not problems and not counts.conversations:
        problems.append(f"input: none of the {counts.left_out} conversations has an answer within pad_to; raise it")
    if problems:
        raise PreprocessError(problems)
    masks.finalize(str(targets[1]))
    tokens.finalize(str(targets[3]))
    return counts


@hydra.main(version_base="1.3", config_path="../../conf", config_name="preprocess_chat")
def main(cfg: DictConfig) -> None:
    """Run with the options of conf/preprocess_chat.yaml."""
    with command(cfg):
        counts = preprocess(ChatConfig.from_config(cfg))
        console.show(
            f"{cfg.output}: {counts.conversations} conversations, {counts.tokens} tokens, {counts.answer_tokens} of "
            f"them in answers; {counts.cut} cut at pad_to, {counts.left_out} left out, {counts.empty_answers} empty "
            "answers"
        )


if __name__ == "__main__":
    main()
