# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Let a chat model write conversations with itself, as text to tune its exits on.

python scripts/data/collect_own_chats.py model=export/hf_early_exit output=data/own-chats.jsonl.gz

The chat template up to the user's text is the prompt of a question; what the model writes there is a question of the
kind that it was trained on (Magpie, arXiv 2406.08464), and its answer is text as it will write it (on-policy). Full
depth, on the CPU. A line is {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}, which
scripts/data/preprocess_chat.py reads. Questions that do not end, are too short or are duplicates are left out.

An answer of `max_answer_tokens` is cut, and looks ended afterwards: tune on such text by distillation, whose target is
the model's own distribution, or raise the limit.

Options: conf/collect_own_chats.yaml. Output appears under its name only when complete.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import hydra
from omegaconf import DictConfig
from pydantic import AfterValidator
from tqdm import tqdm

from nemo_ee.commands.command import command
from nemo_ee.commands.console import messages, show
from nemo_ee.settings.fields import AboveZero, BelowOne, FilePath, Seed
from nemo_ee.settings.script_input import ScriptInput
from nemo_ee.settings.user_input import Natural, Positive

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lib/

from lib.collected_texts import CollectionPath, digest_of, files_of
from lib.dataset_files import replacing

if TYPE_CHECKING:
    from nemo_ee.runtime.model import RuntimeModel

_TO_ANSWER = {"add_generation_prompt": True, "tokenize": False}
_MARK = "\ufffe\ufdd0question\ufdd1"


