# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What setup.py declares against what the package imports, the NGC container holds and the constraints pin; and the
files that start a run elsewhere (Docker, Slurm, CI), which are checked but have not been run there.
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
CONTAINER_LIST = ROOT / "tests" / "data" / "ngc-nemo-25.07-packages.txt"
# Distributions whose import name differs.
IMPORT_NAMES = {"hydra-core": "hydra", "nemo-toolkit": "nemo", "megatron-core": "megatron", "pyyaml": "yaml"}
# Imported by serving/, export/vllm/, lm_eval_adapter.py and by functions (export/, Apex's optimizer) only; declared by
# extras or by the container.
OPTIONAL_IMPORTS = set(
    "fastapi starlette uvicorn prometheus_client jinja2 tensorrt_llm flashinfer lm_eval apex gguf vllm".split()
)


@functools.cache
def declared() -> dict[str, dict[str, Requirement] | str]:
    """The keyword arguments of setup() in setup.py, requirements parsed; setuptools installs nothing."""
    captured: dict = {}
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    import setuptools

    original = setuptools.setup
    setuptools.setup = lambda **arguments: captured.update(arguments)
    try:
        exec(compile(source, "setup.py", "exec"), {"__file__": str(ROOT / "setup.py"), "__name__": "setup"})
    finally:
        setuptools.setup = original
    return captured


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """By name; ranges of one package on several lines are one range."""
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        if name in found:
            requirement.specifier &= found[name].specifier
        found[name] = requirement
    return found


def host_requirements() -> dict[str, Requirement]:
    """Of the NeMo host: the core, and the extra `nemo`."""
    return requirements([*declared()["install_requires"], *declared()["extras_require"]["nemo"]])


def container_problems(runtime: dict[str, Requirement], lines: list[str]) -> list[str]:
    """Runtime requirements that the recorded packages of the container do not meet.

    A recorded range has to be accepted at each of its own ends, and beyond them where it is open upwards.
    """
    recorded: dict[str, list[Requirement]] = {}
    for line in lines:
        text = line.partition("#")[0].strip()
        if text:
            requirement = Requirement(text)
            recorded.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    problems = []
    for name, requirement in runtime.items():
        if name not in recorded:
            problems.append(f"{requirement}: {name} is not on the container's list")
        for known in recorded.get(name, []):
            ends = [spec.version for spec in known.specifier if spec.operator in ("==", ">=", "<=")]
            if not any(spec.operator in ("==", "<=", "<", "~=") for spec in known.specifier):
                ends.append("99999")
            for version in ends:
                if not requirement.specifier.contains(Version(version), prereleases=True):
                    problems.append(f"{requirement} does not accept {name} {version} of the container ({known})")
    return problems


def container_lines() -> list[str]:
    return CONTAINER_LIST.read_text(encoding="utf-8").splitlines()


def test_container_meets_the_runtime_requirements() -> None:
    assert not container_problems(host_requirements(), container_lines())


def test_container_python_is_supported() -> None:
    line = next(line for line in container_lines() if line.startswith("python=="))
    version = re.match(r"python==(\S+)", line)[1]
    assert Requirement(f"python{declared()['python_requires']}").specifier.contains(version)


def test_container_list_says_that_it_was_not_read_off_the_container() -> None:
    text = CONTAINER_LIST.read_text(encoding="utf-8")
    assert "NOT read off a running container" in text.split("\n\n")[0]
    entries = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert entries and all(re.search(r"# \[\w+\]", line) for line in entries), "every line names its source"


@pytest.mark.parametrize(
    "requirement",
    ["torch>=2.8", "numpy>=2", "safetensors>=0.4.3,<0.6", "megatron-core>=0.13.1", "fairscale", "transformers>=4.52"],
)
def test_control_a_requirement_the_container_lacks_is_reported(requirement: str) -> None:
    assert container_problems(requirements([requirement]), container_lines())


def test_torch_range_is_the_supported_one() -> None:
    torch = requirements(declared()["install_requires"])["torch"].specifier
    accepted = [torch.contains(version, prereleases=True) for version in ("2.7.1", "2.8.0", "2.13.0", "2.14.0")]
    assert accepted == [False, True, True, False]


