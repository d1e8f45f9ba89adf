# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Generate text with an early-exit `.nemo`: check the request against the file, load, decode.

request -> config and tokenizer of the file -> every problem of the two -> weights -> decoding engine
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer
from omegaconf import DictConfig, OmegaConf

from nemo_ee.checkpoint.members import TOKENIZER_FOLDER
from nemo_ee.checkpoint.nemo_archive import NemoArchive
from nemo_ee.checkpoint.tokenizer_files import stored_end_of_text
from nemo_ee.checkpoint.unpacked import unpacked
from nemo_ee.commands.certified_generation import probes_of
from nemo_ee.commands.generation_request import OUTPUT_KEYS, GenerationRequest
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.criteria import OF_LOGITS, PROBE
from nemo_ee.exits.probe import ExitProbe
from nemo_ee.generation.decoding_model import DecodingModel, ExitPoint, with_probes
from nemo_ee.generation.policy import plan_exits
from nemo_ee.generation.request import Request
from nemo_ee.generation.session import DecodingSession
from nemo_ee.generation.stats import FINAL, DecodingStats, Failure, TokenEvent
from nemo_ee.generation.validation import request_problems, token_problems, too_long
from nemo_ee.megatron.decoding.pipelined_decoding import DecodingStage, PipelinedDecodingModel, open_decoding_model
from nemo_ee.models.connector import EarlyExitSaveRestoreConnector, read_config
from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel
from nemo_ee.models.run_config import merge_model_config
from nemo_ee.models.trainer import single_run_trainer
from nemo_ee.text import special_tokens
from nemo_ee.text.stop_strings import EndStrings
from nemo_ee.text.token_view import Detokenizer, TokenText
from nemo_ee.text.tokenizer_directory import readable_tokenizer

logger = logging.getLogger(__name__)


NO_END_OF_TEXT = "stop_on_eos=True, but neither model nor tokenizer names an end-of-text token; set stop_on_eos=False"


