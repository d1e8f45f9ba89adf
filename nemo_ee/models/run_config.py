# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""A script's `model` block laid over the config stored in a `.nemo`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from omegaconf import DictConfig, OmegaConf

from nemo_ee.checkpoint.portable import backbone_of
from nemo_ee.data.token_files import clean_prefixes, is_weight, listed_prefixes, missing_files, vocabulary_problem
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.exits.placement import place_exits
from nemo_ee.models.datasets import documents_and_tokens
from nemo_ee.models.supported import needs_full_depth, planned_ranks, refuse_unsupported
from nemo_ee.planning.layer_split import LayerSplitConfig
from nemo_ee.settings.script_input import raise_problems

# Read by the scripts, not by the model.
_SCRIPT_KEYS = ("restore_from_path", "verify", "trust_checkpoint")
# The layout and the amount of data are computed from these.
_SIZES = (
    "trainer.devices", "trainer.num_nodes", "trainer.precision", "model.global_batch_size", "model.micro_batch_size",
    "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size", "model.sequence_parallel",
    "model.encoder_seq_length", "model.data.seq_length",
)  # fmt: skip
# Of a stored `optim` block; the rest (overlap, buckets, data types) belongs to the optimizer it was trained with.
_OPTIM_KEYS = ("lr", "betas", "eps", "weight_decay", "sched")


def merge_model_config(stored: DictConfig, overrides: DictConfig) -> DictConfig:
    """The config to build the model from: the script's values win; a null keeps the stored value.

    Exits: an empty list (and `every: null`) keeps the stored ones; an entry that names a stored exit takes that exit's
        settings for keys that it leaves out.

    Args:
        stored: config of the `.nemo`.
        overrides: the script's `model` block.
    """
    given = OmegaConf.to_container(overrides, resolve=True)
    given = {key: value for key, value in given.items() if key not in _SCRIPT_KEYS}
    merged = _overlay(OmegaConf.to_container(without_training_setup(stored), resolve=True), given)
    block, old = given.get("early_exit"), OmegaConf.to_container(stored, resolve=True).get("early_exit") or {}
    if block is not None:
        merged["early_exit"] = _merge_exits(block, old.get("exits") or [])
    if merged.get("encoder_seq_length") and (merged.get("data") or {}).get("seq_length", 0) is None:
        merged["data"]["seq_length"] = merged["encoder_seq_length"]
    if (merged.get("data") or {}).get("data_prefix"):
        merged["data"]["data_prefix"] = clean_prefixes(merged["data"]["data_prefix"])
    return OmegaConf.create(merged)


def without_training_setup(stored: DictConfig) -> DictConfig:
    """A copy of a `.nemo`'s config that forces no optimizer and no bf16 parameters on whoever loads it.

    Training settings do not belong to the model: NeMo would build it for the distributed optimizer, Apex or fp32
    copies. In an exits-only file the path of the base is relative to the file; in a run's config `backbone_path` is
    set by the user.
    """
    config = OmegaConf.create(OmegaConf.to_container(stored, resolve=True))
    config.pop("backbone_path", None)
    config.pop("megatron_amp_O2", None)
    config.pop("precision", None)  # NeMo writes it into every config; a run computes in trainer.precision
    if OmegaConf.is_dict(config.get("optim")):
        config.optim = {"name": "adamw", **{key: config.optim[key] for key in _OPTIM_KEYS if key in config.optim}}
    return config


def _overlay(base: dict, given: dict) -> dict:
    result = dict(base)
    for key, value in given.items():
        if value is None:
            result.setdefault(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict) and key != "data_prefix":
            result[key] = _overlay(result[key], value)
        else:
            result[key] = value
    return result


def _merge_exits(block: dict, stored: list[dict]) -> dict:
    if not block.get("exits") and not block.get("every"):
        return {**block, "exits": stored, "every": None}
    by_name = {exit["name"]: exit for exit in stored}
    entries = []
    for entry in block.get("exits") or []:
        if isinstance(entry, dict):
            architecture = entry.get("architecture") or block.get("architecture") or EarlyExitConfig().architecture
            name = entry.get("name") or f"layer{entry.get('layer')}-{architecture}"  # as EarlyExitConfig names it
            entry = {**(by_name.get(name, {}) if isinstance(name, str) else {}), **entry}
        entries.append(entry)
    return {**block, "exits": entries}


