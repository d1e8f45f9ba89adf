# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Tuning: the backbone is bitwise the same afterwards, the exits learn, and the script does it as a user starts it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nemo")

from tests.helpers.megatron_models import (
    GLOBAL_BATCH,
    MICRO_BATCH,
    ROOT,
    cpu_trainer,
    exit_entry,
    exit_logits,
    random_tokens,
    reset_batch_sizes,
    script_config,
    snapshot,
    user_environment,
    write_data,
)
from tests.helpers.nemo_files import members, restore, run_convert, with_tokenizer

import torch  # isort: skip  # after the CPU host is on
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from tests.helpers.huggingface_models import save_tiny_model

SCRIPT = "megatron_gpt_early_exit_tune"
LENGTH = 16
EXITS = [
    exit_entry(1, "mlp"),
    exit_entry(2, "mlp", "lora", "low_rank", rank=4),
    exit_entry(2, "layer", "random"),
    exit_entry(3, "norm"),
    exit_entry(3, "embedding", output="shared"),
]
NOTHING_TO_TRAIN = "l3-embedding-copy-shared"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`path` of a converted tiny model, `data` that always counts in the same circle."""
    folder = tmp_path_factory.mktemp("tune")
    save_tiny_model(folder / "hugging_face", "llama")
    run_convert(with_tokenizer(folder / "hugging_face"), folder / "start.nemo", EXITS)
    circle = [5, 9, 2, 77, 131, 40, 8]
    data = write_data(folder / "data", [(circle * 30)[shift : shift + 90] for shift in range(40)])
    return SimpleNamespace(path=folder / "start.nemo", data=data, folder=folder)


def model_block(start: SimpleNamespace, **settings: Any) -> dict[str, Any]:
    """The script's `model` block."""
    return {
        "micro_batch_size": MICRO_BATCH,
        "global_batch_size": GLOBAL_BATCH,
        "encoder_seq_length": LENGTH,
        "data": {
            "data_impl": "mmap",
            "data_prefix": {"train": [str(start.data)], "validation": [str(start.data)], "test": None},
            "index_mapping_dir": str(start.folder / "index"),
            "seq_length": LENGTH,
            "dataloader_type": "single",
            "num_workers": 0,
        },
        "optim": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.01, "sched": {"name": "Constant"}},
        **settings,
    }


