# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Data that is made again under the same prefix gives the samples of the new data, on every split and rank."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import megatron_models

import torch  # isort: skip  # after the CPU host is on
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list
from omegaconf import OmegaConf

from nemo_ee.models.datasets import prepare_dataset
from nemo_ee.models.sample_index import content_keyed_index, make_index_folder
from tests.helpers.ranks import run_ranks

LENGTH, SAMPLES = 16, [48, 20, 20]
Samples = list[list[list[int]]]


def documents(count: int, first: int) -> list[list[int]]:
    """Documents of different lengths, each of one token."""
    return [[first + number] * (20 + 7 * number % 13) for number in range(count)]


def write(prefix: Path, count: int, first: int = 100, *, mask: bool = False) -> Path:
    """`<prefix>.bin/.idx`, and a mask under which the tokens of every other document count."""
    prefix.parent.mkdir(exist_ok=True)
    megatron_models.write_data(prefix, documents(count, first))
    if mask:
        counting = [[number % 2] * len(one) for number, one in enumerate(documents(count, first))]
        megatron_models.write_data(Path(f"{prefix}.mask"), counting)
    return prefix


def config_of(prefixes: Sequence[Path], given: Path | None) -> OmegaConf:
    """The part of a model's config that is read: the three splits read the prefixes."""
    listed = [str(prefix) for prefix in prefixes]
    splits = {"train": listed, "validation": listed[:1], "test": listed[-1:]}
    folder = None if given is None else str(given)
    return OmegaConf.create({"vocab_size": 1000, "data": {"data_prefix": splits, "index_mapping_dir": folder}})


def samples(prefixes: Sequence[Path], given: Path | None, *, by_content: bool = True) -> Samples:
    """Tokens and loss mask of every sample of the three splits, built as NeMo's model builds them."""
    cfg = config_of(prefixes, given)
    with content_keyed_index(cfg, 1000) if by_content else contextlib.nullcontext():
        tokenizer = SimpleNamespace(pad=0, eod=0, unique_identifiers={"name": "test"})
        splits = [get_blend_from_list(cfg.data.data_prefix[name]) for name in ("train", "validation", "test")]
        config = GPTDatasetConfig(
            random_seed=1, sequence_length=LENGTH, blend_per_split=splits, path_to_cache=cfg.data.index_mapping_dir,
            tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
            create_attention_mask=False,
        )  # fmt: skip
        built = BlendedMegatronDatasetBuilder(GPTDataset, SAMPLES, lambda: True, config).build()
    assert cfg.data.index_mapping_dir == (None if given is None else str(given)), "the setting is as it was"
    return [
        [[*own[index]["tokens"].tolist(), *own[index]["loss_mask"].tolist()] for index in range(len(own))]
        for own in map(prepare_dataset, built)
    ]


@pytest.mark.parametrize(
    ("before", "after", "mask", "beside"),
    [(12, 72, False, True), (72, 12, True, True), (12, 72, True, False), (72, 12, False, False)],
    ids=["grown text", "shrunk chat", "grown chat, index_mapping_dir", "shrunk text, index_mapping_dir"],
)
def test_data_made_again_gives_its_own_samples(
    tmp_path: Path, before: int, after: int, mask: bool, beside: bool
) -> None:
    given = None if beside else tmp_path / "index"
    prefix = write(tmp_path / "data" / "x", before, mask=mask)
    old = samples([prefix], given)
    write(prefix, after, 300, mask=mask)
    new = samples([prefix], given)
    fresh = samples([write(tmp_path / "fresh" / "x", after, 300, mask=mask)], None if beside else tmp_path / "other")
    assert new == fresh and all(new)
    assert all(one != other for one, other in zip(old, new, strict=True))
    parent = Path(prefix, "cache", "GPTDataset_indices") if given is None else given
    assert len(list(parent.iterdir())) == 1, "the index of the old data is gone"
    assert samples([prefix], given) == new, "and the cached one gives the same"


def test_megatron_alone_reads_the_old_index(tmp_path: Path) -> None:
    """Control: what the content in the folder's name is for."""
    prefix = write(tmp_path / "data" / "x", 12)
    samples([prefix], None, by_content=False)
    write(prefix, 72, 300)
    read = {token for split in samples([prefix], None, by_content=False) for row in split for token in row[:LENGTH]}
    assert len(read) <= 12
    read = {token for split in samples([prefix], None) for row in split for token in row[:LENGTH]}
    assert len(read) > 30
    write(prefix, 2, 300)
    with pytest.raises(IndexError):
        samples([prefix], None, by_content=False)
    assert samples([prefix], None)


def test_data_of_other_runs_keeps_its_index(tmp_path: Path) -> None:
    """Folders go when a prefix of theirs holds other data now, and only then."""
    one, two = (str(write(tmp_path / "data" / name, 12)) for name in "ab")
    kept = make_index_folder([one], str(tmp_path / "index"))
    both = make_index_folder([one, two], str(tmp_path / "index"))
    (tmp_path / "index" / "mine").mkdir()
    assert kept != both and make_index_folder([one], str(tmp_path / "index")) == kept
    write(Path(two), 13)
    assert make_index_folder([two], str(tmp_path / "index")) != both
    assert Path(kept).is_dir() and not Path(both).exists() and (tmp_path / "index" / "mine").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written below .*/file .*model\.data\.index_mapping_dir"):
        make_index_folder([one], str(tmp_path / "file"))


@pytest.mark.slow_unit
def test_every_rank_reads_the_new_data(tmp_path: Path) -> None:
    """Two ranks and a blend of two prefixes, whose own index Megatron caches as well; one process afterwards."""
    prefixes = [write(tmp_path / "data" / name, 12) for name in "xy"]

    def read(rank: int) -> None:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        old = samples(prefixes, None)
        torch.distributed.barrier()
        if rank == 0:
            write(prefixes[1], 72, 300)
        torch.distributed.barrier()
        new = samples(prefixes, None)
        assert old[0] != new[0] and old[1] == new[1] and old[2] != new[2]
        torch.save(new, tmp_path / f"{rank}.pt")
        torch.distributed.barrier()
        if rank == 0:  # rank 0 alone sees the problem
            write(prefixes[1], 3, 999)
        torch.distributed.barrier()
        cfg = OmegaConf.merge(config_of(prefixes, None), {"vocab_size": None})
        with pytest.raises(ValueError, match=r"y\.bin holds the token 1000 \(document 1, position 0\)"):  # noqa: SIM117
            with content_keyed_index(cfg, 1000):
                pass

    run_ranks(read, 2, timeout=120, log=str(tmp_path / "log"))
    shutil.rmtree(tmp_path / "data")
    write(tmp_path / "data" / "x", 12)
    write(tmp_path / "data" / "y", 72, 300)

    def fresh(rank: int) -> None:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=1)
        torch.save(samples(prefixes, tmp_path / "elsewhere"), tmp_path / "fresh.pt")

    run_ranks(fresh, 1, timeout=120, log=str(tmp_path / "log"))
    assert torch.load(tmp_path / "0.pt") == torch.load(tmp_path / "1.pt") == torch.load(tmp_path / "fresh.pt")