def check_run(cfg: DictConfig, model: DictConfig, wrong: Mapping[str, str] = MappingProxyType({})) -> None:
    """Problems of a tuning run that can be seen before anything is loaded, all in one message.

    Args:
        cfg: the script's config.
        model: the merged model config.
        wrong: dotted key of the script's config -> problem of its value. Checks that compute with the value are
            skipped.

    Raises:
        ValueError: lists every problem.
    """

    def right(*keys: str) -> bool:
        return not any(key.startswith(keys) for key in wrong)

    problems = list(wrong.values())
    if right("model.data"):
        data = _data_problems(model.data)
        problems += data or (_amount_problems(model) if right(*_SIZES) else []) or vocabulary_problems(model)
    problems += _model_problems(cfg, model) if right(*_SIZES) else []
    path = cfg.model.restore_from_path
    if right("model.restore_from_path", "model.backbone_path") and Path(path).exists():  # else a known problem
        problems += _problems_of(lambda: backbone_of(path, cfg.model.get("backbone_path")))
    block = model.get("early_exit") or {}
    if not block.get("exits") and not block.get("every"):
        problems.append(
            f"{cfg.model.restore_from_path} has no exits and model.early_exit names none, so nothing would "
            f"train; add "
            "some with examples/megatron_gpt_early_exit_convert.py or model.early_exit.every=1/4"
        )
    save_to = cfg.get("save_to")
    if save_to and Path(save_to).is_dir():
        problems.append(f"save_to={save_to} is a directory; give the name of a .nemo file")
    elif save_to and Path(save_to).suffix != ".nemo":
        problems.append(f"save_to={save_to} must end in .nemo")
    if cfg.get("exits_only") and not save_to and right("save_to"):
        problems.append("exits_only=True is a setting of save_to, and save_to is not given; add save_to=tuned.nemo")
    if cfg.get("exits_dtype") and not save_to and right("save_to"):
        problems.append("exits_dtype is a setting of save_to, and save_to is not given; add save_to=tuned.nemo")
    if cfg.get("exits_only") and block.get("train") == "joint":
        problems.append(
            "exits_only=True with model.early_exit.train=joint: the exits belong to the backbone that was trained "
            "with them, which only a complete file holds; set exits_only=False"
        )
    if cfg.get("exits_only") and block.get("train") == "lora" and (block.get("lora") or {}).get("merge", True):
        problems.append(
            "exits_only=True with model.early_exit.lora.merge=True: the merged backbone is in no other file; set "
            "exits_only=False or model.early_exit.lora.merge=False"
        )
    length, longest = model.get("encoder_seq_length"), model.get("max_position_embeddings")
    if length and longest and length > longest:
        problems.append(
            f"model.encoder_seq_length={length} is longer than the model's {longest} positions; shorten it"
        )
    if model.data.get("reset_attention_mask") and model.get("get_attention_mask_from_fusion", True):
        problems.append(
            "model.data.reset_attention_mask=True is ignored while the attention mask is the built-in causal one; set "
            "model.get_attention_mask_from_fusion=False too"
        )
    problems += _learning_rate_problems(model) if right("model.optim") else []
    raise_problems("the run cannot start", problems)


def _learning_rate_problems(model: DictConfig) -> list[str]:
    """Learning rates that would rise to their minimum: an exit's own lr or min_lr with the run's other one."""
    optim = model.get("optim") or {}
    sched = optim.get("sched") or {}
    if (sched.get("name") or "Constant") == "Constant":
        return []
    run_lr, run_min = optim.get("lr") or 0.0, sched.get("min_lr") or 0.0
    if run_min > run_lr:
        return [f"model.optim.sched.min_lr={run_min:g} is above model.optim.lr={run_lr:g}; lower it"]
    problems = []
    for index, entry in enumerate((model.get("early_exit") or {}).get("exits") or []):
        lr, min_lr = (entry.get(key) if OmegaConf.is_dict(entry) else None for key in ("lr", "min_lr"))
        if isinstance(lr, int | float) and min_lr is None and lr < run_min:
            problems.append(
                f"model.early_exit.exits[{index}].lr={lr:g} is below model.optim.sched.min_lr={run_min:g}, to which "
                "it would rise; give the exit a min_lr of its own"
            )
        if isinstance(min_lr, int | float) and lr is None and min_lr > run_lr:
            problems.append(
                f"model.early_exit.exits[{index}].min_lr={min_lr:g} is above model.optim.lr={run_lr:g}, which the "
                "exit takes; give the exit an lr of its own"
            )
    return problems


def _amount_problems(model: DictConfig) -> list[str]:
    """Data that cannot be read, splits without a document (on which Megatron counts epochs for ever), and training
    data that is not enough for one step, which Megatron would repeat without a word.

    The files exist. Every token but the first is a label once, so a step needs batch x length + 1.
    """
    if model.data.get("data_impl") == "mock":
        return []
    problems, documents, tokens = [], 0, 0
    for split, prefix, share in _parts_of_splits(model.data):
        try:
            found, counted = documents_and_tokens(prefix, share)
        except Exception as error:  # Megatron asserts, numpy raises, depending on the problem
            return [f"model.data.data_prefix, {split}: {prefix}.idx cannot be read ({error}); make the data anew"]
        if not found or not counted:
            problems.append(
                f"the {split} data takes {found} documents with {counted} tokens of {prefix}; give it more data, or "
                "another share in model.data.splits_string"
            )
        if split == "train":
            documents, tokens = documents + found, tokens + counted
    batch, length = model.get("global_batch_size"), model.data.get("seq_length") or model.get("encoder_seq_length")
    if problems or not batch or not length or tokens > batch * length:
        return problems
    return [
        f"the training data holds {documents:,} documents with {tokens:,} tokens, and one step needs "
        f"{batch * length + 1:,} (global_batch_size={batch} x encoder_seq_length={length} + 1); take more data, or a "
        "smaller batch or length"
    ]


