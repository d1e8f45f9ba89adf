# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""First values of exit heads: which weight is copied from where, and that random ones depend on (seed, name) alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from nemo_ee.megatron.model.exit_head_init import backbone_key
from tests.helpers.core_models import core_model, exit_entry, exit_logits, random_tokens
from tests.helpers.huggingface_models import save_tiny_model

EXPECTED_KEYS_FILE = Path(__file__).parents[2] / "data" / "exit_checkpoint_keys.txt"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model(folder, "llama-bias")
    return folder


def _values(folder: Path, entry: dict, **settings) -> dict[str, torch.Tensor]:
    model = core_model(folder, [entry], full_depth=False, **settings)
    return {name: parameter.detach().clone() for name, parameter in model.model.exits.heads[0].named_parameters()}


@pytest.mark.parametrize(
    ("key", "tied", "expected"),
    [
        ("output.weight", False, ("output_layer.weight", None)),
        ("output.weight", True, ("embedding.word_embeddings.weight", None)),
        ("norm.weight", False, ("decoder.final_layernorm.weight", None)),
        ("norm.bias", True, ("decoder.final_layernorm.bias", None)),
        ("mlp.linear_fc1.layer_norm_weight", False, ("decoder.layers.mlp.linear_fc1.layer_norm_weight", 2)),
        ("layer.self_attention.linear_qkv.bias", False, ("decoder.layers.self_attention.linear_qkv.bias", 8)),
    ],
)
def test_copy_sources(key: str, tied: bool, expected: tuple) -> None:
    """The MLP is the exit layer's own (layer 3 is index 2), a layer exit's the last one (of 9)."""
    assert backbone_key(key, exit_layer=3, num_layers=9, tied=tied) == expected


def test_random_values_follow_seed_and_name_alone(llama: Path) -> None:
    entry = exit_entry(1, "layer", "random")
    first = _values(llama, entry)
    again = _values(llama, entry)
    with_others = core_model(llama, [exit_entry(2, "mlp", "random"), exit_entry(1, "norm"), entry])
    among = dict(with_others.model.exits[entry["name"]].named_parameters())
    deeper = _values(llama, entry | {"layer": 3})
    for name, value in first.items():
        assert torch.equal(value, again[name]) and torch.equal(value, among[name]), name
        # Only what writes to the residual stream is scaled by the depth.
        scaled = "linear_fc2.weight" in name or "linear_proj.weight" in name
        assert torch.equal(value, deeper[name]) != scaled, name
        if scaled:
            torch.testing.assert_close(value, math.sqrt(3.0) * deeper[name])
    others = {
        "another name": _values(llama, entry | {"name": "another"}),
        "another seed of its own": _values(llama, entry | {"seed": 99}),
        "another seed of the run": _values(llama, entry, seed=99),
        "copied": _values(llama, entry | {"init": "copy"}),
    }
    matrices = [name for name, value in first.items() if value.dim() == 2]
    assert len(matrices) == 5
    for what, values in others.items():
        assert not any(torch.equal(values[name], first[name]) for name in matrices), what
    for name in matrices:
        assert torch.equal(others["another seed of its own"][name], others["another seed of the run"][name])


def test_random_values_have_the_stated_distribution(llama: Path) -> None:
    std = 0.5
    for entry in (exit_entry(2, "mlp", "random"), exit_entry(2, "layer", "random")):
        copied = _values(llama, entry | {"init": "copy"})
        for name, value in _values(llama, entry, init_method_std=std).items():
            if name.startswith("pre_mlp_layernorm."):
                # Fused with the MLP under Transformer Engine and frozen: the copy of layer k's, whatever the init.
                assert torch.equal(value, copied[name])
            elif name.endswith("bias"):
                assert not value.any(), name
            elif value.dim() == 1:
                assert (value == 1).all(), name
            else:
                expected = std / math.sqrt(2 * 2) if "linear_fc2" in name or "linear_proj" in name else std
                rows = value[:133] if name == "output.weight" else value
                # The deviation's own error at these sizes is about 1.5 %.
                assert rows.std().item() == pytest.approx(expected, rel=0.08), name
                assert abs(rows.mean().item()) < 0.1 * expected, name


def test_padding_rows_are_zero(llama: Path) -> None:
    for init, output in (("copy", "own"), ("random", "own"), ("lora", "own"), ("copy", "low_rank")):
        values = _values(llama, exit_entry(1, "norm", init, output))
        for name, value in values.items():
            if name in ("output.weight", "output_update.low_rank_b"):
                assert value.shape[0] == 144 and not value[133:].any(), (init, output, name)
        if output == "own":
            assert values["output.weight"][:133].any(dim=1).all(), "control: rows of tokens are not zero"


