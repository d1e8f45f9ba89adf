# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""One optimizer per exit: independence in clipping and steps, groups, learning rates, and state by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.optim.adamw import adamw

from nemo_ee.megatron.optim.exit_optimizers import ExitOptimizers, exit_parameter_groups
from nemo_ee.megatron.optim.learning_rate import ExitLearningRates, LearningRateSchedule
from nemo_ee.megatron.optim.stage_optimizers import build_exit_optimizers, optimizer_factory
from tests.helpers.core_models import exit_entry, microbatch, random_tokens, snapshot, tiny_core_pair

OPTIM = {"lr": 1e-2, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.3, "sched": {"min_lr": 1e-3}}
EXITS = [
    exit_entry(1, "mlp"),
    exit_entry(2, "norm", lr=0.5, min_lr=0.25, weight_decay=0.0),
    exit_entry(2, "layer", "lora", rank=2),
    exit_entry(2, "embedding", output="shared"),
]
TRAINABLE = ["l1-mlp-copy-own", "l2-norm-copy-own", "l2-layer-lora-own"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture
def model(folder: Path):
    return tiny_core_pair(folder, "llama-bias", EXITS, full_depth=False)[1]


def _optimizers(model, max_norm: float = 0.0, make=torch.optim.AdamW) -> ExitOptimizers:
    return build_exit_optimizers(model.model.exits, OPTIM, make=make, max_norm=max_norm)


def _fill_gradients(optimizers: ExitOptimizers, seed: int = 0, scale: dict[str, float] | None = None) -> None:
    for exit in optimizers.exits:
        generator = torch.Generator().manual_seed(seed)
        for parameter in exit.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * (scale or {}).get(exit.name, 1.0)


def _norm(exit) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in exit.parameters.values()))