class Losses(Callback):
    """Every exit's training loss of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *args) -> None:
        found = trainer.callback_metrics.items()
        self.steps.append(
            {k.split("/")[1]: float(v) for k, v in found if k.startswith("exit/") and k.endswith("/loss")}
        )


def tune(start: SimpleNamespace, steps: int, path: Path | None = None, trainer: dict | None = None, **settings: Any):
    """(model before as a snapshot, tuned model, losses by step) after `steps` steps in this process."""
    from nemo_ee.models.connector import read_config
    from nemo_ee.models.megatron_early_exit_gpt_model import MegatronEarlyExitGPTModel
    from nemo_ee.models.run_config import merge_model_config

    reset_batch_sizes()
    losses = Losses()
    lightning = cpu_trainer(steps, [losses], **(trainer or {}))
    path = path or start.path
    model = MegatronEarlyExitGPTModel.restore_from(
        str(path),
        override_config_path=merge_model_config(read_config(path), OmegaConf.create(model_block(start, **settings))),
        trainer=lightning,
    )
    before = snapshot(model.model)
    lightning.fit(model)
    return before, model, losses.steps


@pytest.fixture(scope="module")
def tuned(start: SimpleNamespace) -> SimpleNamespace:
    """Ten steps, then saved."""
    before, model, losses = tune(start, 10)
    model.save_to(str(start.folder / "tuned.nemo"))
    return SimpleNamespace(before=before, model=model, losses=losses, path=start.folder / "tuned.nemo")


def test_the_backbone_is_bitwise_the_same_and_the_exits_are_not(tuned: SimpleNamespace) -> None:
    after = snapshot(tuned.model.model)
    assert after.keys() == tuned.before.keys()
    trains = {name for name, parameter in tuned.model.model.named_parameters() if parameter.requires_grad}
    for name, value in after.items():
        same = torch.equal(value, tuned.before[name])
        assert same == (name not in trains), name
    backbone = {name for name in after if not name.startswith("exits.")}
    frozen_parts = {name for name in after if name.startswith("exits.")} - trains
    assert backbone and not backbone & trains
    assert any("pre_mlp_layernorm" in name for name in frozen_parts) and any(".base." in name for name in frozen_parts)


def test_losses_fall_on_easy_data(tuned: SimpleNamespace) -> None:
    first, last = tuned.losses[0], tuned.losses[-1]
    assert set(first) == {exit["name"] for exit in EXITS} and len(tuned.losses) == 10
    for name in first:
        if name != NOTHING_TO_TRAIN:
            assert last[name] < 0.8 * first[name], (name, first[name], last[name])


def test_an_exit_with_nothing_to_train_is_measured_and_left_alone(tuned: SimpleNamespace) -> None:
    """`embedding` with a shared output has no parameter; its loss is logged, its optimizer does not exist."""
    assert NOTHING_TO_TRAIN not in {exit.name for exit in tuned.model._optimizer.exits}
    assert all(step[NOTHING_TO_TRAIN] > 0 for step in tuned.losses)


def test_nothing_trains_with_dropout(tuned: SimpleNamespace, start: SimpleNamespace) -> None:
    assert not any(module.training for module in tuned.model.model.modules())
    from nemo_ee.models.connector import read_config

    assert read_config(start.path).num_layers == 3, "control: the file can be read"
    _, with_dropout, losses = tune(start, 1, hidden_dropout=0.5, attention_dropout=0.5)
    assert losses[0] == tuned.losses[0], "a model trained with dropout gives the same losses"
    assert with_dropout.transformer_config.hidden_dropout == 0.5, "control: the setting arrived"


def test_the_saved_file_holds_the_source_s_weights_byte_for_byte(
    tuned: SimpleNamespace, start: SimpleNamespace
) -> None:
    old, new = members(start.path), members(tuned.path)
    weights = {name for name in old if name.startswith("model_weights/")}
    assert weights and weights == {name for name in new if name.startswith("model_weights/")}
    assert all(old[name] == new[name] for name in weights)
    changed = [name for name in old if name.startswith("exit_weights/") and name.endswith(".distcp")]
    assert changed and any(old[name] != new.get(name) for name in changed), "control: the exits are others"
    again = restore(tuned.path, verify="full")
    stored = dict(again.model.exits.named_parameters())
    for name, parameter in tuned.model.model.exits.named_parameters():
        assert torch.equal(parameter, stored[name]), name
    config = OmegaConf.create(new["model_config.yaml"].decode())
    assert "data" not in config and config.optim.lr == 1e-2


def test_exits_do_not_know_of_each_other(tuned: SimpleNamespace, start: SimpleNamespace) -> None:
    """Bitwise: an exit tuned alone, on a model cut at it, equals the one tuned among others."""
    name = EXITS[0]["name"]
    _, alone, losses = tune(start, 10, early_exit={"exits": [{"name": name}]})
    assert len(alone.model.decoder.layers) == 1
    assert [step[name] for step in losses] == [step[name] for step in tuned.losses]
    among = dict(tuned.model.model.exits[name].named_parameters())
    assert all(torch.equal(p, among[n]) for n, p in alone.model.exits[name].named_parameters())


def test_a_huge_learning_rate_of_one_exit_is_its_own_affair(tuned: SimpleNamespace, start: SimpleNamespace) -> None:
    """One exit diverges; the others' losses are bitwise what they were."""
    wild = {"name": EXITS[3]["name"], "lr": 1e6}
    exits = [{"name": exit["name"]} for exit in EXITS[:3]] + [wild]
    _, _, losses = tune(start, 4, early_exit={"exits": exits})
    assert not losses[-1][wild["name"]] < 1e3
    for ours, theirs in zip(losses, tuned.losses, strict=False):
        assert all(ours[exit["name"]] == theirs[exit["name"]] for exit in EXITS[:3])


