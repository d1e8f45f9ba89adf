# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The engine in the place of the decoding loop of transformers' `generate`.

By then transformers has read the generation config, counted lengths, found the special tokens, made the mask and the
stopping criteria, repeated the prompts for `num_return_sequences` and streamed them. What follows is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import LongTensor
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from nemo_ee.generation.engine import EarlyExitEngine, GenerationResult, run_to_end
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.request import Request
from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.generation.stats import Event
from nemo_ee.generation.validation import raise_all

_MODES = ("greedy_search", "sample")
# Settings of transformers' own loops, off where they are false, 0, None or the number here.
_UNSUPPORTED = {
    **dict.fromkeys("num_beams guidance_scale typical_p encoder_repetition_penalty".split(), 1),
    **dict.fromkeys(
        """penalty_alpha dola_layers prompt_lookup_num_tokens constraints force_words_ids no_repeat_ngram_size
        encoder_no_repeat_ngram_size bad_words_ids sequence_bias epsilon_cutoff eta_cutoff forced_bos_token_id
        forced_eos_token_id exponential_decay_length_penalty suppress_tokens begin_suppress_tokens diversity_penalty
        watermarking_config remove_invalid_values renormalize_logits output_scores output_logits output_attentions
        output_hidden_states token_healing cache_implementation""".split(),
        0,
    ),
}
_ARGUMENTS = {"input_ids", "attention_mask", "stopping_criteria", "streamer", "tokenizer"}
# Logits processors that transformers makes of the settings in `_sampling` and of the minimum lengths. Others come of
# settings that a later version may add.
_PROCESSORS = {
    "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "RepetitionPenaltyLogitsProcessor",
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper",
}  # fmt: skip
_REFUSAL = "not supported with early exit; leave it out, or generate without early-exit arguments"


def unsupported_settings(config: Any, others: Mapping[str, Any]) -> list[str]:
    """Problems of a call with early exit.

    Args:
        config: the complete generation config.
        others: the other arguments of `generate`.
    """
    problems = [f"{key}: {_REFUSAL}" for key, value in others.items() if _is_given(value) and key not in _ARGUMENTS]
    for key, off in _UNSUPPORTED.items():
        value = getattr(config, key, None)
        if value and value != off:
            problems.append(f"{key}={value!r}: {_REFUSAL}")
    if config.use_cache is False:
        problems.append(f"use_cache=False: {_REFUSAL}")
    mode = config.get_generation_mode().value
    if mode not in _MODES and not problems:
        problems.append(f"generation mode {mode}: {_REFUSAL}")
    return problems


def _is_given(value: Any) -> bool:
    """Whether an argument may have an effect; empty lists, None and False have none."""
    return bool(value) if isinstance(value, list | bool) else value is not None


class SamplingLoop:
    """The loop of one call of `generate`.

    Args:
        policy: where tokens may leave; None = full depth.
        seed: random seed of the sequences; None = drawn from torch's generator.

    Attributes:
        result: the engine's result, once the call has been decoded.
    """

    def __init__(self, policy: ExitPolicy | None, seed: int | None) -> None:
        self._policy, self._seed = policy, seed
        self.result: GenerationResult | None = None

    def run(
        self,
        engine: Callable[[], EarlyExitEngine],
        input_ids: LongTensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        attention_mask: LongTensor | None = None,
        **_: Any,
    ) -> LongTensor | GenerateDecoderOnlyOutput:
        """Decode.

        Args:
            engine: makes the engine, after the call has been checked.
            input_ids: `[b, s]`, padded on either side where `attention_mask` is 0.
            logits_processor, stopping_criteria, generation_config: as transformers made them of the call.
            streamer: gets the new tokens `[b]` of each step.

        Returns:
            `[b, s + n]`, int64, the prompts with the new tokens behind them.
        """
        unknown = {type(one).__name__ for one in logits_processor} - _PROCESSORS
        problems = [f"{name}: {_REFUSAL}" for name in sorted(unknown)]
        raise_all(problems + ["synced_gpus: " + _REFUSAL] * bool(synced_gpus))
        own_engine = engine()
        rows = self._requests(own_engine, input_ids, attention_mask, stopping_criteria, generation_config)
        session = own_engine.start(rows, mode="full" if self._policy is None else "early_exit", policy=self._policy)
        pad = generation_config._pad_token_tensor
        fill = 0 if pad is None else int(pad)

        def stream(events: Sequence[Event]) -> None:
            if streamer is not None:
                new = {event.sequence: getattr(event, "token", fill) for event in events}
                streamer.put(torch.tensor([new.get(row, fill) for row in range(len(rows))]))

        self.result = run_to_end(session, len(rows), stream)
        if streamer is not None:
            streamer.end()
        longest = max(map(len, self.result.tokens))
        new = [[*own, *[fill] * (longest - len(own))] for own in self.result.tokens]
        tokens = torch.cat((input_ids, torch.tensor(new, device=input_ids.device)), dim=1)
        return GenerateDecoderOnlyOutput(sequences=tokens) if generation_config.return_dict_in_generate else tokens

    def _requests(
        self,
        engine: EarlyExitEngine,
        input_ids: LongTensor,
        attention_mask: LongTensor | None,
        stopping_criteria: Sequence[Any],
        config: Any,
    ) -> list[Request]:
        padded, kept = input_ids.tolist(), torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # The call's own criteria may be in the place of those of the config. transformers ignores ids outside the
        # vocabulary.
        ends = [one.eos_token_id for one in stopping_criteria if isinstance(one, EosTokenCriteria)]
        ids = {token for own in ends for token in own.flatten().tolist()}
        stops = frozenset(token for token in ids if 0 <= token < engine.model.vocab_size)
        most = min(one.max_length for one in stopping_criteria if isinstance(one, MaxLengthCriteria))
        most -= input_ids.shape[1]
        least = max(config.min_new_tokens or 0, (config.min_length or 0) - input_ids.shape[1], 0)
        others = [one for one in stopping_criteria if not isinstance(one, MaxLengthCriteria | EosTokenCriteria)]
        copies, seeds = config.num_return_sequences or 1, [0] * len(padded)
        if self._seed is not None:
            seeds = [self._seed + row % copies for row in range(len(padded))]
        elif config.do_sample:
            seeds = torch.randint(2**62, (len(padded),)).tolist()
        return [
            Request(
                tuple(token for token, own in zip(row, mask, strict=True) if own),
                most,
                _sampling(config, seed),
                stops,
                min_new_tokens=least,
                ends=_ends(others, row, input_ids.device) if others else None,
            )
            for row, mask, seed in zip(padded, kept.tolist(), seeds, strict=True)
        ]


def _sampling(config: Any, seed: int) -> SamplingParams:
    def given(key: str, default: float) -> float:
        value = getattr(config, key, None)
        return default if value is None else value

    return SamplingParams(
        greedy=not config.do_sample,
        temperature=given("temperature", 1.0),
        top_k=config.top_k or None,
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
        repetition_penalty=given("repetition_penalty", 1.0),
        seed=seed,
    )


def _ends(criteria: Sequence[Any], prompt: list[int], device: torch.device) -> Callable[[Sequence[int]], bool]:
    """The rule by which other stopping criteria (stop strings, a time limit, the caller's own) end a sequence."""
    rules = StoppingCriteriaList(criteria)

    def ends(new: Sequence[int]) -> bool:
        # transformers passes no scores either, unless they are to be returned
        return bool(rules(torch.tensor([[*prompt, *new]], device=device), None)[0])

    return ends