def test_groups_follow_the_settings_and_the_shapes(model) -> None:
    groups = {head.exit.name: exit_parameter_groups(head, OPTIM) for head in model.model.exits}
    assert groups["l2-embedding-copy-shared"] == [], "a shared output has nothing to train"
    decaying, others = groups["l1-mlp-copy-own"]
    assert decaying["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    assert {p.dim() for p in decaying["params"]} == {2} and {p.dim() for p in others["params"]} == {1}
    assert (decaying["lr"], decaying["max_lr"], decaying["min_lr"]) == (1e-2, 1e-2, 1e-3)
    own = groups["l2-norm-copy-own"][0]
    assert (own["lr"], own["min_lr"], own["weight_decay"]) == (0.5, 0.25, 0.0), "an exit's own settings win"
    low_rank = [p for group in groups["l2-layer-lora-own"] for p in group["params"]]
    assert len(low_rank) == 2 * 5, "four linears and the output projection"


def test_every_trainable_parameter_is_stepped_once_and_by_its_key(model) -> None:
    optimizers = _optimizers(model)
    assert [exit.name for exit in optimizers.exits] == TRAINABLE
    stepped = [parameter for exit in optimizers.exits for parameter in exit.parameters.values()]
    wanted = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    assert {id(p) for p in stepped} == {id(p) for p in wanted} and len(stepped) == len(wanted)
    for exit in optimizers.exits:
        assert all(key.startswith(f"exits.{exit.name}.") for key in exit.parameters)
        in_groups = [p for group in exit.optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in in_groups} == {id(p) for p in exit.parameters.values()}
    assert tuple(optimizers.exits[0].optimizer.defaults["betas"]) == (0.8, 0.9)
    assert optimizers.exits[0].optimizer.defaults["eps"] == 1e-6


def test_a_huge_gradient_of_one_exit_leaves_the_others_bitwise_alone(folder: Path) -> None:
    after = {}
    for case, scale in (("calm", {}), ("one explodes", {"l1-mlp-copy-own": 1e8})):
        model = tiny_core_pair(folder, "llama-bias", EXITS, full_depth=False)[1]
        optimizers = _optimizers(model, max_norm=1.0)
        _fill_gradients(optimizers, scale=scale)
        optimizers.step()
        after[case] = snapshot(model.model.exits)
        assert optimizers.grad_norms["l1-mlp-copy-own"] > (1e8 if scale else 1.0)
    changed = {name for name, value in after["calm"].items() if not torch.equal(value, after["one explodes"][name])}
    untouched = {name for name in after["calm"] if not name.startswith("heads.0.")}
    assert not changed & untouched and len(untouched) > 10


def test_each_exit_is_clipped_to_its_own_norm(model) -> None:
    optimizers = _optimizers(model, max_norm=2.0)
    _fill_gradients(optimizers, scale={"l2-norm-copy-own": 1e-4})
    before = {exit.name: _norm(exit) for exit in optimizers.exits}
    optimizers.clip_gradients()
    assert optimizers.grad_norms == pytest.approx(before, rel=1e-5)
    for exit in optimizers.exits:
        assert _norm(exit) == pytest.approx(min(before[exit.name], 2.0), rel=1e-5)
    assert before["l2-norm-copy-own"] < 2.0 < before["l1-mlp-copy-own"], "control: one below, one above the limit"


def test_what_a_step_will_do_is_known_before_it_and_changes_nothing_of_it(model, folder: Path) -> None:
    """Asking for the norms clips; the step does not clip a second time and ends where an unasked one does, bitwise."""
    other = tiny_core_pair(folder, "llama-bias", EXITS, full_depth=False)[1]
    asked, unasked = _optimizers(model, max_norm=2.0), _optimizers(other, max_norm=2.0)
    scale = {"l2-norm-copy-own": 1e-3}
    weights = {**dict.fromkeys(TRAINABLE, 1.0), "l2-embedding-copy-shared": 0.5}
    for seed in range(2):
        _fill_gradients(asked, seed, scale)
        _fill_gradients(unasked, seed, scale)
        norms = {exit.name: _norm(exit) for exit in asked.exits}
        values = asked.step_values(weights)
        assert values.keys() == weights.keys()
        assert values["l2-embedding-copy-shared"] == {"loss_weight": 0.5}, "nothing to train"
        assert values["l2-norm-copy-own"]["lr"] == 0.5
        for name in TRAINABLE:
            assert values[name]["grad_norm"] == pytest.approx(norms[name], rel=1e-5), "before clipping"
        asked.step()
        unasked.step()
        assert asked.grad_norms == unasked.grad_norms
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_no_limit_clips_nothing(model) -> None:
    optimizers = _optimizers(model, max_norm=0.0)
    _fill_gradients(optimizers, scale=dict.fromkeys(TRAINABLE, 1e6))
    before = [p.grad.clone() for exit in optimizers.exits for p in exit.parameters.values()]
    optimizers.step()
    after = [p.grad for exit in optimizers.exits for p in exit.parameters.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizers.grad_norms["l1-mlp-copy-own"] > 1e6, "the norm is logged all the same"


def test_gradients_become_those_of_the_mean_loss_per_token(model) -> None:
    """Microbatches with different numbers of counted tokens weigh by tokens."""
    from nemo_ee.megatron.loss.exit_metrics import ExitSums
    from nemo_ee.megatron.pipeline.tuning_step import tune_global_batch

    head = model.model.exits["l1-mlp-copy-own"]
    tokens = random_tokens(model, batch=4, length=9)
    mask = torch.ones(4, 9)
    mask[:2, 2:] = 0
    batches = [microbatch(tokens[rows], mask=mask[rows]) for rows in (slice(0, 2), slice(2, 4))]
    whole = microbatch(tokens, mask=mask)
    stage = model.model.forward_to_taps(whole)
    hidden = head(stage.taps[1], rotary_pos_emb=stage.rotary_pos_emb)
    logits = (hidden @ head.output.weight.t())[..., : model.vocab_size].transpose(0, 1)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole.labels.flatten(), reduction="none")
    mean = (losses * mask.flatten()).sum() / mask.sum()
    parameters = [p for p in head.parameters() if p.requires_grad]
    expected = torch.autograd.grad(0.7 * mean, parameters)
    optimizers = _optimizers(model)
    optimizers.zero_grad()
    sums = ExitSums(model.early_exit.names, torch.device("cpu"))
    total = tune_global_batch(
        model.context,
        batches,
        optimizers=optimizers,
        sums=sums,
        loss_weights={name: 0.7 for name in model.early_exit.names},
    )
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    logged = sums.reduce(over_data=False)
    assert logged["l1-mlp-copy-own"]["loss"] == pytest.approx(mean.item(), rel=1e-5), "logged without its weight"
    assert set(logged) == set(model.early_exit.names)
    assert total.item() == pytest.approx(sum(values["loss"] for values in logged.values()), rel=1e-5)


# -- state ----------------------------------------------------------------------------------------------------------


class GroupStepAdam(torch.optim.Optimizer):
    """Stands in for Apex's FusedAdam, whose kernel is missing here: torch's AdamW, the step kept in the group."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def zero_grad(self) -> None:
        """Takes no `set_to_none`, as Apex's does not."""
        super().zero_grad()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            adamw(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                [torch.tensor(group["step"] - 1.0) for _ in parameters],
                foreach=False,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def test_the_stand_in_is_adamw(model) -> None:
    """Bitwise torch's own, or the tests with it would show nothing."""
    torch.manual_seed(0)
    ours, theirs = (torch.ones(7, 5).requires_grad_() for _ in range(2))
    optimizers = GroupStepAdam([ours], weight_decay=0.1), torch.optim.AdamW([theirs], weight_decay=0.1, foreach=False)
    for _ in range(3):
        ours.grad = torch.randn(7, 5)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs) and optimizers[0].param_groups[0]["step"] == 3


def test_a_step_kept_in_the_group_is_saved_and_restored_by_name(model) -> None:
    """Two exits whose counts differ, because one exit's step was left out."""
    optimizers = _optimizers(model, make=GroupStepAdam)
    for seed in range(2):
        _fill_gradients(optimizers, seed)
        if seed:
            next(iter(optimizers.exits[0].parameters.values())).grad.view(-1)[0] = math.nan
        optimizers.step()
    state = optimizers.sharded_state_dict(model.sharded_state_dict())["exits"]
    assert [state[name]["scalars"].data[2].item() for name in TRAINABLE] == [1.0, 2.0, 2.0]
    fresh = _optimizers(model, make=GroupStepAdam)
    fresh.load_state_dict(
        {
            "exits": {
                name: {
                    key: value.data if key == "scalars" else {n: shard.data for n, shard in value.items()}
                    for key, value in exit.items()
                }
                for name, exit in state.items()
            }
        }
    )
    steps = [{group["step"] for group in exit.optimizer.param_groups} for exit in fresh.exits]
    assert steps == [{1}, {2}, {2}] and all(isinstance(step, int) for one in steps for step in one)


@pytest.mark.parametrize(
    "make",
    [torch.optim.AdamW, torch.optim.Adam, optimizer_factory("adamw"), GroupStepAdam],
    ids=["AdamW", "Adam", "fused AdamW", "step in the group"],
)
def test_state_survives_a_distributed_checkpoint(folder: Path, tmp_path: Path, make) -> None:
    """Save after three steps, load into a fresh model: further steps are bitwise those of the run that went on."""
    from megatron.core import dist_checkpointing

    model = tiny_core_pair(folder, "llama-bias", EXITS, full_depth=False)[1]
    optimizers = _optimizers(model, max_norm=1.0, make=make)
    for seed in range(3):
        _fill_gradients(optimizers, seed)
        optimizers.step()
    (tmp_path / "state").mkdir()
    dist_checkpointing.save(
        {"model": model.sharded_state_dict(), "optimizer": optimizers.sharded_state_dict(model.sharded_state_dict())},
        tmp_path / "state",
    )

    fresh = tiny_core_pair(folder, "llama-bias", EXITS, full_depth=False)[1]
    resumed = _optimizers(fresh, max_norm=1.0, make=make)
    wanted = {
        "model": fresh.sharded_state_dict(),
        "optimizer": resumed.sharded_state_dict(fresh.sharded_state_dict()),
    }
    loaded = dist_checkpointing.load(wanted, tmp_path / "state")
    with torch.no_grad():
        for key, shard in fresh.sharded_state_dict().items():
            shard.data.copy_(loaded["model"][key].view(shard.data.shape))
    resumed.load_state_dict(loaded["optimizer"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    for one in (optimizers, resumed):
        _fill_gradients(one, 7)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    # Control: without the state the next step is another one.
    cold = _optimizers(fresh, max_norm=1.0, make=make)
    for one in (optimizers, cold):
        _fill_gradients(one, 8)
        one.step()
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_asking_for_the_state_moves_nothing(model) -> None:
    """Before the first step the optimizers have no state; allocating it for a load changes no weight or gradient."""
    optimizers = _optimizers(model)
    _fill_gradients(optimizers)
    before = snapshot(model.model)
    gradients = [p.grad.clone() for exit in optimizers.exits for p in exit.parameters.values()]
    rates = [(group["lr"], group["weight_decay"]) for group in optimizers.param_groups]
    state = optimizers.sharded_state_dict(model.sharded_state_dict())
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model.model).items())
    after = [p.grad for exit in optimizers.exits for p in exit.parameters.values()]
    assert all(torch.equal(a, b) for a, b in zip(gradients, after, strict=True))
    assert [(group["lr"], group["weight_decay"]) for group in optimizers.param_groups] == rates
    assert set(state["exits"]) == set(TRAINABLE)
    scalars = state["exits"]["l2-norm-copy-own"]["scalars"]
    assert scalars.key == "optimizer.l2-norm-copy-own.scalars" and scalars.data.tolist() == [0.5, 0.0, 0.0]


def test_vectors_do_not_start_to_decay_after_a_load(model) -> None:
    optimizers = _optimizers(model)
    state = optimizers.sharded_state_dict(model.sharded_state_dict())
    loaded = {
        "exits": {
            name: {
                key: value.data if key == "scalars" else {n: shard.data for n, shard in value.items()}
                for key, value in exit.items()
            }
            for name, exit in state["exits"].items()
        }
    }
    optimizers.load_state_dict(loaded)
    assert [g["weight_decay"] for g in optimizers.exits[0].optimizer.param_groups] == [0.3, 0.0]


def test_state_of_other_exits_is_refused(model) -> None:
    optimizers = _optimizers(model)
    with pytest.raises(ValueError, match=r"state of exit 'l1-mlp-copy-own' \(it has \['other'\]\); resume"):
        optimizers.load_state_dict({"exits": {"other": {}}})


def test_a_stage_without_exits_has_an_optimizer_that_does_nothing() -> None:
    """torch refuses an empty list, and NeMo reads param_groups[0]['lr']."""
    optimizers = ExitOptimizers([], max_norm=1.0)
    assert optimizers.param_groups[0]["lr"] == 0.0
    assert optimizers.step(lambda: torch.tensor(3.0)) == 3.0
    optimizers.zero_grad()
    assert optimizers.sharded_state_dict({}) == {"exits": {}} == optimizers.state_dict()
    optimizers.load_state_dict({"exits": {"elsewhere": {}}})
    assert ExitLearningRates(optimizers, LearningRateSchedule("Constant", 0, 10)).get_last_lr() == [0.0]


# -- learning rates ---------------------------------------------------------------------------------------------------


def test_schedule_values() -> None:
    linear = LearningRateSchedule("LinearAnnealing", warmup_steps=2, max_steps=10)
    rates = [linear.learning_rate(step, lr=1.0, min_lr=0.2) for step in range(12)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[6] == pytest.approx(0.6) and rates[10] == rates[11] == pytest.approx(0.2)
    cosine = LearningRateSchedule("CosineAnnealing", warmup_steps=0, max_steps=8)
    assert [cosine.learning_rate(step, lr=1.0, min_lr=0.0) for step in (0, 2, 4, 8)] == pytest.approx(
        [1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.0], abs=1e-12
    )
    constant = LearningRateSchedule("Constant", warmup_steps=0, max_steps=8)
    assert constant.learning_rate(7, lr=0.3, min_lr=0.1) == 0.3


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.optim.sched.name='Linear' is not one of CosineAnnealing, LinearAnn"):
        LearningRateSchedule.of({"name": "Linear"}, num_steps=5)


def test_every_exit_follows_its_own_rates_and_resumes(model) -> None:
    schedule = LearningRateSchedule.of({"name": "LinearAnnealing", "warmup_steps": 0}, num_steps=4)

    def rates(optimizers: ExitOptimizers) -> dict[str, float]:
        return {exit.name: exit.optimizer.param_groups[0]["lr"] for exit in optimizers.exits}

    optimizers = _optimizers(model)
    learning_rates = ExitLearningRates(optimizers, schedule)
    assert rates(optimizers)["l1-mlp-copy-own"] == pytest.approx(1e-2)
    assert rates(optimizers)["l2-norm-copy-own"] == pytest.approx(0.5)
    for _ in range(2):
        optimizers.step()
        learning_rates.step()
    assert rates(optimizers)["l1-mlp-copy-own"] == pytest.approx((1e-2 + 1e-3) / 2)
    assert rates(optimizers)["l2-norm-copy-own"] == pytest.approx((0.5 + 0.25) / 2)
    assert learning_rates.state_dict() == {"last_epoch": 2}
    resumed = _optimizers(model)
    ExitLearningRates(resumed, schedule).load_state_dict({"last_epoch": 2})
    assert rates(resumed) == rates(optimizers)