def test_stored_exits_learn_on_beside_new_ones(tuned: SimpleNamespace, start: SimpleNamespace) -> None:
    exits = [{"name": EXITS[0]["name"]}, {"layer": 2, "architecture": "norm", "name": "fresh"}]
    _, model, losses = tune(start, 1, path=tuned.path, early_exit={"exits": exits})
    assert set(losses[0]) == {EXITS[0]["name"], "fresh"}
    assert losses[0][EXITS[0]["name"]] < tuned.losses[5][EXITS[0]["name"]], "it did not start anew"
    assert model.early_exit.names == (EXITS[0]["name"], "fresh")


def test_bf16_mixed_runs_and_keeps_fp32_weights(start: SimpleNamespace) -> None:
    before, model, losses = tune(start, 2, trainer={"precision": "bf16-mixed"})
    assert all(torch.isfinite(torch.tensor(list(step.values()))).all() for step in losses)
    for name, value in snapshot(model.model).items():
        if not name.startswith("exits."):
            assert torch.equal(value, before[name]), name
    assert {p.dtype for p in model.model.exits.parameters()} == {torch.float32}


def test_a_sweep_begins_from_the_backbone_of_an_early_exit_file(start: SimpleNamespace) -> None:
    """Nine new exits on one layer; copied norm and mlp exits begin with the same loss as their lora twins."""
    with script_config("megatron_gpt_early_exit_sweep", ["layer=2"]) as cfg:
        block = OmegaConf.to_container(cfg.model.early_exit, resolve=True)
    _, model, losses = tune(start, 3, early_exit=block)
    assert len(model.early_exit.names) == len(losses[0]) == 9 and len(model.model.decoder.layers) == 2
    for architecture in ("norm", "mlp", "layer"):
        assert losses[0][f"copy-{architecture}"] == pytest.approx(losses[0][f"lora-{architecture}"], rel=1e-6)
        assert losses[0][f"copy-{architecture}"] != pytest.approx(losses[0][f"random-{architecture}"], rel=1e-3)
        assert losses[2][f"copy-{architecture}"] < losses[0][f"copy-{architecture}"]


def test_chat_data_is_learnt_from_answers_only(start: SimpleNamespace) -> None:
    """The loss of a step is that of the tokens the mask counts, and no other; computed anew from plain logits."""
    circle = [5, 9, 2, 77, 131, 40, 8]
    documents = [(circle * 30)[shift : shift + 90] for shift in range(40)]
    prefix = write_data(start.folder / "chat", documents)
    write_data(start.folder / "chat.mask", [[int(token in (77, 8)) for token in document] for document in documents])
    data = {**model_block(start)["data"], "data_prefix": {"train": [str(prefix)], "validation": [str(prefix)]}}
    data["data_prefix"]["test"] = None
    _, model, losses = tune(start, 1, data=data)
    samples = [model._train_ds[index] for index in range(GLOBAL_BATCH)]
    tokens, labels, mask = (torch.stack([s[key] for s in samples]) for key in ("tokens", "labels", "loss_mask"))
    assert torch.equal(mask.bool(), (labels == 77) | (labels == 8))
    logits = exit_logits(restore(start.path), tokens)
    for name, ours in losses[0].items():
        each = torch.nn.functional.cross_entropy(logits[name].flatten(0, 1), labels.flatten(), reduction="none")
        assert ours == pytest.approx((each * mask.flatten()).sum().item() / mask.sum().item(), rel=1e-5), name
        assert ours != pytest.approx(each.mean().item(), rel=1e-3), "control: all tokens give another loss"


def test_data_made_again_under_the_same_prefix_is_what_is_read(start: SimpleNamespace) -> None:
    """12 documents, then 72 others, then 12 again: losses are those of the same data under a name of its own."""
    circles = [[5, 9, 2, 77, 131, 40, 8], [3, 100, 61, 12]]

    def losses_of(name: str, count: int, circle: list[int]) -> list[dict[str, float]]:
        prefix = write_data(start.folder / name, [(circle * 30)[:90]] * count)
        splits = {"train": [f"{prefix}.bin"], "validation": [str(prefix)], "test": None}
        data = {**model_block(start)["data"], "data_prefix": splits, "index_mapping_dir": None}
        return tune(start, 1, data=data)[2]

    first = losses_of("again", 12, circles[0])
    assert losses_of("again", 72, circles[1]) == losses_of("fresh", 72, circles[1]) != first
    assert losses_of("again", 12, circles[0]) == first


