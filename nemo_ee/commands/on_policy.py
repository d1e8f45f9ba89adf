# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""On-policy tuning of an exit, from the settings of its script to the written file. One process, no NeMo."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel

from nemo_ee import cpu_host
from nemo_ee.checkpoint.atomic import own_folder
from nemo_ee.checkpoint.exits_file import check_output, save, stored_exits
from nemo_ee.checkpoint.fingerprint import backbone_fingerprint, exits_fingerprint
from nemo_ee.checkpoint.gguf_source import GgufSource, is_gguf
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.checkpoint.megatron_model import load_stage, stage_of
from nemo_ee.commands.on_policy_settings import OnPolicySettings
from nemo_ee.commands.on_policy_tuner import OnPolicyTuner
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.placement import StagePlacement, place_exits
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel
from nemo_ee.runtime.loader import load_tokenizer
from nemo_ee.text.special_tokens import end_of_text_of, prompt_ids
from nemo_ee.text.text_files import read_json_lines, sha256_of

_DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}
_SHOWN = {"round": "d", "answered_tokens": "d", "tuned_tokens": "d", "lr": ".2g"}
# The keys of an entry that steer its tuning by labels.
_IMITATION = {"objective": None, "loss_weight": None, "loss_weight_schedule": None}


def run(settings: OnPolicySettings) -> Iterator[str]:
    """Tune and save; yields what the user reads.

    Raises:
        ValueError: a problem of source, exits, prompts, folder or output, before anything is built.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the writer of checkpoints forks
    _one_process()
    check_output(settings.output)
    if not (cpu_host.enabled() or torch.cuda.is_available()):
        raise ValueError(
            f"trainer.accelerator={settings.trainer.accelerator}, but there is no GPU here; set it to cpu"
        )
    dequantised = {"dequantised": getattr(torch, settings.gguf_dtype)} if is_gguf(settings.source) else {}
    source = (GgufSource if dequantised else HuggingFaceSource)(settings.source, **dequantised)
    with own_folder(settings.folder), stored_exits(settings.exits, source) as (block, weights):
        entry = chosen(block["exits"], settings, num_layers=source.backbone.num_layers)
        with TemporaryDirectory(prefix="nemo_ee_on_policy_") as folder:
            source.write_model_files(Path(folder))
            tokenizer = load_tokenizer(folder)
            end = end_of_text_of(folder, tokenizer.eos_token_id, vocab_size=source.backbone.vocab_size)
        prompts = read_prompts(settings, tokenizer)
        longest = max(map(len, prompts)) + settings.answers.max_new_tokens
        if longest > source.backbone.max_position_embeddings:
            raise ValueError(
                f"the longest prompt and its answer have {longest} tokens, and the model has "
                f"{source.backbone.max_position_embeddings} positions; lower answers.max_prompt_tokens or "
                "answers.max_new_tokens"
            )
        one_rank()
        stage = build(source, [entry], weights, settings)
        facts = {
            "backbone": backbone_fingerprint(source, vocab_size=source.backbone.vocab_size),
            "exits": exits_fingerprint(weights, [json.dumps(block["exits"], sort_keys=True)]),
            "prompts_sha256": sha256_of(settings.prompts),
        }
        tuner = OnPolicyTuner(*stage, prompts=prompts, stop_tokens=end.ids, settings=settings, facts=facts)
        tuner.resume()
        yield f"exit {tuner.exit}, {len(prompts)} prompts, round {tuner.round} of {settings.rounds} done"
        for numbers in tuner.rounds():
            yield ", ".join(f"{key} {value:{_SHOWN.get(key, '.4g')}}" for key, value in numbers.items())
        save(*stage[:2], settings.output, source, stored=(block, weights))
    yield f"tuned exits: {settings.output}"


def chosen(entries: Sequence[dict[str, Any]], settings: OnPolicySettings, *, num_layers: int) -> dict[str, Any]:
    """The exit to tune.

    Raises:
        ValueError: it is not named, not there, has nothing to train, or cannot draft.
    """
    names = [entry["name"] for entry in entries]
    if settings.exit is None and len(names) > 1:
        raise ValueError(f"{settings.exits} has the exits {', '.join(names)}; name the one to tune, exit={names[0]}")
    if settings.exit not in (None, *names):
        raise ValueError(f"exit={settings.exit} is not in {settings.exits}; its exits are {', '.join(names)}")
    entry = entries[0 if settings.exit is None else names.index(settings.exit)]
    (exit,) = EarlyExitConfig.from_mapping({"exits": [dict(entry)]}, num_layers=num_layers).exits
    if not exit.trains:
        raise ValueError(
            f"exit={exit.name} of {settings.exits} has no weights of its own to tune ({exit.architecture}, init "
            f"{exit.init}, output {exit.output}); choose another"
        )
    if exit.stop >= 2 * num_layers:
        raise ValueError(
            f"exit={exit.name} of {settings.exits} is behind layer {exit.layer}, the last one, where a draft spares "
            "nothing; choose an earlier exit"
        )
    return entry


def _one_process() -> None:
    """Raises ValueError where this process is one of several."""
    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    if torch.distributed.is_initialized():
        ranks = max(ranks, torch.distributed.get_world_size())
    if ranks > 1:
        raise ValueError(
            f"WORLD_SIZE={ranks}, but on-policy tuning runs in one process; start the script with python, not torchrun"
        )


def read_prompts(settings: OnPolicySettings, tokenizer: Any) -> list[list[int]]:
    """Token ids of the prompts: lines {"prompt": text}, or {"messages": [...]}, of which the last answer is left out.

    Raises:
        ValueError: every problem of the file, with line numbers; no prompt is short enough.
    """

    def ids_of(line: Any) -> list[int]:
        line = line if isinstance(line, dict) else {}
        text, messages = line.get("prompt"), line.get("messages")
        if isinstance(messages, list) and messages:
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError('"messages" need a tokenizer with a chat template; give lines with a "prompt"')
            if isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
                messages = messages[:-1]
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as problem:  # whatever a template raises
                raise ValueError(f"the chat template fails on these messages: {problem}") from problem
        if not isinstance(text, str):
            raise ValueError('must be an object with a text under "prompt", or a conversation under "messages"')
        return prompt_ids(tokenizer, text)

    problems: list[str] = []
    found = [ids for _, ids in read_json_lines(settings.prompts, ids_of, problems=problems)]
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError("\n  ".join(problems[:10] + more))
    most = settings.answers.max_prompt_tokens
    short = [ids for ids in found if 1 <= len(ids) <= most]
    if not short:
        raise ValueError(
            f"{settings.prompts}: none of its {len(found)} prompts has 1 to {most} tokens; give others, or raise "
            "answers.max_prompt_tokens"
        )
    return short


def one_rank() -> None:
    """Megatron's process groups of this process alone, where there are none."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # Megatron makes gloo groups too; no network is needed
    if not torch.distributed.is_initialized():
        backend = "gloo" if cpu_host.enabled() else "nccl"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1234)


def build(
    source: HuggingFaceSource, entries: Sequence[dict[str, Any]], weights: Any, settings: OnPolicySettings
) -> tuple[EarlyExitGPTModel, EarlyExitConfig, Sequence[StagePlacement]]:
    """A full-depth model with some of the stored exits. They imitate the final exit, whatever objective, loss weight
    and schedule the file says: those are of the tuning that made it."""
    num_layers, dtype = source.backbone.num_layers, _DTYPES[settings.trainer.precision]
    block = {
        "exits": [{**entry, **_IMITATION} for entry in entries],
        "objective": "distillation",
        "distillation": {"top_k": settings.teacher_tokens},
    }
    early_exit = EarlyExitConfig.from_mapping(block, num_layers=num_layers)
    placements = place_exits(early_exit.exits, num_layers=num_layers, num_stages=1, full_depth=True)
    fields = {"params_dtype": dtype, "bf16": dtype is torch.bfloat16}
    fields |= {"use_cpu_initialization": True} if cpu_host.enabled() else {}
    model = stage_of(source.backbone, early_exit, placements, **fields)
    if not cpu_host.enabled():
        model.cuda()
    load_stage(model, source, weights, early_exit=early_exit, seed=settings.seed)
    return model, early_exit, placements