@dataclasses.dataclass(frozen=True)
class Generated:
    """The answer to one prompt.

    Attributes:
        prompt: text of the prompt.
        tokens: the text of each new token, with its exit.
        events: the engine's event of each new token.
        finish_reason: `stop`, `length`, or `error` if the answer ended early.
        error: the message of that error.
    """

    prompt: str
    tokens: tuple[TokenText, ...]
    events: tuple[TokenEvent, ...]
    finish_reason: str
    error: str | None = None

    @property
    def text(self) -> str:
        """The new text."""
        return "".join(token.text for token in self.tokens)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for a line of JSON."""
        tokens = [
            {
                "text": token.text,
                "id": event.token,
                "exit": FINAL if event.exit is None else event.exit,
                "layer": event.layer,
                "confidence": event.confidence,
                "logprob": event.logprob,
            }
            for token, event in zip(self.tokens, self.events, strict=True)
        ]
        line = {"prompt": self.prompt, "text": self.text, "finish_reason": self.finish_reason, "tokens": tokens}
        line |= {} if self.error is None else {"error": self.error}
        assert line.keys() <= set(OUTPUT_KEYS), "keys of a prompt's line must not be overwritten"
        return line


class TextGenerator:
    """Text in, text out, over a decoding engine. It is a context manager whose end releases the other pipeline stages.

    Args:
        model: the model that decodes.
        tokenizer: NeMo's tokenizer.
        request: settings of generation; its prompts are not read.
        end_of_text: token ids that end a text; None = the tokenizer's end-of-text token.
    """

    def __init__(
        self,
        model: DecodingModel,
        tokenizer: Any,
        request: GenerationRequest,
        end_of_text: Sequence[int] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.request = model, tokenizer, request
        own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.end_of_text = own if end_of_text is None else tuple(end_of_text)
        self.stats: DecodingStats | None = None
        self.seconds = 0.0
        self.num_failed = 0

    def check(self, prompts: Sequence[str]) -> list[Request]:
        """The engine's requests for these prompts.

        Raises:
            ValueError: all problems of all prompts, with the prompt's number.
        """
        limits = (self.model.max_positions, self.model.vocab_size)
        problems = list(_prompt_problems(self.request, prompts, self.tokenizer, self.end_of_text, *limits))
        if not problems:
            requests = [self._request(prompt) for prompt in prompts]
            for index, own in enumerate(requests):
                problems += request_problems(self.model, f"prompt {index}", own)
        _raise(problems)
        return requests

    def __enter__(self) -> TextGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self.model, PipelinedDecodingModel):
            self.model.close()

    def generate(
        self, prompts: Sequence[str], on_token: Callable[[TokenText], None] | None = None
    ) -> Iterator[Generated]:
        """Answers in the order of the prompts; `batch_size` prompts are decoded at a time, the next one as soon as one
        of them ends. A failed answer is returned with its `error`; `num_failed` counts them.

        Args:
            prompts: texts of the prompts.
            on_token: called with every new token, for a display.

        Raises:
            ValueError: as `check`, before anything runs.
        """
        requests = self.check(prompts)
        session = self._start(requests)
        texts: list[list[TokenText]] = [[] for _ in prompts]
        events: list[list[TokenEvent]] = [[] for _ in prompts]
        ends: dict[int, TokenEvent | Failure] = {}
        detokenizers = [Detokenizer(self.decode, own.prompt) for own in requests]
        to_come = iter(requests)
        given = 0
        started = time.perf_counter()
        while given < len(prompts):
            while session.num_free_slots and (request := next(to_come, None)) is not None:
                session.add(request)
            for event in session.step():
                index = event.sequence
                if event.finish_reason is not None:
                    ends[index] = event
                if isinstance(event, Failure):
                    continue
                events[index].append(event)
                text = detokenizers[index].push(event.token, last=event.finish_reason is not None)
                texts[index].append(TokenText(text, event.exit))
                if on_token is not None:
                    on_token(texts[index][-1])
            while given in ends:
                self.seconds += time.perf_counter() - started
                end = ends.pop(given)
                error = end.message if isinstance(end, Failure) else None
                self.num_failed += error is not None
                yield Generated(prompts[given], tuple(texts[given]), tuple(events[given]), end.finish_reason, error)
                started = time.perf_counter()
                given += 1
        stats = session.stats([event for own in events for event in own])
        self.stats = stats if self.stats is None else _sum(self.stats, stats)

    def _request(self, prompt: str) -> Request:
        request = self.request
        ids = prompt_ids(self.tokenizer, prompt, request.add_BOS)
        return Request(
            tuple(ids),
            request.tokens_to_generate,
            request.sampling,
            stop_tokens=frozenset(self.end_of_text if request.stop_on_eos else ()),
            min_new_tokens=request.min_tokens_to_generate,
            ends=EndStrings(self.decode, request.end_strings, ids) if request.end_strings else None,
        )

    def _start(self, requests: Sequence[Request]) -> DecodingSession:
        """An empty session in which each of these requests has room."""
        request, engine = self.request, self.request.engine(self.model)
        longest = max(len(own.prompt) + own.max_new_tokens for own in requests)
        return engine.start(
            [],
            mode=request.mode,
            policy=request.policy,
            num_slots=min(request.batch_size, len(requests)),
            max_length=min(longest, self.model.max_positions),
        )

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        return decode(self.tokenizer, ids)


def open_generator(cfg: DictConfig, request: GenerationRequest) -> TextGenerator | None:
    """Load the model for a request. Every rank must call it.

    Args:
        cfg: the script's config; `trainer` and `model` are read.
        request: made from the same config.

    Returns:
        On the first pipeline stage the generator. Later stages execute its commands within this call, which returns
        None when the generator's context ends.

    Raises:
        ValueError: all problems of the request with the file's config and tokenizer, before weights are loaded.
            `TextGenerator.check` raises those that need the loaded tokenizer.
    """
    stored = read_config(request.path)
    model_config = merge_model_config(stored, cfg.model)
    # All layers, also of a file that was tuned up to its deepest exit.
    model_config.update({"full_depth": True, "sequence_parallel": False})
    probes = check_request(request, stored)
    trainer = single_run_trainer(cfg)
    model = MegatronEarlyExitGPTModel.restore_from(
        str(request.path),
        override_config_path=model_config,
        trainer=trainer,
        save_restore_connector=EarlyExitSaveRestoreConnector(verify=cfg.model.verify),
    )
    if str(cfg.trainer.precision).startswith("bf16"):
        model.model.bfloat16()
    minutes = cfg.model.distributed_timeout_minutes
    decoder = open_decoding_model(model.model, model.placements, timeout_minutes=minutes, probes=probes)
    if isinstance(decoder, DecodingStage):
        decoder.serve()
        return None
    end = stored_end_of_text(request.path, model.tokenizer.eos_id)
    if request.stop_on_eos and end.differs and trainer.is_global_zero:
        logger.warning("%s: %s", request.path, end.differs)
    return TextGenerator(decoder, model.tokenizer, request, end.ids)


def check_request(request: GenerationRequest, stored: DictConfig) -> Mapping[str, ExitProbe]:
    """Check a request against the config of its `.nemo`.

    Returns:
        The exits' probes, where the criterion needs them.

    Raises:
        ValueError: every problem, in one message.
    """
    problems: list[str] = []
    probes: Mapping[str, ExitProbe] = {}
    block = OmegaConf.to_container(stored.get("early_exit") or OmegaConf.create(), resolve=True)
    if request.mode != "full":
        if not block.get("exits") and not block.get("every"):
            problems.append(
                f"{request.path} has no exits; add some with examples/megatron_gpt_early_exit_convert.py, "
                "or use mode=full"
            )
        else:
            exits = EarlyExitConfig.from_mapping(block, num_layers=stored.num_layers).exits
            points = sorted((ExitPoint(one.name, one.layer, one.stop) for one in exits), key=lambda one: one.stop)
            policy = request.policy
            if request.criterion == PROBE and request.mode != "static_depth":
                try:
                    probes = probes_of(request)
                except ValueError as problem:
                    problems.append(str(problem))
                    policy = dataclasses.replace(policy, criterion=OF_LOGITS[0])
            try:
                plan_exits(request.mode, policy, with_probes(points, probes), stored.num_layers)
            except ValueError as problem:
                problems.append(str(problem))
    tokenizer = stored_tokenizer(request.path, stored)
    if tokenizer is not None:
        positions = stored.get("max_position_embeddings") or stored.encoder_seq_length
        end = stored_end_of_text(request.path, tokenizer.eos_id)
        problems += _prompt_problems(request, request.prompts, tokenizer, end.ids, positions, stored.get("vocab_size"))
    _raise(problems)
    return probes


def _raise(problems: Sequence[str]) -> None:
    if problems:
        lines = dict.fromkeys(f"  {one}" for one in problems)  # a problem of all prompts is listed once
        raise ValueError("nothing was generated:\n" + "\n".join(lines))


def _prompt_problems(
    request: GenerationRequest,
    prompts: Sequence[str],
    tokenizer: Any,
    end_of_text: Sequence[int],
    positions: int,
    vocab_size: int | None,
) -> Iterator[str]:
    if request.add_BOS and tokenizer.bos_id is None:
        yield "add_BOS=True, but the tokenizer has no begin-of-text token; set add_BOS=False"
        return
    if request.stop_on_eos and not end_of_text:
        yield NO_END_OF_TEXT
    for index, prompt in enumerate(prompts):
        ids = prompt_ids(tokenizer, prompt, request.add_BOS)
        length = len(ids)
        if not length:
            yield f"prompt {index} ({prompt!r}) has no tokens; write something or set add_BOS=True"
            continue
        if vocab_size is not None:
            yield from token_problems(vocab_size, f"prompt {index}", ids)
        if length + request.tokens_to_generate > positions:
            rule = f"the model's {positions} positions"
            most = request.tokens_to_generate
            yield f"prompt {index}: {too_long(length, most, 'tokens_to_generate', positions, rule)}"


def stored_tokenizer(path: Path, stored: DictConfig) -> Any:
    """The Hugging Face tokenizer of a `.nemo`, bundled or in a local directory; None = not readable before the model
    is restored; then the prompts are checked after that."""
    if stored.tokenizer.library != "huggingface":
        return None
    with NemoArchive(path) as archive, ExitStack() as stack:
        folder = Path(str(stored.tokenizer.get("type")))
        if archive.has(TOKENIZER_FOLDER):
            folder = stack.enter_context(unpacked(archive, [TOKENIZER_FOLDER])) / TOKENIZER_FOLDER
        if not folder.is_dir():
            return None
        with readable_tokenizer(folder) as readable:
            return get_nmt_tokenizer(library="huggingface", model_name=str(readable), use_fast=True)


def prompt_ids(tokenizer: Any, prompt: str, add_bos: bool | None) -> list[int]:
    """Token ids of a prompt: `nemo_ee.text.special_tokens.prompt_ids` behind NeMo's wrapper.

    Args:
        tokenizer: NeMo's tokenizer.
        prompt: text of the prompt.
        add_bos: see `prompt_ids`; a tokenizer that is not transformers' adds no tokens by itself.
    """
    if is_transformers(tokenizer):
        return special_tokens.prompt_ids(tokenizer.tokenizer, prompt, add_bos)
    ids, bos = list(tokenizer.text_to_ids(prompt)), tokenizer.bos_id
    return [bos, *ids] if add_bos and ids[:1] != [bos] else ids


def is_transformers(tokenizer: Any) -> bool:
    """Whether NeMo's tokenizer is a wrapper around one of transformers."""
    return hasattr(tokenizer, "include_special_tokens")


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Text of token ids, special tokens included if the tokenizer can tell them apart.

    A model may have more rows than its tokenizer has tokens; such ids have no text.
    """
    if is_transformers(tokenizer):  # NeMo's own ids_to_text fails on ids without a token
        return tokenizer.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return tokenizer.ids_to_text(ids)


def _sum(one: DecodingStats, other: DecodingStats) -> DecodingStats:
    """Sum of the statistics of two calls."""
    tokens = one.num_tokens + other.num_tokens
    depth = one.mean_depth * one.num_tokens + other.mean_depth * other.num_tokens
    return DecodingStats(
        num_prompt_tokens=one.num_prompt_tokens + other.num_prompt_tokens,
        num_tokens=tokens,
        tokens_per_exit={name: count + other.tokens_per_exit[name] for name, count in one.tokens_per_exit.items()},
        mean_depth=depth / tokens if tokens else 0.0,
        num_layers=one.num_layers,
        computed_layers=one.computed_layers + other.computed_layers,
        drafted=one.drafted + other.drafted,
        accepted=one.accepted + other.accepted,
        num_verifications=one.num_verifications + other.num_verifications,
        num_fallbacks=one.num_fallbacks + other.num_fallbacks,
        evaluations={
            name: one.evaluations.get(name, 0) + other.evaluations.get(name, 0)
            for name in dict.fromkeys([*one.evaluations, *other.evaluations])
        },
    )