def test_a_run_without_validation_data_learns_the_same(tuned: SimpleNamespace, start: SimpleNamespace) -> None:
    prefixes = {"train": [str(start.data)], "validation": None, "test": None}
    data = {**model_block(start)["data"], "data_prefix": prefixes}
    _, model, losses = tune(start, 2, data=data, trainer={"limit_val_batches": 0})
    assert losses == tuned.losses[:2] and model._validation_ds is None


def test_the_progress_bar_shows_the_loss_of_every_exit_at_log_steps(
    start: SimpleNamespace, capsys, monkeypatch
) -> None:
    """The bar says between two log steps what it said at the last; validation has a bar of its own."""
    monkeypatch.setenv("COLUMNS", "200")
    options = {"enable_progress_bar": True, "log_every_n_steps": 2, "limit_val_batches": 1}
    _, model, losses = tune(start, 4, trainer=options)
    shown = capsys.readouterr()
    lines = [line for line in re.split(r"[\r\n]+", shown.err) if line.startswith("tune: ")]
    name = EXITS[0]["name"]
    values = {int(n): value for n, value in re.findall(rf" (\d)/4 \[.*{name}=([\d.]+)", "\n".join(lines))}
    assert (
        values == {2: values[2], 3: values[2], 4: f"{losses[3][name]:.3f}"} and values[2] == f"{losses[1][name]:.3f}"
    )
    assert values[2] != values[4], "control"
    assert all(f"{exit['name']}=" in lines[-1] for exit in EXITS) and "val_loss=" in lines[-1]
    assert "Validation" in shown.err and "tune" not in shown.out


# -- the script -----------------------------------------------------------------------------------------------------


def test_the_script_as_a_user_runs_it(start: SimpleNamespace, tmp_path: Path) -> None:
    """Exits only, with checkpoints, logs and validation; what it writes can be used."""
    data = f"{{train: [{start.data}], validation: [{start.data}], test: [{start.data}]}}"
    command = [
        sys.executable, str(ROOT / "examples" / f"{SCRIPT}.py"), "trainer.accelerator=cpu", "trainer.precision=32",
        f"model.restore_from_path={start.path}", "save_to=tuned.nemo", "exits_only=True",
        f"model.data.data_prefix={data}", f"model.data.index_mapping_dir={tmp_path / 'index'}",
        "trainer.max_steps=4", "trainer.val_check_interval=4", "trainer.limit_val_batches=1",
        "trainer.log_every_n_steps=2", "model.micro_batch_size=2", "model.global_batch_size=4",
        f"model.encoder_seq_length={LENGTH}", "model.val_agreement=True", "model.optim.lr=1e-2",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=user_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "outputs", "tuned.nemo"]
    output = done.stdout + done.stderr
    assert "stage 0: layers 1-3, frozen" in output and "trains" in output, "what trains is said at the start"
    run = tmp_path / "outputs" / SCRIPT
    assert done.stdout == f"tuned model: tuned.nemo; checkpoints and TensorBoard: {run.relative_to(tmp_path)}\n"
    assert all(f"{exit['name']}=" in done.stderr or " in the log file" in done.stderr for exit in EXITS)
    (log_file,) = (tmp_path / "outputs" / "logs").iterdir()
    assert done.stderr.startswith(f"{SCRIPT}: log file outputs/logs/{log_file.name}\n")
    everything = log_file.read_text("utf-8")
    for noise in ("[NeMo ", "GPU available", "distributed_backend=gloo", "Falling back", "number of sequences"):
        assert noise in everything and noise not in output, noise
    steps = [line for line in everything.splitlines() if " step 2 of 4: " in line or " step 4 of 4: " in line]
    assert len(steps) == 2 and all(exit["name"] in line for exit in EXITS for line in steps)
    (log,) = run.rglob("events.out.tfevents.*")  # one TensorBoard for all exits
    checkpoints = list((run / "checkpoints").iterdir())
    assert checkpoints and all(path.is_dir() for path in checkpoints)
    assert not any("decoder" in path.name for path in checkpoints)
    assert not any(name.startswith("model_weights/") for name in members(tmp_path / "tuned.nemo"))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log.parent))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    for exit in EXITS:
        assert {f"exit/{exit['name']}/loss", f"val/exit/{exit['name']}/agreement"} <= tags
        trains = exit["name"] != NOTHING_TO_TRAIN
        assert {f"exit/{exit['name']}/{metric}" in tags for metric in ("lr", "grad_norm")} == {trains}
    assert {"val/full_model/loss", "val_loss", "lr"} <= tags
    assert [event.step for event in events.Scalars(f"exit/{EXITS[0]['name']}/loss")] == [1, 3]

    numbers, settings = _script("scripts/plot_tuning.py").read_run(tmp_path / "outputs")
    assert list(settings) == [exit["name"] for exit in EXITS] and settings[EXITS[1]["name"]]["init"] == "lora"
    assert [step for step, _ in numbers[f"exit/{EXITS[0]['name']}/loss"]] == [1, 3]

    model, begun = restore(tmp_path / "tuned.nemo"), restore(start.path)
    tokens = random_tokens(model)
    ours, theirs = exit_logits(model, tokens), exit_logits(begun, tokens)
    assert {name for name in ours if torch.equal(ours[name], theirs[name])} == {NOTHING_TO_TRAIN}


