# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Add exits to a pre-trained model: Hugging Face directory, GGUF file or `.nemo` in, early-exit `.nemo` out.

    read config -> check everything -> build -> load -> initialise exits -> write -> read back -> compare logits

Every tensor keeps its dtype of the source, also where dtypes differ (bfloat16 matrices, float32 norms); float64
becomes float32. Quantised tensors of a GGUF file are dequantised, rows by rows.

A `.nemo` source keeps its weights byte for byte and the exits it already has. The written file is read again and its
full model's logits are compared: bitwise with those before writing, and for a Hugging Face source with those of
`transformers`.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from omegaconf import DictConfig, OmegaConf

from nemo_ee.checkpoint.chunk_reader import dtype_shares
from nemo_ee.checkpoint.gguf_source import GgufSource, is_gguf
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.checkpoint.members import CONFIG_MEMBER
from nemo_ee.checkpoint.nemo_config import nemo_config
from nemo_ee.checkpoint.portable import backbone_of
from nemo_ee.checkpoint.tokenizer_files import plain_json_object
from nemo_ee.commands.convert_settings import ConvertSettings
from nemo_ee.exits.config import OBJECTIVES, TOKEN_WEIGHTS, TRAIN_MODES, EarlyExitConfig
from nemo_ee.families.rotary_settings import with_both_spellings
from nemo_ee.megatron.pipeline.stage_forward import full_model_logits
from nemo_ee.models.connector import EarlyExitSaveRestoreConnector, read_config
from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel
from nemo_ee.models.run_config import merge_model_config
from nemo_ee.models.supported import planned_ranks, refuse_unsupported
from nemo_ee.models.trainer import single_run_trainer
from nemo_ee.settings.script_input import raise_problems, script_problems
from nemo_ee.text.json_values import check_model_files
from nemo_ee.text.tokenizer_directory import TOKENIZER_FILES

# Tolerances relative to the largest logit. fp32: the same sums in another order; GPUs may use TF32; bf16 has 8 bits.
LOGIT_TOLERANCE = 1e-5

logger = logging.getLogger(__name__)

_LOOSER_TOLERANCES = {"cuda": 5e-3, "bf16": 5e-2}
_BUNDLED_FILES = (*TOKENIZER_FILES, "generation_config.json")

