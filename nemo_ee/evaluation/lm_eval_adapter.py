# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The model `nemo_ee` of EleutherAI's lm-evaluation-harness: its tasks on an early-exit `.nemo`.

    python -m nemo_ee.evaluation.lm_eval_adapter run --model nemo_ee \
        --model_args path=tuned.nemo,mode=early_exit,threshold=0.8 --tasks lambada_openai --batch_size 16 --device cpu

This is the command `lm_eval` itself, with one more model (importing this module registers it, since
lm-evaluation-harness 0.4 does not search other packages for models). Every scored token is read at the exit at which
it would leave (`EarlyExitEngine.score`). The first token of a continuation is read at the final exit, like the first
generated one. `mode=full` gives the log-likelihoods of the backbone. The results have the number of tokens per exit
under `config`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from omegaconf import OmegaConf
from tqdm import tqdm

from nemo_ee import cpu_host
from nemo_ee.certificates.validity import tokenizer_fingerprint
from nemo_ee.checkpoint.nemo_archive import NemoArchive
from nemo_ee.checkpoint.portable import backbone_of
from nemo_ee.commands.console import messages
from nemo_ee.evaluation.scoring_request import model_settings, scoring_request
from nemo_ee.exits.block_reader import RENAMED_KEYS
from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.request import Request
from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.generation.stats import FINAL, TokenEvent, raise_failures
from nemo_ee.text.stop_strings import EndStrings

# Tokens scored or prompted together with batch_size=auto.
AUTO_TOKENS = 8192
_GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}