def test_padding_does_not_change_random_rows(llama: Path) -> None:
    """A layout that pads further draws the same values for the tokens."""
    entry = exit_entry(1, "norm", "random")
    narrow, wide = _values(llama, entry), _values(llama, entry, vocab_multiple=100)
    assert narrow["output.weight"].shape[0] == 144 and wide["output.weight"].shape[0] == 200
    assert torch.equal(narrow["output.weight"][:133], wide["output.weight"][:133])
    assert not wide["output.weight"][133:].any()


def test_low_rank_updates_start_as_nothing_with_a_random_direction(llama: Path) -> None:
    for entry in (exit_entry(2, "mlp", "lora", rank=5), exit_entry(2, "layer", "lora", "low_rank", rank=5)):
        values = _values(llama, entry)
        ours = {name: value for name, value in values.items() if "low_rank_" in name}
        assert ours
        for name, value in ours.items():
            if name.endswith("low_rank_b"):
                assert value.shape[1] == 5 and not value.any()
            else:
                assert value.shape[0] == 5
                assert value.std().item() == pytest.approx(value.shape[1] ** -0.5, rel=0.25), name
        again = _values(llama, entry)
        assert all(torch.equal(value, again[name]) for name, value in ours.items())
        other = _values(llama, entry | {"seed": 8})
        assert not any(torch.equal(v, other[name]) for name, v in ours.items() if name.endswith("low_rank_a"))


def test_norms_that_have_no_parameters_in_the_source_are_one_and_zero(tmp_path: Path) -> None:
    """OPT without affine norms and without biases, which Megatron has."""
    reference = save_tiny_model(tmp_path, "opt-bare")
    model = core_model(tmp_path, [exit_entry(1, "norm")])
    tokens = random_tokens(model)
    with torch.no_grad():
        states = reference(input_ids=tokens, output_hidden_states=True).hidden_states[1]
        lens = reference.lm_head(reference.model.decoder.final_layer_norm(states))
    torch.testing.assert_close(exit_logits(model, tokens)["l1-norm-copy-own"], lens, rtol=1e-4, atol=1e-4)


# -- the keys exits are saved under -----------------------------------------------------------------------------------

INITS_AND_OUTPUTS = [(init, output) for init in ("copy", "random", "lora") for output in ("own", "shared", "low_rank")]


def _key_lines(folder: Path, family: str) -> list[str]:
    """`<model>: <checkpoint key> <global shape>` of every exit's every tensor."""
    from nemo_ee.megatron.model.exit_head_init import local_shards

    entries = [
        exit_entry(2, architecture, init, output, rank=3)
        for architecture in ("embedding", "norm", "mlp", "layer")
        for init, output in INITS_AND_OUTPUTS
    ]
    model = core_model(folder, entries, full_depth=False)
    shards = local_shards(model.model.exit_sharded_state_dict())
    return sorted({f"{family}: {shard.key} {list(shard.global_shape)}" for shard in shards})


@pytest.fixture(scope="module")
def recorded() -> list[str]:
    lines = EXPECTED_KEYS_FILE.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpoint_keys_are_the_recorded_ones(family: str, recorded: list[str], tmp_path: Path) -> None:
    """A checkpoint written today must load tomorrow, and under Transformer Engine: keys and shapes are fixed."""
    save_tiny_model(tmp_path, family)
    expected = [line for line in recorded if line.startswith(f"{family}: ")]
    assert _key_lines(tmp_path, family) == sorted(expected)


def test_recorded_keys_are_canonical(recorded: list[str]) -> None:
    """Norms carry Transformer Engine's fused names; no name would change in NeMo's `model.` replacement."""
    keys = [line.split()[1] for line in recorded]
    assert len(keys) > 300
    assert "exits.l2-mlp-copy-own.mlp.linear_fc1.layer_norm_weight" in keys
    assert "exits.l2-layer-lora-shared.layer.self_attention.linear_qkv.layer_norm_weight" in keys
    for key in keys:
        assert "pre_mlp_layernorm" not in key and "input_layernorm" not in key, key
        assert ".base." not in key and "model." not in key and "heads." not in key, key


if __name__ == "__main__":
    # Writes the recorded list: python -m tests.unit.megatron.test_exit_head_init
    import tempfile

    written = [
        "# Keys and global shapes of exit heads in a checkpoint, by tests/unit/megatron/test_exit_head_init.py.",
        "# A change here breaks every early-exit file written before it.",
    ]
    for name in ("gpt2", "llama"):
        with tempfile.TemporaryDirectory() as directory:
            save_tiny_model(directory, name)
            written += _key_lines(Path(directory), name)
    EXPECTED_KEYS_FILE.write_text("\n".join(written) + "\n")