# Settings of a tuning run -> the values other than the defaults. The tune script does not read them from a file.
_OF_A_RUN = {"train": TRAIN_MODES[1:], "objective": OBJECTIVES[1:], "token_weights": TOKEN_WEIGHTS[1:]}


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        output: the written file.
        exits: names of all exits in it.
        added: names of the new exits.
        fingerprint: the backbone's fingerprint.
        logit_difference: largest difference from `transformers`, relative to the largest logit; None = not compared.
    """

    output: Path
    exits: tuple[str, ...]
    added: tuple[str, ...]
    fingerprint: str
    logit_difference: float | None


def convert(cfg: DictConfig) -> Conversion:
    """Run a conversion; `cfg` is conf/megatron_gpt_early_exit_convert.yaml. Every rank must call it.

    Raises:
        ValueError: all problems of source, output and exits in one message, before anything is built; at the
            end, the logits of the written file differ (it is removed).
    """
    with ExitStack() as stack:
        return _convert(cfg, stack)


def _convert(cfg: DictConfig, stack: ExitStack) -> Conversion:
    problems = script_problems(ConvertSettings, cfg)
    source, output = (Path(str(OmegaConf.select(cfg, key, throw_on_missing=False))) for key in ("source", "output"))
    texts = [one.text for one in problems]
    base: dict = {}
    opened: _Opened | None = None
    config: EarlyExitConfig | None = None
    if all(one.where == "output" for one in problems):  # the checks below need valid settings other than the output
        for key, values in _OF_A_RUN.items():
            if (value := cfg.model.early_exit.get(key)) in values:
                texts.append(
                    f"model.early_exit.{key}={value!r}: a conversion trains nothing; give it to the tune script"
                    f"{', or as the objective of single entries of exits' if key == 'objective' else ''}"
                )
        defaults = EarlyExitConfig().to_mapping()
        for key in ("distillation", "lora"):
            block = cfg.model.early_exit.get(key) or {}
            given = {name: value for name, value in block.items() if value not in (None, defaults[key][name])}
            texts += [
                f"model.early_exit.{key}={given}: a conversion trains nothing; give it to the tune script"
            ] * bool(given)
        try:
            opened = _opened(cfg, source, stack)
            base = _base_config(cfg, source, opened)
        except ValueError as problem:
            texts.append(str(problem))
    if base:
        for check in (_refuse_unsupported, _exits):
            try:
                config = check(cfg, base)
            except ValueError as problem:
                texts.append(str(problem))
    raise_problems("nothing was converted", texts)
    base["early_exit"] = config.to_mapping()
    model_config = OmegaConf.create({**base, "full_depth": True})

    trainer = single_run_trainer(cfg)
    model = _build(cfg, source, opened, model_config, trainer)
    _warn_of_tokens_without_rows(model)
    tokens = _probe_tokens(model, cfg.probe_tokens)
    before = full_model_logits(model.context, tokens)
    difference = None
    if opened is not None and opened.files == source and cfg.compare_with_transformers:
        difference = _compare_with_transformers(source, tokens, before, model)
    model.save_to(str(output))
    del model
    _check_written(cfg, output, tokens, before)
    stored = OmegaConf.to_container(read_config(output))
    already = {exit["name"] for exit in (base.get("_stored_exits") or [])}
    names = config.names
    return Conversion(
        output, names, tuple(n for n in names if n not in already), stored["backbone_fingerprint"], difference
    )


@dataclass(frozen=True)
class _Opened:
    """A source that is no `.nemo`: its weights, and the directory of its config.json and tokenizer."""

    weights: HuggingFaceSource
    files: Path


def _opened(cfg: DictConfig, source: Path, stack: ExitStack) -> _Opened | None:
    """A Hugging Face directory or a GGUF file, whose other files are made for as long as `stack` lasts; None for a
    `.nemo`."""
    length = cfg.model.get("encoder_seq_length")
    if is_gguf(source):
        weights = GgufSource(source, length, getattr(torch, cfg.gguf_dtype))
        files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nemo_ee-")))
        weights.write_model_files(files)
        return _Opened(weights, files)
    if not source.is_dir() or (source / CONFIG_MEMBER).is_file():
        return None
    check_model_files(source)
    return _Opened(HuggingFaceSource(source, length), source)


def _base_config(cfg: DictConfig, source: Path, opened: _Opened | None) -> dict:
    """The source's model config with the script's settings, without exits."""
    overrides = OmegaConf.to_container(cfg.model, resolve=True)
    overrides.pop("early_exit", None)
    if opened is None:
        backbone_of(source, overrides.get("backbone_path"))
        stored = read_config(source)
        merged = OmegaConf.to_container(merge_model_config(stored, OmegaConf.create(overrides)))
        block = OmegaConf.to_container(stored).get("early_exit") or {}
        merged["_stored_exits"] = block.get("exits") or []
        return merged
    merged = {key: value for key, value in overrides.items() if value is not None}
    tokenizer = {"library": "huggingface", "type": str(opened.files.resolve()), "use_fast": True}
    return {**nemo_config(opened.weights.backbone), "tokenizer": tokenizer, **merged, "_stored_exits": []}


def _refuse_unsupported(cfg: DictConfig, base: Mapping) -> None:
    """Problems that building the model would raise, found before its weights are unpacked."""
    settings = {**base, "early_exit": OmegaConf.to_container(cfg.model.early_exit, resolve=True)}
    config = OmegaConf.create(settings)
    refuse_unsupported(config, world_size=planned_ranks(cfg.trainer, config), precision=cfg.trainer.precision)


def _exits(cfg: DictConfig, base: Mapping) -> EarlyExitConfig:
    """Stored exits and the new ones, checked together."""
    block = OmegaConf.to_container(cfg.model.early_exit, resolve=True)
    stored = base["_stored_exits"]
    new = block.get("exits") or []
    config = EarlyExitConfig.from_mapping({**block, "exits": [*stored, *new]}, num_layers=base["num_layers"])
    if not config.exits:
        raise ValueError(
            "model.early_exit has no exits; add model.early_exit.every=1/4 or model.early_exit.exits=[{layer: 3}]"
        )
    return config


def _build(
    cfg: DictConfig, source: Path, opened: _Opened | None, config: DictConfig, trainer
) -> MegatronEarlyExitGPTModel:
    config.pop("_stored_exits")
    if opened is None:
        return MegatronEarlyExitGPTModel.restore_from(
            str(source),
            override_config_path=config,
            trainer=trainer,
            save_restore_connector=EarlyExitSaveRestoreConnector(verify=cfg.verify),
        )
    weights, files = opened.weights, opened.files
    model = MegatronEarlyExitGPTModel(config, trainer)
    if torch.cuda.is_available():
        model = model.to(torch.device("cuda", torch.cuda.current_device()))
    model.load_weights(weights, None)
    infos = weights.keys()
    model.backbone_dtypes = {key: info.dtype for key, info in infos.items()}
    logger.info(f"{source}: every tensor is stored in its dtype there: {dtype_shares(infos)}")
    model.bundled_files = {f"tokenizer/{name}": files / name for name in _BUNDLED_FILES if (files / name).is_file()}
    # config.json decides the tokenizer's class if tokenizer_config.json does not name it.
    model.bundled_files["tokenizer/config.json"] = files / "config.json"
    return model


def _warn_of_tokens_without_rows(model: MegatronEarlyExitGPTModel) -> None:
    """Log the token ids that the tokenizer has and the model does not have."""
    vocabulary = getattr(getattr(model.tokenizer, "tokenizer", None), "get_vocab", dict)()
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= model.vocab_size)
    if beyond:
        first = ", ".join(f"{number} {token!r}" for number, token in beyond[:3])
        logger.warning(
            f"the tokenizer has {len(beyond)} token ids outside the model's vocabulary 0..{model.vocab_size - 1}: "
            f"{first}{', ...' if len(beyond) > 3 else ''}. Tuning, evaluation and generation refuse texts with such "
            "tokens; leave them out of the data"
        )


def _probe_tokens(model: MegatronEarlyExitGPTModel, count: int) -> torch.Tensor:
    """[1, n] tokens spread over the whole vocabulary, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    count = min(count, model.cfg.encoder_seq_length)
    count -= count % model.cfg.get("tensor_model_parallel_size", 1)  # sequence parallelism splits the tokens evenly
    return torch.randint(0, model.vocab_size, (1, count), generator=generator)


