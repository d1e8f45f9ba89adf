# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Stock NeMo and this package read each other's files: the backbone goes both ways with unchanged logits."""

from __future__ import annotations

import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import cpu_trainer, exit_entry, reset_batch_sizes
from tests.helpers.nemo_files import members, restore, run_convert, with_tokenizer

import torch  # isort: skip  # after the CPU host is on
from omegaconf import OmegaConf

from tests.helpers.huggingface_models import reference_logits, save_tiny_model

STOCK = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
EXITS = [exit_entry(1, "mlp"), exit_entry(2, "layer", "lora", rank=2), exit_entry(2, "norm", "random")]
# What a machine without a GPU needs of NeMo's own model; none of it is stored.
ON_CPU = {
    "use_cpu_initialization": True,
    "transformer_engine": False,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "gradient_as_bucket_view": False,
    "precision": 32,
}


def logits(model, tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[b, s, v] of a stock or of our model."""
    model.eval()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return model.model(tokens, positions, mask)[..., :vocab_size].float()


def stock_trainer():
    """A trainer whose process groups are up: NeMo itself starts them on GPUs only."""
    from megatron.core import tensor_parallel
    from nemo.collections.nlp.modules.common.megatron.megatron_init import initialize_model_parallel_for_nemo

    reset_batch_sizes()
    trainer = cpu_trainer()
    initialize_model_parallel_for_nemo(
        world_size=1, global_rank=0, local_rank=0, micro_batch_size=1, global_batch_size=1
    )
    trainer.strategy.setup_environment()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    return trainer


@pytest.fixture(scope="module")
def early_exit(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`path` of a complete early-exit file and the transformers model it was made from."""
    folder = tmp_path_factory.mktemp("early_exit")
    # The tokenizer's 4096 entries: NeMo itself knows no other vocabulary size.
    reference = save_tiny_model(folder / "source", "qwen3", vocab_size=4096)
    run_convert(with_tokenizer(folder / "source"), folder / "ee.nemo", EXITS)
    return SimpleNamespace(path=folder / "ee.nemo", reference=reference, source=folder / "source")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`path` of a `.nemo` that NeMo's own class and connector wrote, and its logits; LayerNorm, biases, tied."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

    import nemo_ee.models  # noqa: F401
    from tests.helpers.megatron_models import REFERENCE_MODEL

    config = {
        **ON_CPU,
        "target": STOCK,
        "mcore_gpt": True,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "encoder_seq_length": 32,
        "max_position_embeddings": 32,
        "num_layers": 3,
        "hidden_size": 24,
        "ffn_hidden_size": 44,
        "num_attention_heads": 4,
        "normalization": "layernorm",
        "activation": "gelu",
        "bias": True,
        "position_embedding_type": "learned_absolute",
        "share_embeddings_and_output_weights": True,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "init_method_std": 0.2,
        "tokenizer": {"library": "huggingface", "type": str(REFERENCE_MODEL), "use_fast": True},
        "optim": {"name": "adamw", "lr": 1e-3},
    }
    model = MegatronGPTModel(OmegaConf.create(config), stock_trainer())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start at one and zero, which would hide mistakes
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path_factory.mktemp("stock") / "stock.nemo"
    model.save_to(str(path))
    tokens = torch.randint(0, 4096, (2, 32), generator=generator)
    return SimpleNamespace(path=path, tokens=tokens, logits=logits(model, tokens, 4096))


def unpack_tokenizer(path: Path, into: Path) -> None:
    """Stock NeMo looks for the directory that `tokenizer.type` names in the working directory, not in the file."""
    with tarfile.open(path) as tar:
        tar.extractall(into, [info for info in tar if info.name.startswith("./tokenizer/")], filter="data")


def test_stock_nemo_restores_the_backbone_of_an_early_exit_file(
    early_exit: SimpleNamespace, tmp_path: Path, monkeypatch
) -> None:
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector

    unpack_tokenizer(early_exit.path, tmp_path)
    monkeypatch.chdir(tmp_path)
    trainer = stock_trainer()
    config = MegatronGPTModel.restore_from(
        str(early_exit.path), trainer=trainer, return_config=True, save_restore_connector=NLPSaveRestoreConnector()
    )
    config.update({**ON_CPU, "target": STOCK})
    model = MegatronGPTModel.restore_from(
        str(early_exit.path),
        trainer=trainer,
        override_config_path=config,
        save_restore_connector=NLPSaveRestoreConnector(),
        map_location="cpu",
    )
    assert type(model) is MegatronGPTModel
    tokens = torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(2))
    theirs = logits(model, tokens, 4096)
    expected = reference_logits(early_exit.reference, tokens)
    assert (theirs - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(theirs, logits(restore(early_exit.path), tokens, 4096)), "bitwise what our own class computes"


def test_a_stock_file_is_converted_with_unchanged_logits_and_weights(stock: SimpleNamespace, tmp_path: Path) -> None:
    result = run_convert(stock.path, tmp_path / "ee.nemo", EXITS)
    assert result.added == tuple(exit["name"] for exit in EXITS) and result.logit_difference is None
    old, new = members(stock.path), members(tmp_path / "ee.nemo")
    weights = [name for name in old if name.startswith("model_weights/")]
    assert len(weights) >= 4 and all(new[name] == old[name] for name in weights), "byte for byte"
    assert {name for name in new if name.startswith("model_weights/")} == set(weights)
    ours = logits(restore(tmp_path / "ee.nemo", verify="full"), stock.tokens, 4096)
    torch.testing.assert_close(ours, stock.logits, rtol=0, atol=1e-5 * stock.logits.abs().max().item())
    control = logits(restore(tmp_path / "ee.nemo", layernorm_epsilon=0.1), stock.tokens, 4096)
    assert (control - stock.logits).abs().max() > 1e-3 * stock.logits.abs().max(), "the comparison sees an epsilon"


def test_a_stock_file_is_tuned_from_directly(stock: SimpleNamespace) -> None:
    """Without a conversion: exits of the config start as their `init` says, the fingerprint is computed.

    The precision that NeMo stored is of the run that made the file.
    """
    from nemo_ee.models.connector import read_config

    assert "precision" in read_config(stock.path), "control"
    model = restore(stock.path, early_exit={"exits": [exit_entry(3, "norm")]})
    assert len(model.cfg.backbone_fingerprint) == 64 and "precision" not in model.config_to_store
    from tests.helpers.megatron_models import exit_logits

    ours = exit_logits(model, stock.tokens)["l3-norm-copy-own"]
    torch.testing.assert_close(ours, stock.logits, rtol=0, atol=1e-5 * stock.logits.abs().max().item())


def test_stock_restore_of_the_converted_stock_file(stock: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    """The way back: what NeMo wrote and we extended, NeMo reads again; its tokenizer went into the file."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector

    run_convert(stock.path, tmp_path / "ee.nemo", EXITS)
    unpack_tokenizer(tmp_path / "ee.nemo", tmp_path)
    monkeypatch.chdir(tmp_path)
    config = OmegaConf.create(members(tmp_path / "ee.nemo")["model_config.yaml"].decode())
    config.update({**ON_CPU, "target": STOCK})
    model = MegatronGPTModel.restore_from(
        str(tmp_path / "ee.nemo"),
        trainer=stock_trainer(),
        override_config_path=config,
        save_restore_connector=NLPSaveRestoreConnector(),
        map_location="cpu",
    )
    assert torch.equal(logits(model, stock.tokens, 4096), stock.logits)


def test_a_certificate_s_identity_does_not_depend_on_padding(stock: SimpleNamespace, tmp_path: Path) -> None:
    """NeMo stores no vocabulary size; saving with more padding rows, as other layouts have, changes no fingerprint."""
    from nemo_ee.certificates.validity import identify
    from nemo_ee.checkpoint.chunk_reader import ChunkReader
    from nemo_ee.checkpoint.unpacked import open_nemo
    from nemo_ee.models.connector import EarlyExitSaveRestoreConnector

    first, again = tmp_path / "ee.nemo", tmp_path / "again.nemo"
    run_convert(stock.path, first, EXITS)
    EarlyExitSaveRestoreConnector().save_to(restore(first, make_vocab_size_divisible_by=1000), str(again))
    rows = []
    for path in (first, again):
        with open_nemo(path) as archive:
            exits = ChunkReader(archive.folder("exit_weights"), prefix="exits.")
            rows.append(exits.keys()["l1-mlp-copy-own.output.weight"])
    assert [info.shape[0] for info in rows] == [4096, 5000], "control"
    assert identify(again) == identify(first)