def imported_packages(folder: Path) -> set[str]:
    """Top-level names of others' packages that the Python files under a folder import."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
        names -= {beside.stem for beside in path.parent.glob("*.py")} | {"lib"}  # what scripts import of scripts/
    return names - set(sys.stdlib_module_names) - {"nemo_ee"}


def test_everything_the_package_imports_is_declared() -> None:
    provided = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in host_requirements()}
    imported = set().union(*(imported_packages(ROOT / name) for name in ("nemo_ee", "examples", "scripts")))
    own = {"benchmarks"}  # a folder beside these
    assert imported - provided - OPTIONAL_IMPORTS - own == set()


def test_metadata_is_read_without_importing_the_package() -> None:
    probe = (
        "import runpy, sys, setuptools; setuptools.setup = lambda **k: sys.stdout.write(k['version']);"
        "runpy.run_path('setup.py'); assert not any(m.split('.')[0] == 'nemo_ee' for m in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Version(result.stdout)
    assert f"version: {result.stdout}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def pins(version: str) -> dict[str, Requirement]:
    lines = (ROOT / "constraints" / f"constraints-py{version}.txt").read_text(encoding="utf-8").splitlines()
    return requirements([text for line in lines if (text := line.partition("#")[0].strip())])


@pytest.mark.parametrize("version", ["311", "312"])
def test_constraints_pin_what_is_declared(version: str) -> None:
    pinned = pins(version)
    assert not [str(pin) for pin in pinned.values() if [spec.operator for spec in pin.specifier] != ["=="]]
    extras = declared()["extras_require"]
    wanted = requirements([*declared()["install_requires"], *extras["cpu"], *extras["dev"]])
    missing = sorted(set(wanted) - set(pinned))
    assert not missing, f"not pinned in constraints-py{version}.txt: {missing}"
    for name, requirement in wanted.items():
        exact = next(iter(pinned[name].specifier)).version
        assert requirement.specifier.contains(exact), f"{requirement} excludes its pin {exact}"


@pytest.mark.parametrize("version", ["311", "312"])
def test_constraints_hold_no_gpu_packages(version: str) -> None:
    gpu = re.compile(r"^(nvidia|cuda|cupy|triton|apex|transformer-engine|torchvision)")
    assert not [name for name in pins(version) if gpu.match(name)]


def test_installed_packages_are_the_pinned_ones() -> None:
    """The constraints hold neither more nor less than what an installation from them has (checked where one is)."""
    from importlib.metadata import distributions

    stamp = Path(sys.prefix) / "nemo_ee-installed"
    if not stamp.is_file():
        pytest.skip("this Python is not an environment made by scripts/make_venv.sh")
    tools = {"pip", "wheel", "nemo-ee"}
    # Not every path of sys.path: setuptools, once imported, adds copies of its own.
    found = distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    installed = {canonicalize_name(d.metadata["Name"]): d.version.partition("+")[0] for d in found}
    wanted = pins("".join(map(str, sys.version_info[:2])))
    expected = {name: next(iter(pin.specifier)).version for name, pin in wanted.items()}
    assert {name: version for name, version in installed.items() if name not in tools} == expected


SHELL_FILES = ("scripts/make_venv.sh", "scripts/slurm/tune.sub", ".ci/run")


@pytest.mark.parametrize("name", SHELL_FILES)
def test_shell_files_parse_and_pass_shellcheck(name: str) -> None:
    path = ROOT / name
    parsed = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    assert re.search(r"^set -euo pipefail$", path.read_text(encoding="utf-8"), re.MULTILINE)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{Path('/usr/bin')}:{Path('/bin')}")
    if shellcheck:
        checked = subprocess.run([shellcheck, str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", ["scripts/slurm/tune.sub", "scripts/kubernetes/tune.yaml", "docker/Dockerfile"])
def test_a_file_for_a_cluster_names_what_exists_and_that_it_was_not_tried(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.search(r"# .*has not been run", text) and "nvcr.io/nvidia/nemo:25.07" in text
    if name == "docker/Dockerfile":
        assert re.search(r"^RUN pip install .*--no-deps -e \.$", text, re.MULTILINE)
        return
    script = re.search(r"(?:python|-) (examples/\w+\.py)", text)[1]
    overrides = re.findall(r'^ +(?:- )?"?([a-z_.]+)=', text, re.MULTILINE)
    config = OmegaConf.load(ROOT / "conf" / Path(script).with_suffix(".yaml").name)
    unknown = []
    for override in overrides:
        section, _, key = override.rpartition(".")
        if key not in OmegaConf.to_container(OmegaConf.select(config, section) if section else config):
            unknown.append(override)
    assert (ROOT / script).is_file() and "model.data.data_prefix" in overrides and not unknown


def test_makefile_offers_what_the_documents_name() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"venv", "demo", "test", "lint", "clean"} <= targets
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        named = set(re.findall(r"`make ([a-z-]+)", path.read_text(encoding="utf-8")))
        assert named <= targets, f"{path.name} names make targets that do not exist: {sorted(named - targets)}"


def test_embedded_model_is_complete() -> None:
    folder = ROOT / "assets" / "reference-model"
    names = ["config.json", "model.safetensors", "tokenizer.json", "corpus/train.jsonl.gz", "corpus/heldout.jsonl.gz"]
    assert [name for name in names if not (folder / name).is_file()] == []
    assert (folder / "corpus" / "LICENSE-PSF.txt").is_file(), "the sample of CPython's library carries its licence"