def _script(path: str = f"examples/{SCRIPT}.py"):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ["model.data.data_prefix is needed and not given", "model.restore_from_path is needed and not given"]),
        (["model.restore_from_path=/nowhere.nemo", "model.data.data_prefix=[x]"], ["/nowhere.nemo"]),
        (
            ["model.data.data_prefix={train: [no/a], validation: [no/b], test: [no/c]}", "trainer.max_steps=0",
             "model.early_exit.exits=[{layer: 7}]", "model.encoder_seq_length=100", "trainer.precision=16-mixed"],
            ["the run cannot start:", "no/a.bin does not exist", "no/c.idx", "max_steps=0", "layer = 7",
             "encoder_seq_length=100 is longer than the model's 32", "trainer.precision=16-mixed"],
        ),
    ],
    ids=["nothing given", "no such file", "several problems"],
)  # fmt: skip
def test_the_script_tells_every_problem_at_once(
    overrides: list[str], expected: list[str], start: SimpleNamespace, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if overrides and not overrides[0].startswith("model.restore"):
        overrides = [f"model.restore_from_path={start.path}", *overrides]
    with script_config(SCRIPT, overrides) as cfg, pytest.raises(SystemExit) as ended:
        _script().main(cfg)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    for text in expected:
        assert text in message, message
    assert list(tmp_path.iterdir()) == [], "nothing was made before the problems were told"


def test_bf16_weights_with_fp32_copies_end_to_end(start: SimpleNamespace) -> None:
    """`megatron_amp_O2`: exits learn, the backbone stays, validation runs, and the file is read in fp32 again."""
    settings = {"megatron_amp_O2": True, "val_agreement": True}
    before, model, losses = tune(start, 10, trainer={"precision": "bf16", "limit_val_batches": 1}, **settings)
    after = snapshot(model.model)
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.bfloat16}
    trains = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(value, before[name]) == (name not in trains) for name, value in after.items())
    for name in losses[0]:
        assert name == NOTHING_TO_TRAIN or losses[-1][name] < 0.8 * losses[0][name], name
    assert 0.0 < float(model.trainer.callback_metrics["val/full_model/loss"]) < 10.0
    model.save_to(str(start.folder / "half.nemo"))
    loaded = restore(start.folder / "half.nemo")
    assert not loaded.main_weights and loaded.cfg.get("megatron_amp_O2") is None
    for name, parameter in loaded.model.exits.named_parameters():
        assert parameter.dtype is torch.float32
        assert torch.equal(parameter.detach(), after[f"exits.{name}"].float()), name
