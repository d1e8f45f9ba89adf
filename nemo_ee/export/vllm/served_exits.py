# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What is served: the exits of a directory, the settings of the server, and what vLLM must not do with it.

    vllm serve hf_early_exit --additional-config '{"early_exit": {"thresholds": 0.9}}'

Keys of `early_exit`, which go over those of config.json's `early_exit`:

    thresholds      number, or exit -> number; applies to requests without thresholds of their own
    criterion       max_probability (default), margin, entropy
    active          exits to load; default: those that thresholds names, or all
    only_if_faster  evaluate exits only at batch sizes where this saves time; default true
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vllm.config import CUDAGraphMode
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from nemo_ee.exits.criteria import OF_LOGITS, PROBE
from nemo_ee.export.vllm.counts import ExitCounts, new_counts_file, publish
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.runtime.exported_model import ExitEntry, exported_model
from nemo_ee.settings.user_input import Text, UserInput, read

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger("vllm.nemo_ee")
LOGITS_PROCESSOR = "nemo_ee.export.vllm.requests:RequestThresholds"
_RECORD = "NEMO_EE_VLLM_SERVER"  # environment variable
_FORMATS_WITHOUT_NAMES = ("dummy", "sharded_state", "runai_streamer_sharded")  # they do not call `load_weights`


class ServerSettings(UserInput):
    """`early_exit` of --additional-config."""

    thresholds: float | dict[str, float] | None = None
    criterion: Text = OF_LOGITS[0]
    active: tuple[Text, ...] | None = None
    only_if_faster: bool = True


@dataclass(frozen=True)
class ServedExits:
    """Exits and settings.

    Attributes:
        exits: the exits whose heads are loaded, in the order of their taps.
        criterion: criterion of every confidence.
        policy: of requests without thresholds of their own; None = they run to full depth.
        only_if_faster: exits are evaluated only where this saves time.
    """

    exits: tuple[ExitEntry, ...]
    criterion: str
    policy: ExitPolicy | None
    only_if_faster: bool

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> ServedExits:
        """Read the table of exits in config.json, and the settings.

        Raises:
            ValueError: every problem of the settings, or a table that is not one.
        """
        config = vllm_config.model_config.hf_config
        block = config.early_exit
        given = (vllm_config.additional_config or {}).get("early_exit") or {}
        if given.get("criterion", block.get("criterion")) != block.get("criterion") and "thresholds" not in given:
            raise ValueError("early_exit: criterion without thresholds, whose meaning it changes; state both")
        stored = {key: block[key] for key in ("thresholds", "criterion", "active") if key in block}
        settings = read(ServerSettings, {**stored, **given}, headline="early_exit of --additional-config")
        exits = exported_model(config.to_dict(), vllm_config.model_config.model).exits
        usable = [exit for exit in exits if exit.architecture != "layer"]
        if settings.criterion == PROBE:
            raise ValueError(
                f"early_exit: criterion={PROBE!r}: vLLM's plugin reads no hidden states; use one of "
                f"{', '.join(OF_LOGITS)}"
            )
        names = settings.thresholds if isinstance(settings.thresholds, dict) else [exit.name for exit in usable]
        active = tuple(settings.active if settings.active is not None else names)
        # Checks every name, also without thresholds.
        chosen = ExitPolicy(
            1.0 if settings.thresholds is None else settings.thresholds, settings.criterion, active=active
        )
        attending = sorted({exit.name for exit in exits if exit.architecture == "layer"} & set(active))
        if attending:
            raise ValueError(
                f"early_exit: exits {', '.join(attending)} have a transformer layer of their own, for which vLLM's "
                "cache has no place; leave them out of thresholds and active"
            )
        chosen.evaluated_exits([exit.point for exit in usable])
        return cls(
            tuple(exit for exit in usable if exit.name in active),
            settings.criterion,
            None if settings.thresholds is None else chosen,
            settings.only_if_faster,
        )