@torch.no_grad()
def _compare_with_transformers(source: Path, tokens: torch.Tensor, ours: torch.Tensor | None, model) -> float | None:
    """Relative difference between the logits and those of `transformers` on the same weights, in fp32, on rank 0 of
    the last stage."""
    if ours is None or parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_data_parallel_rank():
        return None
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    values = plain_json_object((source / "config.json").resolve())
    config_class = CONFIG_MAPPING[values["model_type"]]
    known = with_both_spellings(values) if model.cfg.position_embedding_type == "rope" else values
    reference = AutoModelForCausalLM.from_pretrained(
        source, config=config_class.from_dict(known), torch_dtype=torch.float32, trust_remote_code=False
    )
    theirs = reference(tokens).logits
    difference = ((ours.cpu() - theirs).abs().max() / theirs.abs().max()).item()
    logger.info(f"full model against transformers: largest logit difference {difference:.2e} of the largest logit")
    tolerance = LOGIT_TOLERANCE if ours.device.type == "cpu" else _LOOSER_TOLERANCES["cuda"]
    if model.torch_dtype is not torch.float32:
        tolerance = _LOOSER_TOLERANCES["bf16"]
    if not difference <= tolerance:
        raise ValueError(
            f"the converted model's logits differ from transformers' by {difference:.2e} of the largest logit, more "
            f"than {tolerance:.0e}; nothing was written. {_reasons(values, config_class().to_dict())}"
        )
    return difference


def _reasons(values: Mapping, defaults: Mapping) -> str:
    """Reasons why the installed transformers may compute another model than a config.json describes.

    Args:
        values: content of the file.
        defaults: defaults of the config's class in the installed transformers.
    """
    import transformers

    unknown = sorted(values.keys() - defaults.keys() - {"rope_parameters", "dtype"})
    keys = f"does not read its keys {', '.join(unknown)}" if unknown else "reads all of its keys"
    return (
        f"config.json was saved by transformers {values.get('transformers_version', 'of an unknown version')}; the "
        f"installed {transformers.__version__} {keys}. If the two versions read the file differently, "
        "compare_with_transformers=False converts without this check. Else the conversion is wrong: please report the "
        "model's config.json"
    )


def _check_written(cfg: DictConfig, output: Path, tokens: torch.Tensor, before: torch.Tensor | None) -> None:
    """Read the file back and compare the full model's logits, bitwise; a file that differs is removed."""
    config = merge_model_config(read_config(output), OmegaConf.create({**cfg.model, "early_exit": None}))
    config.full_depth = True
    again = MegatronEarlyExitGPTModel.restore_from(
        str(output), override_config_path=config, trainer=single_run_trainer(cfg)
    )
    after = full_model_logits(again.context, tokens)
    same = torch.tensor(float(after is None or torch.equal(after, before)))
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(same, op=torch.distributed.ReduceOp.MIN)
    if not same.item():
        with contextlib.suppress(FileNotFoundError):
            output.unlink()
        raise ValueError(f"{output} was written but reads back with other logits; it was removed. Check the disk.")
    logger.info(f"{output}: read back, the full model's logits are unchanged")
