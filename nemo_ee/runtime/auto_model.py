# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The runtime behind two calls of transformers: `from_pretrained` and `generate`.

The export copies this file and what it imports into `hf_early_exit/`, where `AutoModelForCausalLM.from_pretrained(...,
trust_remote_code=True)` finds it; nothing here needs nemo_ee to be installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor, Tensor

from nemo_ee.exits.block_reader import RENAMED_KEYS
from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.generation.engine import EarlyExitEngine, GenerationResult
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.runtime.loader import load_model
from nemo_ee.text.special_tokens import GENERATION_CONFIG, end_of_text, optional_settings

# Arguments that `AutoModelForCausalLM.from_pretrained` passes on and that have no effect here. Those in the second
# line are for fetching files from the Hub; here the files are in a local directory already.
_IGNORED = {"adapter_kwargs", "attn_implementation", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors"}
_IGNORED |= {"cache_dir", "code_revision", "force_download", "local_files_only", "revision", "token"}


class EarlyExitCausalLM:
    """A model with early exits for decoding; it is not a `torch.nn.Module`.

    Attributes:
        config: transformers' config.
        generation_config: the values of the directory's generation_config.json, empty without one.
        model: the `RuntimeModel`.
        engine: the decoding engine of the model, with all of its modes.
    """

    def __init__(self, config: Any, directory: str, *, device: str | torch.device, dtype: Any) -> None:
        self.config = config
        self.generation_config = _generation_config(Path(directory))
        self.model = load_model(directory, device=device, dtype=dtype)
        self.engine = EarlyExitEngine(self.model)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing. transformers 4.53 and later call it on classes of a directory, so that saving copies them."""

    @classmethod
    def from_pretrained(cls, directory: str, *, config: Any = None, **settings: Any) -> EarlyExitCausalLM:
        """Load a local directory.

        Args:
            directory: `hf_early_exit/` of an export.
            config: given by transformers.
            settings: `torch_dtype` or `dtype` (a dtype, its name, or "auto", the default: fp32 on the CPU, else as
                stored) and `device_map` or `device` (one device).

        Raises:
            ValueError: an unsupported setting, or a directory that cannot be loaded.
        """
        dtype = _first(settings.pop("torch_dtype", None), settings.pop("dtype", None))
        device = _first(settings.pop("device_map", None), settings.pop("device", None), "cpu")
        if not isinstance(device, str | torch.device | int) or device in ("auto", "balanced", "sequential"):
            raise ValueError(f"device_map={device!r}: this model runs on one device; give 'cuda:0' or 'cpu'")
        if isinstance(device, int):
            device = torch.device("cuda", device)
        known = {key for key in settings if key in _IGNORED or settings[key] in (None, False)}
        if settings.keys() - known:
            raise ValueError(
                f"{', '.join(sorted(settings.keys() - known))}: not supported here; use torch_dtype and device_map"
            )
        return cls(config, directory, device=device, dtype=None if dtype == "auto" else dtype)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    def eval(self) -> EarlyExitCausalLM:
        """Returns the model itself, which has only this mode."""
        return self

    @torch.inference_mode()
    def __call__(self, input_ids: LongTensor) -> Tensor:
        """The full model's logits. `input_ids`: `[b, s]`, without padding. Returns `[b, s, v]`, fp32.

        Raises:
            ValueError: more tokens than the model has positions.
        """
        batch, length = input_ids.shape
        if length > self.model.max_positions:
            raise ValueError(f"{length} tokens are more than the model's {self.model.max_positions} positions")
        positions = TokenPositions.of({row: range(length) for row in range(batch)}, self.device)
        cache = self.model.new_cache(batch, length, ())
        hidden = self.model.embed(input_ids.flatten().to(self.device), positions)
        hidden = self.model.run(hidden, positions, 0, 2 * self.model.num_layers, cache)
        return self.model.exit_logits(None, hidden, positions, cache).view(batch, length, -1)

    def generate(
        self,
        input_ids: LongTensor,
        attention_mask: LongTensor | None = None,
        *,
        early_exit_threshold: float | Mapping[str, float] | None = None,
        early_exit_criterion: str = "max_probability",
        early_exits: Sequence[str] | None = None,
        max_pending_tokens: int | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        return_result: bool = False,
        **others: Any,
    ) -> LongTensor | tuple[LongTensor, GenerationResult]:
        """Generate; each token leaves at the first exit whose confidence passes its threshold.

        Args:
            input_ids: `[b, s]`, padded on either side where `attention_mask` is 0.
            early_exit_threshold: None decodes at full depth; else one for all exits, or one for each by name.
            early_exit_criterion, early_exits, max_pending_tokens: `criterion`, `active` and `max_pending_tokens` of
                `ExitPolicy`.
            max_new_tokens, do_sample ... seed: length of the answer, and sampling parameters.
            eos_token_id: ids that end a sequence, one or several; None = generation_config.json's, else the config's.
                The tokenizer is not read.
            pad_token_id: fills sequences that ended earlier; None = generation_config.json's, else the config's, else
                the end token.
            return_result: also return the engine's result: exits, layers, confidences.

        Returns:
            `[b, s + n]`, int64, the prompts with the new tokens behind them.

        Raises:
            ValueError: every problem of the call.
        """
        others.pop("token_type_ids", None)  # some tokenizers always return them; these models have one token type
        for key in others:
            if key in RENAMED_KEYS:
                raise ValueError(f"{key} is now {RENAMED_KEYS[key]}")
        if others:
            raise ValueError(f"{', '.join(sorted(others))}: not supported here; use the stock class for it")
        sampling = SamplingParams(
            greedy=not do_sample, temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, seed=seed,
        )  # fmt: skip
        policy = None
        if early_exit_threshold is not None:
            active = None if early_exits is None else tuple(early_exits)
            policy = ExitPolicy(early_exit_threshold, early_exit_criterion, active, max_pending_tokens)
        stops = self._stops() if eos_token_id is None else _list(eos_token_id)
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        result = self.engine.generate(
            [row[mask.bool()].tolist() for row, mask in zip(input_ids, kept, strict=True)],
            max_new_tokens=max_new_tokens,
            mode="full" if policy is None else "early_exit",
            policy=policy,
            sampling=sampling,
            stop_tokens=stops,
        )
        stored = self.generation_config.get("pad_token_id", getattr(self.config, "pad_token_id", None))
        longest, fill = max(map(len, result.tokens)), _first(pad_token_id, stored, *stops, 0)
        new = torch.tensor([[*own, *[fill] * (longest - len(own))] for own in result.tokens], device=input_ids.device)
        tokens = torch.cat((input_ids, new), dim=1)
        return (tokens, result) if return_result else tokens

    def _stops(self) -> list[int]:
        config = {"eos_token_id": getattr(self.config, "eos_token_id", None)}
        return list(end_of_text(self.generation_config, config, None, vocab_size=self.model.vocab_size).ids)


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def _generation_config(directory: Path) -> dict[str, Any]:
    path = directory / GENERATION_CONFIG
    return optional_settings(path) or {}


def _list(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)