def hook_after(stock: type[VerifyAndUpdateConfig] | None) -> type[VerifyAndUpdateConfig]:
    """vLLM's hook for the configuration of a stock architecture: gives a directory with exits the plugin's class.

    Args:
        stock: vLLM's own hook of this architecture, or None.
    """

    class EarlyExitDirectory(stock or VerifyAndUpdateConfig):
        @classmethod
        def verify_and_update_model_config(cls, model_config: ModelConfig) -> None:
            super().verify_and_update_model_config(model_config)
            block = getattr(model_config.hf_config, "early_exit", None)
            if isinstance(block, Mapping) and block.get("exits"):
                name = f"EarlyExit{model_config.architecture}"
                model_config.hf_config.architectures = [name]
                model_config.model_arch_config = model_config.get_model_arch_config()
                info = model_config.registry.inspect_model_cls([name], model_config)
                model_config._model_info, model_config._architecture = info

    return EarlyExitDirectory


class EarlyExitChecks(VerifyAndUpdateConfig):
    """vLLM's hook for the configuration of the plugin's own architectures."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuse what cannot be served, and switch off what would give wrong answers.

        Raises:
            ValueError: every problem in one message.
        """
        served, problems = None, list(_problems(vllm_config))
        try:
            served = ServedExits.of(vllm_config)
        except ValueError as problem:
            problems.append(str(problem))
        if problems:
            raise ValueError("early exit: " + "; ".join(problems))
        if vllm_config.cache_config.enable_prefix_caching:
            logger.info("early exit: no prefix caching, since keys and values of skipped layers are approximate")
            vllm_config.cache_config.enable_prefix_caching = False
        # A captured graph has no exits: which layers run depends on data.
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        model_config = vllm_config.model_config
        model_config.logits_processors = [*(model_config.logits_processors or ()), LOGITS_PROCESSOR]
        names = [exit.name for exit in served.exits]
        path = new_counts_file(len(names), vllm_config.parallel_config.data_parallel_size)
        publish(ExitCounts(names, path))
        ServerRecord(served.exits, served.criterion, path).write()


def _problems(vllm_config: VllmConfig) -> Iterator[str]:
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    if parallel.pipeline_parallel_size > 1:
        yield f"pipeline_parallel_size={parallel.pipeline_parallel_size} is not supported, use tensor parallelism"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding is not supported, serve hf_full with hf_exit_<name> as its draft model"
    if vllm_config.lora_config is not None:
        yield "LoRA is not supported, serve hf_full"
    # vLLM reads the checkpoint's own quantisation after this hook.
    quantised = model.quantization or getattr(model.hf_config, "quantization_config", None)
    if quantised:
        yield "quantised weights are not supported, serve hf_full"
    if vllm_config.load_config.load_format in _FORMATS_WITHOUT_NAMES:
        yield f"load_format={vllm_config.load_config.load_format} is not supported, use auto"
    if vllm_config.kv_transfer_config is not None or vllm_config.cache_config.kv_offloading_size is not None:
        yield "KV transfer and offloading are not supported: keys and values of skipped layers are approximate"
    if model.enable_sleep_mode:
        yield "sleep mode is not supported: it would lose the copied projections of the skipped layers"
    if vllm_config.use_v2_model_runner:
        yield "vLLM's model runner V2 is not supported, set VLLM_USE_V2_MODEL_RUNNER=0"


class ServerRecord(NamedTuple):
    """What every process of a server must know, also those that do not get the configuration.

    Attributes:
        exits, criterion: as in `ServedExits`.
        counts_file: of `nemo_ee.export.vllm.counts`; "" = none on this host.
    """

    exits: tuple[ExitEntry, ...]
    criterion: str
    counts_file: str

    def write(self) -> None:
        """Set the environment variable, which child processes inherit. A process has one server."""
        entries = [dataclasses.asdict(exit) for exit in self.exits]
        os.environ[_RECORD] = json.dumps({**self._asdict(), "exits": entries})

    @classmethod
    def read(cls) -> ServerRecord | None:
        """The record of this server; None on another host than its first process."""
        if _RECORD not in os.environ:
            return None
        values = json.loads(os.environ[_RECORD])
        return cls(**{**values, "exits": tuple(ExitEntry(**entry) for entry in values["exits"])})
