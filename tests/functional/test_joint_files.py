# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What joint and LoRA runs train and write: complete files, low-rank updates merged or beside the backbone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nemo")

from tests.functional.test_stock_nemo import ON_CPU, STOCK, logits, stock_trainer, unpack_tokenizer
from tests.functional.test_tune import tune
from tests.helpers.megatron_models import exit_entry, exit_logits, relative_difference, snapshot, write_data
from tests.helpers.nemo_files import flipped, members, restore, rewritten, run_convert, with_tokenizer

import torch  # isort: skip  # after the CPU host is on
from omegaconf import OmegaConf

from tests.helpers.huggingface_models import save_tiny_model

EXITS = [exit_entry(1, "mlp"), exit_entry(2, "layer", "lora", rank=2), exit_entry(2, "norm", output="shared")]
LORA = {"train": "lora", "lora": {"rank": 4, "merge": True}}
TOKENS = torch.randint(0, 4096, (2, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`path` of a converted tiny model with the tokenizer's vocabulary (stock NeMo knows no other), and data."""
    folder = tmp_path_factory.mktemp("joint_files")
    save_tiny_model(folder / "hugging_face", "llama", vocab_size=4096)
    run_convert(with_tokenizer(folder / "hugging_face"), folder / "start.nemo", EXITS)
    data = write_data(folder / "data", [([5, 9, 2, 77, 131, 40, 8] * 30)[shift : shift + 90] for shift in range(40)])
    return SimpleNamespace(path=folder / "start.nemo", data=data, folder=folder)


def trained(start: SimpleNamespace, name: str, early_exit: dict[str, Any], steps: int = 6) -> SimpleNamespace:
    before, model, losses = tune(start, steps, early_exit=early_exit)
    path = start.folder / f"{name}.nemo"
    model.save_to(str(path))
    return SimpleNamespace(before=before, model=model, losses=losses, path=path)


@pytest.fixture(scope="module")
def joint(start: SimpleNamespace) -> SimpleNamespace:
    return trained(start, "joint", {"train": "joint"})


@pytest.fixture(scope="module")
def lora(start: SimpleNamespace) -> SimpleNamespace:
    """Trained once, saved merged (`path`) and with the updates beside the backbone (`beside`)."""
    result = trained(start, "merged", LORA)
    block = result.model.early_exit
    result.model.early_exit = dataclasses.replace(block, lora=dataclasses.replace(block.lora, merge=False))
    result.beside = start.folder / "beside.nemo"
    result.model.save_to(str(result.beside))
    result.model.early_exit = block
    return result


def config_of(path: Path) -> Any:
    return OmegaConf.create(members(path)["model_config.yaml"].decode())


# -- joint ----------------------------------------------------------------------------------------------------------


def test_everything_learns_in_joint_mode(joint: SimpleNamespace) -> None:
    """Every parameter moves but the exits' frozen parts, and every loss falls."""
    trains = {name for name, parameter in joint.model.model.named_parameters() if parameter.requires_grad}
    assert {name for name in joint.before if not name.startswith("exits.")} <= trains
    for name, value in snapshot(joint.model.model).items():
        assert torch.equal(value, joint.before[name]) == (name not in trains), name
    for name in (exit["name"] for exit in EXITS):
        assert joint.losses[-1][name] < 0.9 * joint.losses[0][name]


def test_the_joint_file_is_complete_and_has_a_fingerprint_of_its_own(
    joint: SimpleNamespace, start: SimpleNamespace
) -> None:
    config, old = config_of(joint.path), config_of(start.path)
    assert config.backbone_fingerprint != old.backbone_fingerprint and config.early_exit.train == "exits"
    again = restore(joint.path, verify="full")
    assert torch.equal(logits(again, TOKENS, 4096), logits(joint.model, TOKENS, 4096))
    ours, theirs = exit_logits(again, TOKENS), exit_logits(joint.model, TOKENS)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    difference = relative_difference(logits(again, TOKENS, 4096), logits(restore(start.path), TOKENS, 4096))
    assert difference > 1e-2, "control: the backbone is another"


def test_stock_nemo_restores_the_trained_backbone(joint: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector

    unpack_tokenizer(joint.path, tmp_path)
    monkeypatch.chdir(tmp_path)
    trainer, connector = stock_trainer(), NLPSaveRestoreConnector()
    config = MegatronGPTModel.restore_from(
        str(joint.path), trainer=trainer, return_config=True, save_restore_connector=connector
    )
    config.update({**ON_CPU, "target": STOCK, "micro_batch_size": 1, "global_batch_size": 1})
    model = MegatronGPTModel.restore_from(
        str(joint.path),
        trainer=trainer,
        override_config_path=config,
        save_restore_connector=connector,
        map_location="cpu",
    )
    assert type(model) is MegatronGPTModel
    assert torch.equal(logits(model, TOKENS, 4096), logits(joint.model, TOKENS, 4096))


def test_an_exits_only_file_of_a_changed_backbone_is_refused(joint: SimpleNamespace, tmp_path: Path) -> None:
    connector = joint.model._save_restore_connector
    connector.exits_only = True
    try:
        with pytest.raises(ValueError, match="in no other file.*exits_only=False"):
            joint.model.save_to(str(tmp_path / "x.nemo"))
    finally:
        connector.exits_only = False
    assert list(tmp_path.iterdir()) == []


def test_exits_are_tuned_on_the_trained_backbone(joint: SimpleNamespace, start: SimpleNamespace) -> None:
    before, model, _ = tune(start, 1, path=joint.path)
    assert not any(p.requires_grad for n, p in model.model.named_parameters() if not n.startswith("exits."))
    kept = snapshot(joint.model.model)
    kept["backbone_output.weight"] = kept["output_layer.weight"]  # a model cut at its deepest exit keeps a copy
    assert all(torch.equal(value, kept[name]) for name, value in before.items())


def test_dropout_is_on_in_a_backbone_that_trains_and_off_in_a_frozen_one(
    joint: SimpleNamespace, lora: SimpleNamespace, start: SimpleNamespace
) -> None:
    rates = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
    _, _, with_dropout = tune(start, 1, early_exit={"train": "joint"}, **rates)
    _, _, frozen = tune(start, 1, early_exit=LORA, **rates)
    assert with_dropout[0] != joint.losses[0] and frozen[0] == lora.losses[0]


@pytest.mark.parametrize("train", ["joint", "lora"])
def test_bf16_mixed_keeps_fp32_weights(start: SimpleNamespace, joint: SimpleNamespace, train: str) -> None:
    options = {
        "activations_checkpoint_granularity": "full",
        "activations_checkpoint_method": "block",
        "activations_checkpoint_num_layers": 2,
    }
    _, model, losses = tune(
        start, 2, trainer={"precision": "bf16-mixed"}, early_exit={**LORA, "train": train}, **options
    )
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    for name, loss in losses[0].items():
        assert loss == pytest.approx(joint.losses[0][name], rel=2e-2), name
    assert losses[0] != joint.losses[0], "control: the products were in bf16"


def test_a_run_resumes_only_what_it_trained(start: SimpleNamespace, tmp_path: Path) -> None:
    _, model, _ = tune(start, 1, early_exit=LORA)
    model.trainer.save_checkpoint(str(tmp_path / "lora.ckpt"))
    for block, ours in (
        ({"train": "joint"}, "this one trains joint"),
        ({"train": "exits"}, "this one trains exits"),
        ({"train": "lora", "lora": {"rank": 8}}, "this one trains lora of rank 8"),
    ):
        _, other, _ = tune(start, 1, early_exit=block)
        with pytest.raises(ValueError, match=f"trains lora of rank 4, {ours} .*resume as it began"):
            other.trainer.strategy.load_checkpoint(tmp_path / "lora")


# -- lora -----------------------------------------------------------------------------------------------------------


def test_low_rank_updates_start_as_nothing(start: SimpleNamespace) -> None:
    """Bitwise the logits of the plain model, with updates on every linear of the backbone."""
    model = restore(start.path, early_exit=LORA)
    updated = [name for name, _ in model.model.decoder.named_parameters() if name.endswith("low_rank_b")]
    assert len(updated) == 4 * 3, "query-key-value, projection and both MLP linears of three layers"
    assert torch.equal(logits(model, TOKENS, 4096), logits(restore(start.path), TOKENS, 4096))
    with torch.no_grad():
        dict(model.model.decoder.named_parameters())[updated[0]].add_(0.1)
    assert not torch.equal(logits(model, TOKENS, 4096), logits(restore(start.path), TOKENS, 4096)), "control"


def test_only_updates_and_exits_train(lora: SimpleNamespace) -> None:
    trains = {name for name, parameter in lora.model.model.named_parameters() if parameter.requires_grad}
    backbone = {name for name in trains if not name.startswith("exits.")}
    assert backbone and all("low_rank_" in name for name in backbone)
    for name, value in snapshot(lora.model.model).items():
        assert torch.equal(value, lora.before[name]) == (name not in trains), name
    for name in (exit["name"] for exit in EXITS):
        assert lora.losses[-1][name] < 0.95 * lora.losses[0][name]


def test_merged_equals_beside(lora: SimpleNamespace, start: SimpleNamespace) -> None:
    """1e-5 relative, and both equal the model that was trained."""
    ours = logits(lora.model, TOKENS, 4096)
    for path in (lora.path, lora.beside):
        again = restore(path, verify="full")
        assert not any("low_rank_" in name for name, _ in again.model.decoder.named_parameters())
        assert relative_difference(logits(again, TOKENS, 4096), ours) < 1e-5
    plain = logits(restore(start.path), TOKENS, 4096)
    assert relative_difference(plain, ours) > 1e-3, "control: the updates are not nothing"


def test_the_merged_file_is_complete_and_the_other_keeps_the_source_s_weights(
    lora: SimpleNamespace, start: SimpleNamespace
) -> None:
    old, merged, beside = members(start.path), members(lora.path), members(lora.beside)
    weights = [name for name in old if name.startswith("model_weights/")]
    assert all(beside[name] == old[name] for name in weights)
    assert any(name.startswith("lora_weights/") for name in beside)
    assert not any(name.startswith("lora_weights/") for name in merged)
    prints = [config_of(path).backbone_fingerprint for path in (start.path, lora.path, lora.beside)]
    assert prints[0] == prints[2] != prints[1]


def test_updates_of_a_backbone_that_is_in_no_file_are_folded_in(
    lora: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`merge: False` keeps updates beside a stored backbone; there is none to copy for a model built from a config."""
    block = lora.model.early_exit
    kept = dataclasses.replace(block, lora=dataclasses.replace(block.lora, merge=False))
    monkeypatch.setattr(lora.model, "early_exit", kept)
    monkeypatch.setattr(lora.model, "backbone_path", None)
    lora.model.save_to(str(tmp_path / "built.nemo"))
    assert not any(name.startswith("lora_weights/") for name in members(tmp_path / "built.nemo"))
    again = restore(tmp_path / "built.nemo", verify="full")
    assert relative_difference(logits(again, TOKENS, 4096), logits(lora.model, TOKENS, 4096)) < 1e-5


def test_training_goes_on_from_stored_updates(lora: SimpleNamespace, start: SimpleNamespace) -> None:
    block = {**LORA, "lora": {"rank": 4, "merge": False}}
    before, model, _ = tune(start, 1, path=lora.beside, early_exit=block)
    kept = snapshot(lora.model.model)
    assert all(torch.equal(value, kept[name]) for name, value in before.items())
    with pytest.raises(
        ValueError, match=r"rank 4, and model.early_exit.lora.rank=8 is another; set model.early_exit.lora.rank=4"
    ):
        restore(lora.beside, early_exit={"train": "lora", "lora": {"rank": 8}})


def test_exits_only_files_and_further_tuning_keep_the_updates(
    lora: SimpleNamespace, start: SimpleNamespace, tmp_path: Path
) -> None:
    """Exits tuned on W + B A stay with W + B A, whichever way they are saved."""
    wanted = logits(restore(lora.beside), TOKENS, 4096)
    model = restore(lora.beside)
    for exits_only in (True, False):
        model._save_restore_connector.exits_only = exits_only
        path = tmp_path / f"{exits_only}.nemo"
        model.save_to(str(path))
        assert any(name.startswith("model_weights/") for name in members(path)) != exits_only
        assert torch.equal(logits(restore(path), TOKENS, 4096), wanted)


@pytest.mark.parametrize("folder", ["model_weights", "exit_weights", "lora_weights"])
def test_one_flipped_bit_is_noticed_by_whatever_reads_it(folder: str, lora: SimpleNamespace, tmp_path: Path) -> None:
    """Loading a model, an export, a certificate's identity; without `verify=full`."""
    from nemo_ee.certificates.validity import identify
    from nemo_ee.checkpoint.nemo_archive import NemoArchive
    from nemo_ee.export.huggingface.exporter import HuggingFaceSettings, export_huggingface

    with NemoArchive(lora.beside) as archive:
        archive.extract(tmp_path / "tree", [folder])
    name, content = flipped(tmp_path / "tree" / folder)
    path = rewritten(lora.beside, tmp_path / "flipped.nemo", {f"{folder}/{name}": content})
    export = HuggingFaceSettings(checkpoint=path, output=tmp_path / "out", progress=False)
    readers = [lambda: restore(path), lambda: export_huggingface(export)]
    readers += [] if folder == "model_weights" else [lambda: identify(path)]
    message = rf"flipped.nemo: {folder}/{name}: cannot read '.*' \(its bytes do not have the checksum .*save it again"
    for read in readers:
        with pytest.raises(ValueError, match=message):
            read()
    assert not list(tmp_path.glob("out*"))


def test_joint_training_of_a_backbone_with_updates_folds_them_in(
    lora: SimpleNamespace, start: SimpleNamespace, tmp_path: Path
) -> None:
    before, model, _ = tune(start, 1, path=lora.beside, early_exit={"train": "joint"})
    assert not any("low_rank_" in name for name in before if not name.startswith("exits."))
    model.save_to(str(tmp_path / "joint.nemo"))
    assert not any(name.startswith("lora_weights/") for name in members(tmp_path / "joint.nemo"))
    assert torch.equal(
        logits(restore(tmp_path / "joint.nemo", verify="full"), TOKENS, 4096), logits(model, TOKENS, 4096)
    )
