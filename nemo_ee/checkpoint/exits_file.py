# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes exits that were tuned without NeMo, on Megatron-Bridge or plain Megatron-core, and reads them again.

    model_config.yaml   the model's config as NeMo stores it, with the `early_exit` block and `backbone_fingerprint`
    exit_weights/       distributed checkpoint (torch_dist), keys `exits.<name>.<parameter>`
    model_weights/      the backbone, in a complete file
    tokenizer/          tokenizer files and config.json of the source

These are the members of a `.nemo`. A path that ends in `.nemo` becomes an archive, any other path a directory.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from nemo_ee.checkpoint.chunk_reader import ChunkReader, WeightSource
from nemo_ee.checkpoint.distributed_checkpoint import save_distributed
from nemo_ee.checkpoint.fingerprint import backbone_fingerprint
from nemo_ee.checkpoint.huggingface import HuggingFaceSource
from nemo_ee.checkpoint.members import CONFIG_MEMBER, EXIT_WEIGHTS, MODEL_WEIGHTS, TOKENIZER_FOLDER
from nemo_ee.checkpoint.module_weights import cast_shards
from nemo_ee.checkpoint.nemo_archive import NemoArchive, write_nemo
from nemo_ee.checkpoint.nemo_config import nemo_config
from nemo_ee.checkpoint.portable import forget_folder, plain_config, refuse_other_backbone, without_code_files
from nemo_ee.checkpoint.unpacked import open_nemo
from nemo_ee.exits.config import EarlyExitConfig
from nemo_ee.megatron.model.early_exit_gpt_model import EarlyExitGPTModel

logger = logging.getLogger(__name__)

# The NeMo host's class, which the `target` of every `.nemo` names.
_TARGET = "nemo_ee.models.megatron_early_exit_gpt_model.MegatronEarlyExitGPTModel"


@contextmanager
def stored_exits(path: str | Path, source: HuggingFaceSource) -> Iterator[tuple[dict[str, Any], ChunkReader]]:
    """The `early_exit` block and the exits of a `.nemo` or of a directory that `save` wrote, complete or exits-only.

    Args:
        path: the file or directory, written by any host.
        source: the backbone that the exits are for.

    Raises:
        ValueError: the file is damaged, unsafe or without exits, or the exits were tuned on another backbone.
    """
    with ExitStack() as stack:
        archive = stack.enter_context(open_nemo(path))
        config = plain_config(archive)
        if not archive.has(EXIT_WEIGHTS):
            raise ValueError(f"{path} has no {EXIT_WEIGHTS}/; give an early-exit .nemo, or none to start new exits")
        found = backbone_fingerprint(source, vocab_size=source.backbone.vocab_size)
        refuse_other_backbone(config.get("backbone_fingerprint"), found, source.directory, "source")
        yield config["early_exit"], ChunkReader(archive.folder(EXIT_WEIGHTS), prefix="exits.")


def check_output(output: Path) -> None:
    """Raises ValueError where `save` would not write."""
    if output.is_dir() or (output.exists() and output.suffix != ".nemo"):
        raise ValueError(f"output={output} exists; name another directory, or a file that ends in .nemo")


