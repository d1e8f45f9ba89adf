# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""fp32 main weights and Megatron's distributed optimizer on one rank, against naive code. More ranks:
tests/distributed/test_optimizers.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from nemo_ee.megatron.optim.stage_optimizers import optimizer_factory, stage_optimizers
from tests.helpers.core_models import exit_entry, microbatch, random_tokens, snapshot, tiny_core_pair

OPTIM = {"lr": 1e-3, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.1}
EXITS = [
    exit_entry(1, "mlp"),
    exit_entry(2, "norm", lr=5e-3),
    exit_entry(2, "layer", "lora", rank=2),
    exit_entry(2, "embedding", output="shared"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


def _model(folder: Path, *, half: bool):
    settings = {"params_dtype": torch.bfloat16, "bf16": True} if half else {}
    return tiny_core_pair(folder, "llama-bias", EXITS, full_depth=False, **settings)[1]


def _optimizers(model, name: str = "adamw", *, half: bool, max_norm: float = 0.0):
    return stage_optimizers(model.model, {**OPTIM, "name": name}, main_weights=half, max_norm=max_norm)


def _backward(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    """Autograd's own accumulation of a gradient, as a microbatch does it."""
    (parameter * gradient.to(parameter.dtype)).sum().backward()


def _gradients(exit, seed: int) -> dict[str, list[torch.Tensor]]:
    """bf16 gradients of two microbatches whose sum bf16 could not hold."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: [torch.randn(p.shape, generator=generator).bfloat16() * scale for scale in (1.0, 0.003)]
        for key, p in exit.parameters.items()
    }


@pytest.mark.parametrize("name", ["adamw", "mcore_distributed_optim"])
def test_main_weights_follow_a_naive_fp32_reference(folder: Path, name: str) -> None:
    """Six steps with clipping: main weights within 1e-6 of the largest, parameters bitwise their rounding."""
    model = _model(folder, half=True)
    optimizers = _optimizers(model, name, half=True, max_norm=1.0)
    exit = optimizers.exits[0]
    naive = {key: p.detach().float().clone().requires_grad_() for key, p in exit.parameters.items()}
    matrices, vectors = ([p for p in naive.values() if (p.dim() > 1) == wanted] for wanted in (True, False))
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=OPTIM["lr"], betas=OPTIM["betas"], eps=OPTIM["eps"], foreach=False,
    )  # fmt: skip
    drifting = {key: p.detach().clone().requires_grad_() for key, p in exit.parameters.items()}
    without = torch.optim.AdamW(
        drifting.values(), lr=OPTIM["lr"], betas=OPTIM["betas"], eps=OPTIM["eps"], weight_decay=0.1
    )
    for seed in range(6):
        gradients = _gradients(exit, seed)
        optimizers.zero_grad()
        for other in optimizers.exits[1:]:
            for key, values in _gradients(other, seed).items():
                _backward(other.parameters[key], values[0])
        for key, parameter in exit.parameters.items():
            for value in gradients[key]:
                _backward(parameter, value)
            assert parameter.grad is None and parameter.main_grad.dtype is torch.float32
            naive[key].grad = sum(value.float() for value in gradients[key])
            drifting[key].grad = sum(gradients[key])
        optimizers.step()
        torch.nn.utils.clip_grad_norm_(naive.values(), 1.0)
        torch.nn.utils.clip_grad_norm_(drifting.values(), 1.0)
        reference.step()
        without.step()
    state = exit.whole_state()
    errors = []
    for key, parameter in exit.parameters.items():
        main = state[key]["fp32_param"]
        expected = naive[key].detach()
        torch.testing.assert_close(main, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
        assert parameter.dtype is torch.bfloat16 and torch.equal(parameter.detach(), main.bfloat16())
        errors.append(((drifting[key].float() - expected).abs().max() / expected.abs().max()).item())
    assert max(errors) > 1e-3, "control: bf16 weights without main weights drift away"


@pytest.mark.parametrize("name", ["adamw", "mcore_distributed_optim"])
def test_gradients_of_two_microbatches_add_up_in_fp32(folder: Path, name: str) -> None:
    """Through the real loss, the output weights formed by hand too: close to those of an fp32 model, to bf16."""
    from nemo_ee.megatron.loss.exit_metrics import ExitSums
    from nemo_ee.megatron.pipeline.tuning_step import tune_global_batch

    found = {}
    for half in (False, True):
        model = _model(folder, half=half)
        optimizers = _optimizers(model, name if half else "adamw", half=half)
        optimizers.zero_grad()
        tokens = random_tokens(model, batch=4, length=9)
        tune_global_batch(
            model.context,
            [microbatch(tokens[:2]), microbatch(tokens[2:])],
            optimizers=optimizers,
            sums=ExitSums(model.early_exit.names, torch.device("cpu")),
            loss_weights=dict.fromkeys(model.early_exit.names, 1.0),
        )
        assert model.context.autocast is None, "bf16 parameters need no autocast"
        found[half] = {
            key: (p.main_grad if half else p.grad).clone()
            for exit in optimizers.exits
            for key, p in exit.parameters.items()
        }
    assert found[True].keys() == found[False].keys() and len(found[True]) > 10
    for key, gradient in found[False].items():
        error = (found[True][key] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert found[True][key].dtype is torch.float32 and error < 0.05, key


def test_frozen_parameters_cost_their_weights_only(folder: Path) -> None:
    model = _model(folder, half=True)
    optimizers = _optimizers(model, half=True)
    trained = {id(p) for exit in optimizers.exits for p in exit.parameters.values()}
    frozen = [p for p in model.model.parameters() if id(p) not in trained]
    assert frozen and {p.dtype for p in frozen} == {torch.bfloat16}
    for parameter in frozen:
        assert not hasattr(parameter, "main_grad") and not hasattr(parameter, "main_param") and parameter.grad is None
    buffered = sum(buffer.numel for exit in optimizers.exits for buffer in exit.ddp.buffers)
    assert buffered == sum(p.numel() for exit in optimizers.exits for p in exit.parameters.values())


@pytest.mark.parametrize(("name", "half"), [("adamw", True), ("mcore_distributed_optim", False)])
def test_a_step_with_gradients_that_are_not_finite_is_left_out(folder: Path, name: str, half: bool) -> None:
    model = _model(folder, half=half)
    optimizers = _optimizers(model, name, half=half, max_norm=1.0)
    bad, good = optimizers.exits[0], optimizers.exits[1]
    for round in range(2):
        optimizers.zero_grad()
        for exit in optimizers.exits:
            for key, values in _gradients(exit, round).items():
                _backward(exit.parameters[key], values[0])
        if round:
            next(iter(bad.parameters.values())).main_grad.view(-1)[3] = math.inf
            before = snapshot(model.model.exits)
            state = {key: {n: v.clone() for n, v in values.items()} for key, values in bad.whole_state().items()}
        optimizers.step()
    changed = {name for name, value in snapshot(model.model.exits).items() if not torch.equal(value, before[name])}
    assert changed and not any(name.startswith("heads.0.") for name in changed)
    assert not math.isfinite(optimizers.grad_norms[bad.name]) and math.isfinite(optimizers.grad_norms[good.name])
    for key, values in bad.whole_state().items():
        assert all(torch.equal(value, state[key][name]) for name, value in values.items())


def test_each_exit_is_clipped_to_its_own_norm(folder: Path) -> None:
    model = _model(folder, half=False)
    optimizers = _optimizers(model, "mcore_distributed_optim", half=False, max_norm=2.0)
    norms = {}
    for exit, scale in zip(optimizers.exits, (1.0, 1e-4, 1.0), strict=True):
        for key, values in _gradients(exit, 1).items():
            _backward(exit.parameters[key], values[0] * scale)
        norms[exit.name] = math.sqrt(sum(float(p.main_grad.square().sum()) for p in exit.parameters.values()))
    optimizers.clip_gradients()
    assert optimizers.grad_norms == pytest.approx(norms, rel=1e-5)
    for exit in optimizers.exits:
        after = math.sqrt(sum(float(p.main_grad.square().sum()) for p in exit.parameters.values()))
        assert after == pytest.approx(min(2.0, norms[exit.name]), rel=1e-5)
    assert min(norms.values()) < 2.0 < max(norms.values()), "control: one below, one above the limit"


def test_one_kernel_is_the_same_adam() -> None:
    """torch's fused AdamW within 1e-6 of its plain loop; splitting a parameter changes no bit."""
    torch.manual_seed(0)
    start, gradients = torch.randn(1003), torch.randn(5, 1003)
    whole = start.clone().requires_grad_()
    parts = [part.clone().requires_grad_() for part in start.split([333, 670])]
    loop = start.clone().requires_grad_()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = [optimizer_factory("adamw")(p, **options) for p in ([whole], parts)]
    optimizers.append(torch.optim.AdamW([loop], foreach=False, **options))
    for gradient in gradients:
        whole.grad, loop.grad = gradient.clone(), gradient.clone()
        for part, value in zip(parts, gradient.split([333, 670]), strict=True):
            part.grad = value.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[0].defaults["fused"] and torch.equal(whole, torch.cat(parts))
    torch.testing.assert_close(whole, loop, rtol=1e-6, atol=1e-6)
    assert not torch.equal(whole, start), "control"
