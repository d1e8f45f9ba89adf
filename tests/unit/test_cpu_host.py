# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The CPU host: off, nothing of torch, Megatron or NeMo is touched; on, exactly the listed names answer.

Looked at in processes of their own, because switching it on holds for the rest of a process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_ee import cpu_host
from tests.helpers.megatron_models import user_environment

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow_unit

# Identity of every attribute of the modules and classes that the CPU host could touch.
_SNAPSHOT = """
import importlib, json, os, sys, warnings
warnings.filterwarnings("ignore")

NAMES = '''torch torch.cuda torch.cuda.nvtx torch.cuda.random torch.random torch.jit torch.jit._state torch.distributed
    megatron.core.tensor_parallel.random megatron.core.tensor_parallel megatron.core.parallel_state
    megatron.core.utils megatron.core.optimizer.clip_grads megatron.core.pipeline_parallel.p2p_communication'''.split()
NEMO = '''nemo.collections.nlp.parts.nlp_overrides nemo.collections.nlp.modules.common.megatron.build_model
    nemo.collections.nlp.modules.common.megatron.utils nemo.collections.nlp.modules.common.megatron.clip_grads
    nemo.collections.nlp.models.language_modeling.megatron_gpt_model
    nemo.collections.nlp.models.language_modeling.megatron_base_model'''.split()
VARIABLES = "CUDA_VISIBLE_DEVICES NVIDIA_PYTORCH_VERSION CUDA_DEVICE_MAX_CONNECTIONS TORCHDYNAMO_DISABLE".split()

def snapshot(names):
    import torch
    owners = {name: importlib.import_module(name) for name in names}
    owners |= {"torch.Tensor": torch.Tensor, "torch.nn.Module": torch.nn.Module}
    taken = {}
    for owner, module in owners.items():
        for attribute, value in vars(module).items():
            # Submodules appear when something imports them; memory of lazy imports is not a patch.
            if type(value).__name__ == "module" or attribute in ("__doc__", "__builtins__", "__warningregistry__"):
                continue
            taken[f"{owner}.{attribute}"] = value  # kept alive, so identities cannot be reused
    taken |= {f"${name}": os.environ.get(name) for name in VARIABLES}
    return taken

def changes(before, after):
    missing = object()
    pairs = {name: (before.get(name, missing), after.get(name, missing)) for name in before.keys() | after.keys()}
    # Variables of the environment are read anew each time, so their texts are compared.
    return sorted(n for n, (old, new) in pairs.items() if old is not new and not (n[0] == "$" and old == new))
"""


def _run(program: str, *arguments: str) -> Any:
    """The JSON of the last line that a program prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _SNAPSHOT + program, *arguments],
        capture_output=True, text=True, cwd=ROOT, env=user_environment(), timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """One process (NeMo is slow to import): all of the package imported while off, then switched on, then twice."""
    return _run("""
import pkgutil, torch, torch._dynamo
before = snapshot(NAMES + NEMO)
import nemo_ee
imported = []
for module in pkgutil.walk_packages(nemo_ee.__path__, "nemo_ee."):
    try:
        importlib.import_module(module.name)
        imported.append(module.name)
    except ImportError as error:
        assert "nemo_ee" not in str(error.name), error
from nemo_ee import cpu_host
cpu_host.adapt_nemo()
assert not cpu_host.enabled()
off = changes(before, snapshot(NAMES + NEMO))

cpu_host.enable()
assert cpu_host.enabled()
cpu_host.adapt_nemo()
switched_on = snapshot(NAMES + NEMO)
on = changes(before, switched_on)
cpu_host.enable()
twice = changes(switched_on, snapshot(NAMES + NEMO))

linear = torch.nn.Linear(2, 2)
made = torch.zeros(3, device="cuda"), torch.arange(3, device=torch.device("cuda", 1)), torch.randn(2).to("cuda:0")
torch.cuda.manual_seed(5)
drawn = torch.rand(1)
torch.cuda.set_rng_state(state := torch.cuda.get_rng_state())
one = torch.rand(1)
torch.cuda.set_rng_state(state)
answers = {
    "current_device": torch.cuda.current_device(),
    "available": torch.cuda.is_available(),
    "count": torch.cuda.device_count(),
    "tensor": torch.ones(2).cuda().device.type,
    "module": linear.cuda() is linear,
    "made": sorted({tensor.device.type for tensor in made}),
    "type": torch.ones(1).type(),
    "isinstance": isinstance(torch.ones(1), torch.cuda.FloatTensor),
    "dtype still converts": str(torch.ones(1).type(torch.float64).dtype),
    "to still converts": str(torch.ones(1).to(torch.bfloat16).dtype),
    "seeded": bool(drawn == torch.rand(1, generator=torch.Generator().manual_seed(5))),
    "state": bool(one == torch.rand(1)),
    "memory": torch.cuda.memory_allocated() + torch.cuda.max_memory_allocated("cuda"),
}
torch.cuda.set_device(0); torch.cuda.synchronize(); torch.cuda.empty_cache()
stream = torch.cuda.Stream(); stream.wait_stream(torch.cuda.current_stream()); stream.synchronize()
variables = {name: os.environ.get(name) for name in VARIABLES}
print(json.dumps(dict(looked_at=len(before), imported=imported, off=off, on=on, twice=twice, answers=answers,
                      variables=variables)))