def vocabulary_problems(model: DictConfig) -> list[str]:
    """Data with token ids that the model does not have; read on rank 0 alone, before any rank waits for another.

    The files exist. Without `vocab_size` in the `.nemo` the tokenizer's size counts, which only the built model has.
    """
    from nemo.utils.get_rank import is_global_rank_zero

    if model.data.get("data_impl") == "mock" or not is_global_rank_zero():
        return []
    prefixes = listed_prefixes(model.data.data_prefix)
    found = ((prefix, vocabulary_problem(prefix, model.get("vocab_size"))) for prefix in prefixes)
    return [f"model.data.data_prefix, {prefix}: {problem}" for prefix, problem in found if problem]


def _parts_of_splits(data: DictConfig) -> Iterator[tuple[str, str, tuple[float, float]]]:
    """(split, prefix, from which to which share of its documents) of everything that is read."""
    prefixes, splits = data.get("data_prefix"), ("train", "validation", "test")
    if OmegaConf.is_dict(prefixes):
        parts = [(split, prefix, (0.0, 1.0)) for split in splits for prefix in prefixes.get(split) or []]
    else:
        bounds = convert_split_vector_to_split_matrix(parse_and_normalize_split(data.splits_string))
        shares = [(split, share) for split, share in zip(splits, bounds, strict=True) if share is not None]
        parts = [(split, prefix, share) for split, share in shares for prefix in prefixes]
    yield from (part for part in parts if not is_weight(part[1]))


def _data_problems(data: DictConfig) -> list[str]:
    if data.get("data_impl") == "mock":
        return []
    prefixes: Any = data.get("data_prefix")
    prefixes = OmegaConf.to_container(prefixes) if OmegaConf.is_config(prefixes) else prefixes
    if isinstance(prefixes, dict):
        listed = {f"data_prefix, {split}": prefixes.get(split) for split in ("train", "validation", "test")}
        for split in ("validation", "test"):
            if split in prefixes and prefixes[split] is None:
                del listed[f"data_prefix, {split}"]  # not read: nothing is measured on it
    else:
        listed = {"data_prefix": prefixes}
    problems = []
    if isinstance(prefixes, list) and not data.get("splits_string"):
        problems.append(
            "model.data.splits_string is needed with a plain list of prefixes: the shares of training, validation and "
            "test, e.g. 99,1,0"
        )
    for what, values in listed.items():
        if not isinstance(values, list) or not values:
            problems.append(
                f"model.data.{what}: {values!r} is not a list of prefixes; write "
                "{train: [data/train], validation: [data/heldout], test: [data/heldout]}"
            )
            continue
        problems += [
            f"model.data.{what}: {file} does not exist; make it with scripts/data/preprocess_text.py"
            for prefix in values
            if not is_weight(prefix)
            for file in missing_files(prefix)
        ]
    return problems


def _model_problems(cfg: DictConfig, model: DictConfig) -> list[str]:
    """Problems that the model would report when it is built, after its file has been unpacked."""
    ranks, precision = planned_ranks(cfg.trainer, model), cfg.trainer.get("precision")
    problems = _problems_of(lambda: refuse_unsupported(model, world_size=ranks, precision=precision))
    if not model.get("early_exit"):
        return problems
    plain = OmegaConf.to_container(model, resolve=True)
    try:
        early_exit = EarlyExitConfig.from_mapping(plain["early_exit"], num_layers=model.num_layers)
    except ValueError as problem:
        return [*problems, str(problem)]
    if not (exits := early_exit.exits):
        return problems
    if early_exit.train == "exits" and not any(exit.trains for exit in exits):
        problems.append(
            f"nothing would train: {', '.join(early_exit.names)} are frozen copies of the backbone's modules; use "
            "output: own or low_rank, or another architecture or init"
        )
    stages = model.get("pipeline_model_parallel_size", 1)
    full_depth = needs_full_depth(model, early_exit)
    sizes = {"num_layers": model.num_layers, "num_stages": stages, "full_depth": full_depth}
    for check in (
        lambda: place_exits(exits, **sizes),
        lambda: LayerSplitConfig.from_mapping(plain.get("layer_split"), exits=exits, **sizes),
    ):
        problems += _problems_of(check)
    return problems


def _problems_of(check: Callable[[], Any]) -> list[str]:
    try:
        check()
    except ValueError as problem:
        return [str(problem)]
    return []