@register_model("nemo_ee")
class EarlyExitLM(TemplateLM):
    """An early-exit `.nemo` for lm-eval. Under torchrun every rank of one model (tensor parallelism) must make one.

    Args:
        path: path of the `.nemo`.
        mode: `early_exit` or `full`.
        threshold: one number, or `exit:number+exit:number`; a token leaves iff its confidence is above it
            (entropy: below it).
        criterion: `max_probability`, `margin`, `entropy` or `probe`.
        exits: names of the exits at which tokens may leave, joined by `+`; None = all.
        max_pending_tokens, num_draft_tokens: see `ExitPolicy`.
        backbone_path: `.nemo` of the base model, for exits-only files whose base has moved.
        precision: 32 or bf16.
        tensor_model_parallel_size: number of ranks that share every layer.
        add_bos: whether contexts get a begin-of-text token if they do not begin with it; None = the tokenizer decides.
        max_length: most tokens that the model reads at a time, at most its positions; None = its positions. As in
            lm-eval's `hf` the last token of a text is predicted and not read, so a context and its continuation may
            have one token more.
        max_gen_toks: most new tokens if a task does not set it.
        seed: random seed of sampling, for tasks that sample.
        batch_size: sequences run together, or `auto` (8192 tokens together); results do not depend on it.
        max_batch_size: not read; lm-eval passes it to every model.
        device: `cpu` switches the CPU host on; anything else, and None, means a GPU.

    Raises:
        ValueError: all problems of the settings, before weights are loaded.
    """

    def __init__(
        self,
        path: str,
        mode: str = "early_exit",
        threshold: float | str | Mapping[str, float] = 0.9,
        criterion: str = "max_probability",
        exits: str | Sequence[str] | None = None,
        max_pending_tokens: int | None = None,
        num_draft_tokens: int | None = None,
        backbone_path: str | None = None,
        precision: int | str = 32,
        tensor_model_parallel_size: int = 1,
        add_bos: bool | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 1234,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            found = [
                f"{key} is now {RENAMED_KEYS[key]}" if key in RENAMED_KEYS else f"{key} is unknown" for key in others
            ]
            raise ValueError(f"--model_args: {'; '.join(found)}")
        self.batch_size = _batch_size(batch_size)
        if str(device).startswith("cpu"):
            cpu_host.enable()
        config = {
            "mode": mode,
            "criterion": criterion,
            "threshold": _thresholds(threshold),
            "exits": exits.split("+") if isinstance(exits, str) else exits,
            "max_pending_tokens": max_pending_tokens,
            "num_draft_tokens": num_draft_tokens,
            "add_BOS": add_bos,
            "batch_size": self.batch_size or 1,
            "trainer": {
                "accelerator": "cpu" if cpu_host.enabled() else "gpu",
                "devices": tensor_model_parallel_size,
                "num_nodes": 1,
                "precision": precision,
            },
            "model": model_settings(path, backbone_path, tensor_model_parallel_size),
        }
        self._request = scoring_request(config)
        backbone_of(path, backbone_path, option="backbone_path")
        # NeMo is imported only now: the CPU host has to be switched on before.
        from nemo_ee.commands.generate import is_transformers, open_generator

        generator = open_generator(OmegaConf.create(config), self._request)
        self._engine, self._tokenizer = EarlyExitEngine(generator.model), generator.tokenizer
        self._decode, self._end_of_text = generator.decode, frozenset(generator.end_of_text)
        # the tokenizer of transformers, for chat templates and text without special tokens
        self.tokenizer = generator.tokenizer.tokenizer if is_transformers(generator.tokenizer) else None
        self.max_length = _limited("max_length", max_length, generator.model.max_positions)
        self.max_gen_toks, self._seed = max_gen_toks, seed
        self._left_at: Counter[str] = Counter()
        self._depths = 0

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's end-of-text token."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token in front of text without context: the begin-of-text token, else the end-of-text token."""
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Key of lm-eval's requests cache: the tokenizer's fingerprint, since the `.nemo` may be replaced."""
        from nemo_ee.models.connector import read_config

        path = self._request.path
        with NemoArchive(path) as archive:
            block = OmegaConf.to_container(read_config(path).tokenizer, resolve=True)
            return f"nemo_ee-{tokenizer_fingerprint(archive, block)}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text. `add_special_tokens`: False = only those in the text, None = by `add_bos`."""
        from nemo_ee.commands.generate import prompt_ids

        return prompt_ids(self._tokenizer, string, False if add_special_tokens is False else self._request.add_BOS)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the tokenizer's template."""
        if self.tokenizer is None:
            raise ValueError(f"the tokenizer of {self._request.path} has no chat template; run without one")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """Counts of tokens per exit so far; lm-eval puts them into its results, under `config`."""
        total = sum(self._left_at.values())
        return {
            "mode": self._request.mode,
            "tokens_per_exit": dict(self._left_at),
            "mean_depth": self._depths / total if total else 0.0,
            "num_layers": self._engine.model.num_layers,
        }

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ln p of the continuation, whether it is the greedy one) for every (context, continuation)."""
        texts = [request for request in requests if any(request.args)]  # lm-eval's code fails on ("", "")
        answers = iter(super().loglikelihood(texts, disable_tqdm=disable_tqdm))
        return [next(answers) if any(request.args) else (0.0, True) for request in requests]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(ln p of the continuation, whether each of its tokens is the most likely one) for every request.

        Args:
            requests: (texts, ids of the context, ids of the continuation); contexts lose their beginning if the
                two are longer than `max_length + 1`. ln p of an empty continuation is 0.
        """
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        # A context of blanks has no tokens: lm-eval moves the blanks into the continuation.
        texts = [[*(context or [self.prefix_token_id]), *own] for _, context, own in requests]
        for index, (_, _, own) in enumerate(requests):
            if len(own) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(own)} tokens is longer than max_length={self.max_length}; score it as a "
                    "rolling task, or leave it out"
                )
            if not own:
                answers[index] = (0.0, True)
            texts[index] = texts[index][-(self.max_length + 1) :]
        open_ones = [index for index, answer in enumerate(answers) if answer is None]
        with tqdm(
            total=len(open_ones), desc="loglikelihood", disable=disable_tqdm, dynamic_ncols=True, file=messages()
        ) as bar:
            for batch in self._batches(open_ones, [len(text) for text in texts]):
                contexts = [len(texts[index]) - len(requests[index][2]) for index in batch]
                scored = self._engine.score(
                    [texts[index] for index in batch],
                    contexts,
                    mode=self._request.mode,
                    policy=self._request.policy,
                )
                self._count(scored.events)
                for index, logprobs, greedy in zip(batch, scored.logprobs, scored.is_greedy, strict=True):
                    answers[index] = (sum(logprobs), all(greedy))
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
                bar.update(len(batch))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, in windows that read `max_length` tokens and predict each token of the text once.

        A text is tokenized like a context. A begin-of-text token that the tokenizer adds is therefore predicted too,
        after the prefix token, as in lm-eval's `hf`.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            own = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in own]
            owners += [index] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (logprob, _) in zip(owners, scored, strict=True):
            sums[owner] += logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of the contexts, each up to its first stop text, the end-of-text token or its length limit."""
        given = [self._generation(*request.args) for request in requests]
        answers = [""] * len(requests)
        lengths = [len(own.prompt) + own.max_new_tokens for own, _ in given]
        with tqdm(
            total=len(requests), desc="generate", disable=disable_tqdm, dynamic_ncols=True, file=messages()
        ) as bar:
            for batch in self._batches(range(len(requests)), lengths):
                texts = self._continue([given[index] for index in batch])
                for index, text in zip(batch, texts, strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                bar.update(len(batch))
        return answers

    def _generation(self, context: str, settings: Mapping[str, Any]) -> tuple[Request, list[str]]:
        """A request to the engine and its stop texts."""
        wanted = normalize_gen_kwargs(dict(settings), self.max_gen_toks)
        unknown = sorted(set(wanted) - _GENERATION_KEYS)
        if unknown:
            raise ValueError(
                f"generation_kwargs {', '.join(unknown)}: not supported; supported are {', '.join(_GENERATION_KEYS)}"
            )
        new = wanted["max_gen_toks"]
        if new >= self.max_length:
            raise ValueError(
                f"max_gen_toks={new} leaves no room for a context within max_length={self.max_length}; "
                "lower it, e.g. --gen_kwargs max_gen_toks=..."
            )
        greedy = not wanted["do_sample"]
        sampling = SamplingParams(
            greedy=greedy,
            temperature=1.0 if greedy else float(wanted["temperature"]),
            top_k=wanted.get("top_k") or None,
            top_p=float(wanted.get("top_p", 1.0)),
            repetition_penalty=float(wanted.get("repetition_penalty", 1.0)),
            seed=self._seed,
        )
        prompt = self.tok_encode(context)[-(self.max_length - new) :] or [self.prefix_token_id]
        stops = self._stop_texts(wanted["until"])
        ends = EndStrings(self._text, stops, prompt) if stops else None
        return Request(tuple(prompt), new, sampling, self._end_of_text, ends=ends), stops

    def _stop_texts(self, until: Sequence[str]) -> list[str]:
        """A task's stop texts and, as in lm-eval's `hf`, the text of the tokenizer's end-of-text token."""
        end = None if self.eot_token_id is None else self._text([self.eot_token_id])
        return [text for text in handle_stop_sequences(list(until), eos=end) if text]

    def _continue(self, given: Sequence[tuple[Request, list[str]]]) -> list[str]:
        """Texts of one batch, without special tokens, each up to its first stop text."""
        session = self._engine.start(
            [request for request, _ in given], mode=self._request.mode, policy=self._request.policy
        )
        tokens: list[list[int]] = [[] for _ in given]
        while not session.finished:
            events = session.step()
            raise_failures(events)
            self._count(events)
            for event in events:
                tokens[event.sequence].append(event.token)
        return [
            postprocess_generated_text(self._text(own, special=False), stops, None)
            for own, (_, stops) in zip(tokens, given, strict=True)
        ]

    def _text(self, ids: list[int], *, special: bool = True) -> str:
        """Text of token ids, with or without special tokens."""
        if self.tokenizer is not None:
            return self.tokenizer.decode(ids, skip_special_tokens=not special)
        return self._decode(ids if special else [token for token in ids if token != self.eot_token_id])

    def _batches(self, indices: Iterable[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """The indices in batches, longest first, so that a lack of memory shows at once."""
        batch: list[int] = []
        for index in sorted(indices, key=lambda one: (-lengths[one], one)):
            # The first of a batch is its longest.
            limit = self.batch_size or max(1, AUTO_TOKENS // lengths[batch[0] if batch else index])
            if len(batch) == limit:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _count(self, events: Iterable[TokenEvent]) -> None:
        for event in events:
            self._left_at[FINAL if event.exit is None else event.exit] += 1
            self._depths += event.layer


def _batch_size(value: int | str) -> int | None:
    """lm-eval's `--batch_size`; None = auto."""
    if str(value).startswith("auto"):
        return None
    if not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"batch_size={value!r} must be a whole number from 1, or auto")
    return int(value)


def _thresholds(value: float | str | Mapping[str, float]) -> float | dict[str, float]:
    """One threshold, or one per exit from `exit:number+exit:number`."""
    if not isinstance(value, str):
        return dict(value) if isinstance(value, Mapping) else value
    pairs = [part.rpartition(":") for part in value.split("+")]
    try:
        if all(not colon for _, colon, _ in pairs):
            return float(value)
        return {name: float(number) for name, _, number in pairs}
    except ValueError:
        raise ValueError(f"threshold={value!r} must be a number, or exit:number+exit:number") from None


def _limited(key: str, value: int | None, limit: int) -> int:
    if value is not None and not 1 <= value <= limit:
        raise ValueError(f"{key}={value} must be from 1 to the model's {limit} positions")
    return limit if value is None else value


def main() -> None:
    """lm-eval's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