""")


def test_off_nothing_changes(seen: dict[str, Any]) -> None:
    """Importing the whole package, NeMo model included, leaves torch, Megatron and NeMo as they are."""
    assert seen["off"] == []
    assert seen["looked_at"] > 2500
    for name in (
        "models.megatron_early_exit_gpt_model",
        "megatron.model.exit_head",
        "commands.convert",
        "models.connector",
    ):
        assert f"nemo_ee.{name}" in seen["imported"]


# What the module's docstring promises to answer.
EXPECTED_CHANGES = {
    "torch.cuda.current_device", "torch.cuda.is_available", "torch.cuda.device_count", "torch.cuda.Stream",
    "torch.cuda.set_device", "torch.cuda.synchronize", "torch.cuda.empty_cache", "torch.cuda.memory_allocated",
    "torch.cuda.max_memory_allocated", "torch.cuda.get_rng_state", "torch.cuda.set_rng_state",
    "torch.cuda.manual_seed", "torch.cuda.FloatTensor", "torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor",
    "torch.Tensor.cuda", "torch.nn.Module.cuda", "torch.zeros", "torch.tensor", "torch.empty", "torch.arange",
    "megatron.core.tensor_parallel.random._get_cuda_rng_state",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state",
    "nemo.collections.nlp.parts.nlp_overrides.HAVE_APEX",
    "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.get_specs",
    "nemo.collections.nlp.modules.common.megatron.utils.listify_model",
    "nemo.collections.nlp.modules.common.megatron.build_model."
    "set_defaults_if_not_set_tensor_model_parallel_attributes",
    "torch.Tensor.to", "torch.Tensor.type",
}  # fmt: skip


def test_on_exactly_the_listed_names_change(seen: dict[str, Any]) -> None:
    assert set(seen["on"]) >= EXPECTED_CHANGES
    factories = {f"torch.{name}" for name in cpu_host._FACTORIES}
    for name in seen["on"]:
        # Nothing beyond CUDA calls, factories, device moves, the script compiler's switch and Megatron's random state.
        listed = name in factories | EXPECTED_CHANGES
        assert listed or name.startswith(("torch.cuda.", "torch.jit._state.", "$")), f"{name} is not listed"
    assert seen["twice"] == [], "switching it on again changes nothing"


def test_what_the_answers_are(seen: dict[str, Any]) -> None:
    assert seen["answers"] == {
        "current_device": "cpu",
        "available": False,
        "count": 0,
        "tensor": "cpu",
        "module": True,
        "made": ["cpu"],
        "type": "torch.cuda.FloatTensor",
        "isinstance": True,
        "dtype still converts": "torch.float64",
        "to still converts": "torch.bfloat16",
        "seeded": True,
        "state": True,
        "memory": 0,
    }
    assert seen["variables"] == {
        "CUDA_VISIBLE_DEVICES": "",
        "NVIDIA_PYTORCH_VERSION": "25.07",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }


def test_after_cuda_was_used_it_refuses() -> None:
    refused = _run("""
import torch
torch.cuda.is_initialized = lambda: True
from nemo_ee import cpu_host
try:
    cpu_host.enable()
except RuntimeError as error:
    print(json.dumps([str(error), cpu_host.enabled()]))
""")
    assert "after torch initialised a CUDA device; call nemo_ee.cpu_host.enable() before any CUDA call" in refused[0]
    assert refused[1] is False


def test_a_device_as_a_context_still_applies() -> None:
    """transformers 5 builds a model in `with torch.device("meta")`, and leaves unset what was not made there."""
    made = _run("""
from nemo_ee import cpu_host
cpu_host.enable()
import torch
with torch.device("meta"):
    made = torch.tensor([1.0]), torch.zeros(2), torch.arange(3)
print(json.dumps([one.device.type for one in made]))
""")
    assert made == ["meta", "meta", "meta"]