def save(
    model: EarlyExitGPTModel,
    early_exit: EarlyExitConfig,
    output: str | Path,
    source: HuggingFaceSource,
    *,
    complete: bool = False,
    vocab_multiple: int = 128,
    stored: tuple[Mapping[str, Any], WeightSource] | None = None,
) -> None:
    """Write a stage's exits, and with `complete` its backbone. Every rank must call it with the same arguments.

    Args:
        model: this stage.
        early_exit: the exits of the whole model.
        output: a `.nemo`, or a directory that does not exist.
        source: the Hugging Face directory or the GGUF file of the backbone.
        complete: write the backbone too; the model must be full-depth.
        vocab_multiple: NeMo's `make_vocab_size_divisible_by`, that of the model.
        stored: what `stored_exits` gave, of a file with more exits than the model: its block stays, and all that the
            model does not have goes into the new file as it is stored.

    Raises:
        ValueError: the directory exists, the model was padded to another multiple, or `complete` for a model without
            its last layers.
    """
    output = Path(output)
    check_output(output)
    if complete and not model.full_depth:
        raise ValueError(f"{output}: this model has no layers past its deepest exit; build it with full_depth=True")
    multiple = vocab_multiple * model.config.tensor_model_parallel_size
    if model.vocab_size != -(-model.true_vocab_size // multiple) * multiple:
        raise ValueError(
            f"{output}: {model.vocab_size} rows for {model.true_vocab_size} tokens are not padded to a multiple of "
            f"vocab_multiple={vocab_multiple}; give the one that the model was built with"
        )
    work = output.with_name(f"{output.name}.weights.partial")
    first = torch.distributed.get_rank() == 0
    if first:
        shutil.rmtree(work, ignore_errors=True)
        for folder in (EXIT_WEIGHTS, *((MODEL_WEIGHTS,) if complete else ())):
            (work / folder).mkdir(parents=True)
    torch.distributed.barrier()
    exits = model.exit_sharded_state_dict()
    if stored is not None:
        exits |= _others(stored[1], {head.exit.name for head in model.exits})
    save_distributed(exits, work / EXIT_WEIGHTS)
    if complete:
        backbone = model.sharded_backbone_to_save("model.")
        cast_shards(backbone, {key: info.dtype for key, info in source.keys().items()})
        save_distributed(backbone, work / MODEL_WEIGHTS)
    torch.distributed.barrier()
    if first:
        try:
            for metadata in work.glob("*/.metadata"):
                forget_folder(metadata.parent)
            block = early_exit.to_mapping() if stored is None else stored[0]
            _add_config_and_tokenizer(work, _config(block, source, vocab_multiple), source)
            if output.suffix == ".nemo":
                write_nemo(output, {entry.name: entry for entry in work.iterdir()})
                shutil.rmtree(work, ignore_errors=True)
            else:
                work.rename(output)
        except OSError as problem:
            raise ValueError(f"{output} was not written ({problem}); the tuned exits are in {work}") from problem
        logger.info("wrote %s", output)
    torch.distributed.barrier()


def _others(weights: WeightSource, names: set[str]) -> dict[str, ShardedTensor]:
    """The stored tensors of all exits but some, whole on each rank; the first one saves them."""
    rank = torch.distributed.get_rank()
    keys = {f"exits.{key}": key for key in weights.keys() if key.split(".", 1)[0] not in names}
    shapes = {key: info.shape for key, info in weights.keys().items()}
    return {
        name: ShardedTensor.from_rank_offsets(
            name, weights.read(key, (0,) * len(shapes[key]), shapes[key]), replica_id=rank
        )
        for name, key in keys.items()
    }


def _config(early_exit: Mapping[str, Any], source: HuggingFaceSource, vocab_multiple: int) -> dict[str, Any]:
    """The model config that NeMo stores."""
    vocab_size = source.backbone.vocab_size
    return {
        **nemo_config(source.backbone),
        "target": _TARGET,
        "tokenizer": {"library": "huggingface", "type": TOKENIZER_FOLDER, "use_fast": True},
        "vocab_size": vocab_size,
        "make_vocab_size_divisible_by": vocab_multiple,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        # `train` is a setting of a run. A file holds the default.
        "early_exit": {**early_exit, "train": EarlyExitConfig().train},
        "backbone_fingerprint": backbone_fingerprint(source, vocab_size=vocab_size),
    }


def _add_config_and_tokenizer(work: Path, config: dict[str, Any], source: HuggingFaceSource) -> None:
    (work / TOKENIZER_FOLDER).mkdir()
    with TemporaryDirectory() as folder:
        source.write_model_files(Path(folder))
        found = {f"{TOKENIZER_FOLDER}/{path.name}": path for path in sorted(Path(folder).iterdir())}
        entries = {**without_code_files(found), CONFIG_MEMBER: yaml.safe_dump(config, sort_keys=False).encode()}
        for name, content in entries.items():
            (work / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content)


def pack(folder: str | Path, output: str | Path) -> Path:
    """The `.nemo` of a directory that `save` wrote, or the directory of a `.nemo`; returns the path of what it wrote.

    Raises:
        ValueError: the source is damaged or unsafe, or the output exists as a directory.
    """
    output = Path(output)
    with NemoArchive(folder) as archive:
        plain_config(archive)
        if output.suffix == ".nemo":
            return write_nemo(output, {name: archive for name in archive.members()})
        if output.exists():
            raise ValueError(f"{output} exists; name another directory")
        archive.extract(output)
        return output