def _is_a_directory(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError("is no directory; give hf_early_exit or hf_full of an export")
    return path


class OwnChatSettings(ScriptInput):
    """The settings of conf/collect_own_chats.yaml, one field per key."""

    headline: ClassVar = "Nothing was written"

    overwrite: bool
    model: Annotated[FilePath, AfterValidator(_is_a_directory)]
    output: CollectionPath
    conversations: Positive
    held_out_share: BelowOne
    min_question_characters: Natural
    max_question_tokens: Positive
    max_answer_tokens: Positive
    question_temperature: AboveZero
    answer_temperature: AboveZero
    top_k: Positive
    batch_size: Positive
    seed: Seed
    threads: Positive


class Generate(Protocol):
    """Draws new tokens of prompts."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        most: int,
        temperature: float,
        top_k: int,
        seeds: Sequence[int],
        stops: Collection[int],
    ) -> Iterable[Sequence[int]]:
        """New tokens of each prompt, at most `most`; the first of `stops`, if one comes, is the last."""
        ...


class ChatWriter:
    """A model that writes conversations with itself.

    Args:
        settings: the script's settings.
        tokenizer: the model's, of transformers.
        generate: draws the model's tokens.
        max_positions: the model's.

    Attributes:
        cut: number of answers so far that were cut.

    Raises:
        ValueError: no chat template or no end of a turn, or the model is too short.
    """

    def __init__(self, settings: OwnChatSettings, tokenizer: Any, generate: Generate, *, max_positions: int) -> None:
        self.settings, self.tokenizer, self.generate = settings, tokenizer, generate
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"{settings.model}: its tokenizer has no chat template; give a chat model")
        written = self.tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
        self.opening, mark, closing = written.partition(_MARK)
        ends = self._ids(closing)[:1] if mark else []
        if not ends or ends[0] not in self.tokenizer.all_special_ids:
            raise ValueError(
                f"{settings.model}: its chat template puts no special token behind a user's text, so there is no way "
                "to see where a question ends"
            )
        self.stops = {ends[0], self.tokenizer.eos_token_id} - {None}
        self.cut = 0
        written = self.tokenizer.apply_chat_template([{"role": "user", "content": ""}], **_TO_ANSWER)
        longest = len(self._ids(written)) + settings.max_question_tokens + settings.max_answer_tokens
        if longest > max_positions:
            raise ValueError(
                f"a conversation of {longest} tokens (template, max_question_tokens, max_answer_tokens) is longer "
                f"than the model's {max_positions} positions; lower one of the two"
            )

    def chats(self) -> Iterator[dict[str, Any]]:
        """Conversations, each question once, as many as the settings say, batch by batch."""
        own, seen, seed, tries = self.settings, set(), self.settings.seed, 0
        while len(seen) < own.conversations:
            if tries > 10 * own.conversations + 100:
                raise ValueError(
                    f"only {len(seen)} of {tries} questions can be used; check the model, raise the limits"
                )
            missing = own.conversations - len(seen)
            seeds = range(seed, seed + min(own.batch_size, missing + missing // 4 + 4))  # some questions are left out
            questions: dict[str, int] = {}  # with the seed, which is that of the answer too
            openings = [self._ids(self.opening)] * len(seeds)
            written = self._write(openings, own.max_question_tokens, own.question_temperature, seeds)
            for one, (text, ended) in zip(seeds, written, strict=True):
                text = text.strip()
                if ended and len(text) >= own.min_question_characters and text not in seen:
                    questions.setdefault(text, one)
            questions = dict(list(questions.items())[:missing])
            seen.update(questions)
            turns = [[{"role": "user", "content": text}] for text in questions]
            prompts = [self._ids(self.tokenizer.apply_chat_template(one, **_TO_ANSWER)) for one in turns]
            answers = self._write(prompts, own.max_answer_tokens, own.answer_temperature, list(questions.values()))
            for question, (answer, ended) in zip(turns, answers, strict=True):
                self.cut += not ended
                yield {"messages": [*question, {"role": "assistant", "content": answer.strip()}]}
            seed, tries = seeds.stop, tries + len(seeds)

    def _write(
        self, prompts: Sequence[Sequence[int]], most: int, temperature: float, seeds: Sequence[int]
    ) -> Iterator[tuple[str, bool]]:
        """Texts of the model, and whether each came to its end."""
        if not prompts:
            return
        written = self.generate(
            prompts, most=most, temperature=temperature, top_k=self.settings.top_k, seeds=seeds, stops=self.stops
        )
        for tokens in written:
            ended = tokens[-1] in self.stops
            yield self.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True), ended

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def with_runtime(model: RuntimeModel) -> Generate:
    """Draws with our runtime: a text depends on its seed alone."""
    from nemo_ee.generation.engine import EarlyExitEngine
    from nemo_ee.generation.sampling import SamplingParams

    engine = EarlyExitEngine(model)

    def generate(prompts, *, most, temperature, top_k, seeds, stops):
        sampling = [SamplingParams(greedy=False, temperature=temperature, top_k=top_k, seed=seed) for seed in seeds]
        result = engine.generate(prompts, max_new_tokens=most, mode="full", sampling=sampling, stop_tokens=stops)
        return result.tokens

    return generate


def collect(settings: OwnChatSettings) -> tuple[int, int, int]:
    """Write the conversations. Returns the numbers of training and held-out ones, and of cut answers in them."""
    import torch

    from nemo_ee.runtime.loader import load_model, load_tokenizer

    torch.set_num_threads(settings.threads)
    tokenizer, model = load_tokenizer(settings.model), load_model(settings.model)
    writer = ChatWriter(settings, tokenizer, with_runtime(model), max_positions=model.max_positions)
    paths, counts = files_of(settings.output)[:2], [0, 0]
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if settings.output.name.endswith(".gz") else open
    with replacing(paths) as partial, opener(partial[0], "wt", encoding="utf-8") as training:
        with opener(partial[1], "wt", encoding="utf-8") as held_out:
            progress = tqdm(writer.chats(), "chats", settings.conversations, dynamic_ncols=True, file=messages())
            for chat in progress:
                share = int(digest_of(chat["messages"][0]["content"])[:8], 16) / 2**32
                kind = int(share < settings.held_out_share)
                (training, held_out)[kind].write(json.dumps(chat, ensure_ascii=False) + "\n")
                counts[kind] += 1
    return counts[0], counts[1], writer.cut


@hydra.main(version_base="1.3", config_path="../../conf", config_name="collect_own_chats")
def main(cfg: DictConfig) -> None:
    """Run with the options of conf/collect_own_chats.yaml."""
    with command(cfg):
        training, held_out, cut = collect(OwnChatSettings.from_config(cfg))
        show(f"conversations: {training} to train on, {held_out} held out; {cut} answers were cut")


if __name__ == "__main__":
    main()
