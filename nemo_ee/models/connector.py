# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Save and restore `.nemo` files with exits.

    complete      model_config.yaml, tokenizer/ and other artifacts, model_weights/ (the source's, byte for byte),
                  exit_weights/ (a distributed checkpoint of its own)
    exits-only    the same without model_weights/; `backbone_path` in the config says where the base was, seen from the
                  file (checkpoint/portable.py)
    with low-rank updates (`train: lora`, not merged): lora_weights/ beside model_weights/, which stays the source's;
                  read as W + B A unless the run trains them on
    base          any plain GPT `.nemo`: exits in the config are initialised by their `init`

Weights are read chunk by chunk under any layout. Nothing in a file is executed: the config's `target` is not imported,
the checkpoint's metadata goes through a restricted unpickler, and pickled common state is not read at all.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_ee.checkpoint.chunk_reader import ChunkReader, WeightSource
from nemo_ee.checkpoint.fingerprint import backbone_fingerprint
from nemo_ee.checkpoint.low_rank_weights import MergedSource
from nemo_ee.checkpoint.members import CONFIG_MEMBER as CONFIG
from nemo_ee.checkpoint.members import EXIT_WEIGHTS as EXITS
from nemo_ee.checkpoint.members import LORA_WEIGHTS as LORA
from nemo_ee.checkpoint.members import MODEL_WEIGHTS as BACKBONE
from nemo_ee.checkpoint.module_weights import cast_shards
from nemo_ee.checkpoint.nemo_archive import NemoArchive, write_nemo
from nemo_ee.checkpoint.portable import (
    backbone_of,
    forget_folder,
    portable_tokenizer,
    refuse_other_backbone,
    stored_backbone_path,
    without_code_files,
    without_machine_paths,
)
from nemo_ee.checkpoint.unpacked import open_nemo, unpacked
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.megatron.model.backbone_training import low_rank_shards, merged_backbone_to_save
from nemo_ee.models.run_config import without_training_setup

logger = logging.getLogger(__name__)

_RUN_ONLY = ("restore_from_path", "data", "full_depth", "val_agreement", "precision", "layer_split")


def read_config(path: str | Path) -> DictConfig:
    """The model config of a GPT's `.nemo`.

    Raises:
        ValueError: the file is damaged, or not a GPT.
    """
    with NemoArchive(path) as archive:
        text = archive.config_text()
    try:
        config = OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as problem:
        raise ValueError(f"{path}: {CONFIG} is damaged ({problem}); fetch or save the file again") from problem
    if not OmegaConf.is_dict(config) or not config.get("num_layers"):
        raise ValueError(f"{path}: {CONFIG} has no num_layers, so this is not a GPT; give the .nemo of one")
    return config


class EarlyExitSaveRestoreConnector(NLPSaveRestoreConnector):
    """NeMo's connector for early-exit models.

    Args:
        verify: `stored` compares the fingerprints in the configs, `full` recomputes the backbone's.
        exits_only: `save_to` leaves the backbone out.
        exits_dtype: `save_to` stores the exits in this dtype; None = that of the run.
    """

    def __init__(
        self, *, verify: str = "stored", exits_only: bool = False, exits_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if verify not in ("stored", "full"):
            raise ValueError(f"verify={verify!r} is not one of stored, full")
        self.verify, self.exits_only, self.exits_dtype = verify, exits_only, exits_dtype

    def restore_from(
        self,
        calling_cls,
        restore_path: str,
        override_config_path: DictConfig | str | None = None,
        map_location: torch.device | None = None,
        strict: bool = True,
        return_config: bool = False,
        trainer=None,
        *args,
        **kwargs,
    ):
        """Build the model of a `.nemo` on this rank and load its weights. See `ModelPT.restore_from`.

        Raises:
            ValueError: the file is damaged or unsafe, or the exits belong to another backbone.
        """
        stored = read_config(restore_path)
        conf = without_training_setup(stored) if override_config_path is None else override_config_path
        conf = OmegaConf.load(conf) if isinstance(conf, str) else conf
        conf = conf.model if "model" in conf else conf
        if return_config:
            return conf
        conf = OmegaConf.create(OmegaConf.to_container(conf, resolve=True))
        if conf.get("early_exit") is None:
            conf.early_exit = {"exits": []}
        if not conf.get("num_layers"):
            raise ValueError(
                f"{restore_path} is not a GPT: its model_config.yaml has no num_layers; give a GPT's .nemo"
            )
        _refuse_changed_exits(stored, conf, restore_path)
        with NemoArchive(restore_path) as archive:
            complete = archive.has(BACKBONE)
            if archive.has(LORA):
                _refuse_other_rank(stored, conf, restore_path)
        backbone_path = backbone_of(restore_path, conf.get("backbone_path"))
        expected = stored.get("backbone_fingerprint")
        found = expected if complete else read_config(backbone_path).get("backbone_fingerprint")
        with ExitStack() as stack:
            own = base = stack.enter_context(open_nemo(restore_path))
            if not complete:
                base = stack.enter_context(open_nemo(backbone_path))
            source = ChunkReader(base.folder(BACKBONE))
            weights = (BACKBONE, EXITS, LORA)
            artifacts = sorted({name.split("/")[0] for name in own.members()} - {*weights})
            folder = stack.enter_context(unpacked(own, artifacts))
            calling_cls._set_model_restore_state(is_being_restored=True, folder=str(folder))
            try:
                instance = calling_cls(cfg=conf, trainer=trainer)
            finally:
                calling_cls._set_model_restore_state(is_being_restored=False)
            self._check_backbone(instance, source, backbone_path, expected=expected, found=found)
            exits = ChunkReader(own.folder(EXITS), prefix="exits.") if own.has(EXITS) else None
            updates = ChunkReader(own.folder(LORA), prefix="") if own.has(LORA) else None
            if updates is not None and instance.early_exit.train != "lora":
                source = MergedSource(source, updates)
            instance.load_weights(source, exits, updates=updates)
        instance.backbone_path = str(backbone_path.resolve())
        instance.restored_path = str(Path(restore_path).resolve())
        if map_location is None and torch.cuda.is_available():
            map_location = torch.device("cuda", torch.cuda.current_device())  # as NeMo's own connector does
        if map_location is not None:
            instance = instance.to(map_location)
        logger.info(f"restored {type(instance).__name__} from {restore_path}")
        return instance

    def _check_backbone(
        self, model, source: WeightSource, path: Path, *, expected: str | None, found: str | None
    ) -> None:
        """Check that the exits belong to this backbone. Compute the fingerprint of a base that stores none."""
        if self.verify == "full" or found is None:
            logger.info(f"computing the fingerprint of the backbone in {path}")
            found = backbone_fingerprint(source, vocab_size=model.vocab_size)
        refuse_other_backbone(expected, found, path)
        with open_dict(model.cfg):
            model.cfg.backbone_fingerprint = found

    def save_to(self, model, save_path: str) -> None:
        """Write a `.nemo`. Every rank must call it; the file appears under its name only when it is whole.

        Raises:
            ValueError: `exits_only` with a model whose backbone was trained.
        """
        output = Path(save_path)
        changed = _backbone_changed(model)
        if self.exits_only and changed:
            raise ValueError(
                f"{output}: the backbone was trained with the exits and is in no other file, so an exits-only file "
                "would name the wrong one; save with exits_only=False"
            )
        source = None if changed else model.backbone_path
        work = output.with_name(output.name + ".weights.partial")
        if is_global_rank_zero():
            shutil.rmtree(work, ignore_errors=True)
            for folder in (EXITS, BACKBONE, LORA):
                (work / folder).mkdir(parents=True)
        _barrier()
        try:
            # Placement by stage: all ranks write the shards they own into one directory.
            exits = model.model.exit_sharded_state_dict()
            if self.exits_dtype is not None:
                cast_shards(exits, self.exits_dtype)
            dist_checkpointing.save(exits, work / EXITS)
            if _keeps_updates(model):
                dist_checkpointing.save(low_rank_shards(model.model), work / LORA)
            if source is None and not self.exits_only:
                backbone = merged_backbone_to_save(model.model, "model.")
                cast_shards(backbone, model.backbone_dtypes)
                dist_checkpointing.save(backbone, work / BACKBONE)
            _barrier()
            if is_global_rank_zero():
                for metadata in work.glob("*/.metadata"):
                    forget_folder(metadata.parent)
                self._write(model, output, work, source)
        finally:
            if is_global_rank_zero():
                shutil.rmtree(work, ignore_errors=True)
        _barrier()

    def _write(self, model, output: Path, work: Path, source: str | None) -> None:
        config = without_training_setup(OmegaConf.create(model.config_to_store))
        for key in _RUN_ONLY:
            config.pop(key, None)
        fingerprint = None if _backbone_changed(model) else model.cfg.get("backbone_fingerprint")
        config.backbone_fingerprint = fingerprint or backbone_fingerprint(
            ChunkReader(work / BACKBONE), vocab_size=model.vocab_size
        )
        config.vocab_size = model.vocab_size  # number of true rows; the padding depends on the layout
        # `train` is a setting of a run. A file holds the default.
        config.early_exit = {**model.early_exit.to_mapping(), "train": EarlyExitConfig().train}
        entries: dict = {EXITS: work / EXITS}
        if _keeps_updates(model):
            entries[LORA] = work / LORA
        with ExitStack() as stack:
            if not self.exits_only:
                entries[BACKBONE] = stack.enter_context(NemoArchive(source)) if source else work / BACKBONE
                config.pop("backbone_path", None)
            else:
                config.backbone_path = stored_backbone_path(source, output) if source else None
                logger.info(f"{output}: exits only; path of the base, relative to the file: {config.backbone_path}")
            if model.restored_path is not None:
                archive = stack.enter_context(NemoArchive(model.restored_path))
                own = (CONFIG, f"{BACKBONE}/", f"{EXITS}/", *((f"{LORA}/",) if model.trains_backbone else ()))
                entries.update({name: archive for name in archive.members() if not name.startswith(own)})
            entries.update(model.bundled_files)
            plain = without_machine_paths(OmegaConf.to_container(config, resolve=True))
            own = _explicit_tokenizer_options(plain["tokenizer"], model.restored_path)
            plain["tokenizer"], files = portable_tokenizer(plain["tokenizer"], entries, own=own)
            entries.update(files)
            entries[CONFIG] = OmegaConf.to_yaml(OmegaConf.create(plain))
            write_nemo(output, without_code_files(entries))
        logger.info(f"wrote {output}")


def _explicit_tokenizer_options(block: dict, restored: str | None) -> set[str]:
    """Keys of a tokenizer block whose values are not those of the `.nemo` that the model was restored from."""
    stored = OmegaConf.to_container(read_config(restored), resolve=True).get("tokenizer") if restored else None
    return {key for key, value in block.items() if key not in (stored or {}) or stored[key] != value}


def _keeps_updates(model) -> bool:
    """Whether a model's low-rank updates are saved beside the backbone: beside a stored one, whose weights are copied.

    A backbone that was never in a `.nemo` is written from the model, with its updates folded in.
    """
    return model.backbone_path is not None and model.early_exit.train == "lora" and not model.early_exit.lora.merge


def _backbone_changed(model) -> bool:
    """Whether a saved backbone differs from the one the model was restored with."""
    return model.trains_backbone and not _keeps_updates(model)


def _blocks(*configs: DictConfig) -> Iterator[EarlyExitConfig]:
    """The `early_exit` block of each."""
    for config in configs:
        yield EarlyExitConfig.from_mapping(
            OmegaConf.to_container(config.early_exit, resolve=True), num_layers=config.num_layers
        )


def _refuse_changed_exits(stored: DictConfig, conf: DictConfig, path: str) -> None:
    """An exit with stored weights must be built as it was saved: its weights are valid only at that place of the
    model."""
    if stored.get("early_exit") is None:
        return
    kept, wanted = _blocks(stored, conf)
    known = {exit.name: exit for exit in kept.exits}
    problems = []
    for exit in wanted.exits:
        old = known.get(exit.name, exit)
        fields = ["layer", "architecture", "init", "output"]
        fields += ["rank"] if "lora" in (old.init, exit.init) or "low_rank" in (old.output, exit.output) else []
        problems += [
            f"exit {exit.name!r} is stored with {field}={getattr(old, field)} and set to "
            f"{field}={getattr(exit, field)}"
            for field in fields
            if getattr(old, field) != getattr(exit, field)
        ]
    if problems:
        raise ValueError(
            f"{path} holds other exits under these names; leave the settings out to keep an exit as it is, or give "
            "the exit another name to start a new one:\n  " + "\n  ".join(problems)
        )


def _refuse_other_rank(stored: DictConfig, conf: DictConfig, path: str) -> None:
    """Check that stored low-rank updates of the backbone go on training with the rank they have."""
    kept, wanted = _blocks(stored, conf)
    train, kept, wanted = wanted.train, kept.lora.rank, wanted.lora.rank
    if train == "lora" and kept != wanted:
        raise ValueError(
            f"{path} holds low-rank updates of rank {kept}, and model.early_exit.lora.rank={wanted} is another; "
            f"set model.early_exit.lora.rank={kept}"
        )


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
