# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The shape of the code: a folder is a dependency boundary, imports point only down, files keep the house rules.

Sources are parsed, not imported, so an import inside a function counts as well. Every rule has a control: a made-up
offender that must be reported.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "nemo_ee"
HEADER = "# Copyright 2026 The nemo_ee authors.\n# SPDX-License-Identifier: Apache-2.0\n"
MAX_LINES = 400


@dataclass(frozen=True)
class Boundary:
    """What a folder of nemo_ee (or a module beside the folders) may import besides the standard library and itself."""

    packages: frozenset[str] = frozenset()  # others' packages; megatron only as megatron.core
    parts: frozenset[str] = frozenset()  # parts of nemo_ee
    only_lazily: frozenset[str] = field(default=frozenset())  # allowed inside functions only


def _boundary(packages: str = "", parts: str = "", only_lazily: str = "") -> Boundary:
    return Boundary(frozenset(packages.split()), frozenset(parts.split()), frozenset(only_lazily.split()))


_LEVEL_3 = "torch megatron.core safetensors nemo lightning omegaconf pydantic yaml numpy"
# Level 4 measures, draws and compares with transformers; what levels 0-3 may import, runtime's transformers included.
_LEVEL_4 = f"{_LEVEL_3} transformers tokenizers tqdm matplotlib"
_BELOW_4 = (
    "families exits planning generation text settings megatron checkpoint data runtime certificates models cpu_host"
)

BOUNDARIES = {
    # level 0
    "families": _boundary(),
    "exits": _boundary("torch"),
    # level 1: siblings, only megatron -> generation is allowed (its adapter to the engine)
    "planning": _boundary("torch", "families exits"),
    "generation": _boundary("torch", "exits"),
    "text": _boundary("tokenizers", "exits families generation", only_lazily="jinja2"),
    # the libraries whose own keys a config may hold are looked at where one is met
    "settings": _boundary("omegaconf pydantic", "exits", only_lazily="lightning megatron.core nemo"),
    "megatron": _boundary("torch megatron.core", "exits generation", only_lazily="apex"),
    # level 2
    "checkpoint": _boundary(
        "torch megatron.core safetensors yaml", "families exits generation text megatron", only_lazily="gguf"
    ),
    "data": _boundary("torch numpy megatron.core", "text megatron"),
    "runtime": _boundary("torch safetensors transformers tokenizers", "families exits generation text"),
    "certificates": _boundary("torch safetensors yaml", "exits generation text checkpoint"),
    # level 3
    "models": _boundary(
        _LEVEL_3,
        "families exits planning generation text settings megatron checkpoint data runtime certificates cpu_host",
    ),
    "bridge": _boundary(
        "torch megatron.core megatron.bridge safetensors pydantic yaml numpy",
        "families exits planning generation text settings megatron checkpoint data runtime certificates cpu_host",
        only_lazily="transformers",
    ),
    # level 4
    # commands is the lowest: evaluation and calibration decode with its text generator
    "commands": _boundary(f"{_LEVEL_4} hydra", _BELOW_4),
    "evaluation": _boundary(f"{_LEVEL_4} lm_eval", f"{_BELOW_4} commands"),
    "calibration": _boundary(_LEVEL_4, f"{_BELOW_4} commands evaluation"),
    # level 5
    # siblings, only serving -> export is allowed (the manifest of what it serves)
    "serving": _boundary(
        f"{_LEVEL_4} fastapi starlette uvicorn prometheus_client jinja2",
        f"{_BELOW_4} commands evaluation calibration export",
    ),
    "export": _boundary(
        _LEVEL_4, f"{_BELOW_4} commands evaluation calibration", only_lazily="tensorrt_llm flashinfer"
    ),
    # imported by vLLM only
    "export.vllm": _boundary(
        "torch numpy pydantic vllm", "exits generation runtime settings export", only_lazily="prometheus_client"
    ),
    # beside the levels
    "__init__": _boundary(),
    "package_info": _boundary(),
    "cpu_host": _boundary(only_lazily="torch megatron.core nemo nemo_ee.megatron"),
}


@cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _imports(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, inside a function) of every import, `importlib.import_module("...")` included."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[int, str, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, lazy
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from nemo_ee import cpu_host` names a part of the package, `from megatron import core` one of megatron.
            split = module in (PACKAGE, "megatron")
            yield from ((node.lineno, f"{module}.{a.name}" if split else module, lazy) for a in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value, lazy
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from dict.fromkeys(visit(tree, False))


def import_problems(part: str, source: str) -> list[str]:
    """Imports in `source`, a file of nemo_ee's `part`, that its boundary forbids."""
    boundary = BOUNDARIES.get(part)
    if boundary is None:
        return [f"{part} has no row in BOUNDARIES; decide what it may import"]
    problems = []
    for line, name, lazy in _imports(_parsed(source)):
        top, _, rest = name.partition(".")
        if name.startswith("."):
            problems.append(f"{line}: relative import {name}; write nemo_ee.{part}...")
            continue
        if top in sys.stdlib_module_names:
            continue
        if top == PACKAGE:
            target = rest.partition(".")[0]
            key, allowed = f"{PACKAGE}.{target}", target == part or target in boundary.parts
        else:
            key = ".".join(name.split(".")[:2]) if top == "megatron" else top
            allowed = key in boundary.packages
        if not allowed and not (lazy and key in boundary.only_lazily):
            where = " outside a function" if key in boundary.only_lazily else ""
            problems.append(f"{line}: {part} may not import {name}{where}")
    return problems


def source_problems(path: str, source: str) -> list[str]:
    """House rules that a Python file breaks. `path` is relative to the repository."""
    problems = []
    if not source.startswith(HEADER):
        problems.append(f"does not start with {HEADER!r}")
    tree = _parsed(source)
    marker = path.startswith("tests/") and path.endswith("/__init__.py")  # makes a package of a test folder, no more
    if not ast.get_docstring(tree) and not marker:
        problems.append("has no module docstring")
    if path.startswith(f"{PACKAGE}/"):
        if Path(path).name in ("utils.py", "helpers.py", "common.py"):
            problems.append("is named after nothing: say what it holds")
        lines = source.count("\n")
        if lines > MAX_LINES:
            problems.append(f"has {lines} lines, more than {MAX_LINES}: split it by responsibility")
        problems += [
            f"{node.lineno}: print(); use logging"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        ]
    return problems


def path_problems(text: str) -> list[str]:
    """Lines that name directories of somebody's machine."""
    # Written so that this line does not match itself.
    machine = re.compile(r"(?<![\w.~$}-])/(?:[w]ork|[r]oot|[U]sers/\w+|[h]ome/\w+)/")
    return [f"{i}: {line.strip()[:100]}" for i, line in enumerate(text.splitlines(), 1) if machine.search(line)]


def yaml_problems(text: str) -> list[str]:
    """Keys with a value and no comment on their line. Sections (nothing after the colon) explain themselves."""
    key = re.compile(r"^\s*(?:- )?[\w./-]+:\s+(?P<value>[^#\s].*)$")
    return [
        f"{i}: {line.strip()}"
        for i, line in enumerate(text.splitlines(), 1)
        if not line.lstrip().startswith("#") and key.match(line) and not re.search(r"\s# *\S", line)
    ]


@cache
def _tracked_files() -> list[Path]:
    """Text files of the repository: what git tracks or would track, all but assets outside a clone."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        folders = ("nemo_ee", "conf", "examples", "scripts", "tests", "benchmarks", "docs", "docker")
        paths = [*ROOT.glob("*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    outside = (ROOT / "assets").parts
    return sorted(p for p in paths if p.is_file() and p.parts[: len(outside)] != outside and p.suffix != ".pyc")


def _python_files() -> list[Path]:
    return [path for path in _tracked_files() if path.suffix == ".py"]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _report(problems: dict[str, list[str]]) -> str:
    return "\n" + "\n".join(f"{path}:{problem}" for path, found in problems.items() for problem in found)


def _all_problems(paths: list[Path], check) -> dict[str, list[str]]:  # noqa: ANN001
    found = {_name(path): check(path) for path in paths}
    return {path: problems for path, problems in found.items() if problems}


def _part(path: Path) -> str:
    parts = path.relative_to(ROOT / PACKAGE).parts
    if parts[:2] == ("export", "vllm"):
        return "export.vllm"
    return parts[0] if len(parts) > 1 else path.stem


def test_imports_point_only_down() -> None:
    sources = [path for path in _python_files() if ROOT / PACKAGE in path.parents]
    assert len(sources) > 20
    problems = _all_problems(sources, lambda path: import_problems(_part(path), path.read_text(encoding="utf-8")))
    assert not problems, _report(problems)


@pytest.mark.parametrize(
    ("part", "source", "word"),
    [
        ("families", "import torch", "families may not import torch"),
        ("exits", "import numpy", "exits may not import numpy"),
        ("exits", "def f():\n    from nemo_ee.generation import engine", "exits may not import nemo_ee.generation"),
        ("generation", "import megatron.core", "may not import megatron.core"),
        ("generation", "from nemo_ee.megatron.model.exit_head import ExitHead", "may not import nemo_ee.megatron"),
        ("megatron", "from megatron.training import get_args", "may not import megatron.training"),
        ("megatron", "from nemo_ee.checkpoint import chunk_reader", "may not import nemo_ee.checkpoint"),
        ("checkpoint", "from nemo_ee.runtime import model", "may not import nemo_ee.runtime"),
        ("checkpoint", "import nemo.collections.nlp", "may not import nemo.collections"),
        ("bridge", "from nemo_ee.models import connector", "may not import nemo_ee.models"),
        ("models", "from nemo_ee.bridge import provider", "may not import nemo_ee.bridge"),
        ("models", "from nemo_ee import evaluation", "may not import nemo_ee.evaluation"),
        ("commands", "from nemo_ee.evaluation.evaluate import x", "may not import nemo_ee.evaluation"),
        ("exits", "import importlib\nimportlib.import_module('nemo.core')", "may not import nemo.core"),
        ("export", "import vllm", "export may not import vllm"),
        ("export.vllm", "from nemo_ee.models import connector", "may not import nemo_ee.models"),
        ("export.vllm", "import nemo.collections.nlp", "may not import nemo.collections"),
        ("export", "import tensorrt_llm", "may not import tensorrt_llm outside a function"),
        ("cpu_host", "import torch", "may not import torch outside a function"),
        ("exits", "from ..generation import engine", "relative import"),
        ("kitchen_sink", "", "no row in BOUNDARIES"),
    ],
)
def test_control_a_forbidden_import_is_reported(part: str, source: str, word: str) -> None:
    problems = import_problems(part, source)
    assert len(problems) == 1 and word in problems[0]


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("exits", "from __future__ import annotations\nimport math, torch.nn\nfrom nemo_ee.exits.config import x"),
        ("megatron", "from megatron.core import parallel_state\nfrom megatron import core\nimport nemo_ee.generation"),
        ("export", "def build():\n    import tensorrt_llm"),
        ("models", "from nemo_ee import cpu_host\nimport lightning.pytorch as pl"),
    ],
)
def test_control_an_allowed_import_is_not_reported(part: str, source: str) -> None:
    assert import_problems(part, source) == []


# -- no circle, no two files of one name ------------------------------------------------------------------------------


def _module(path: str) -> str:
    """`nemo_ee/exits/config.py` -> `nemo_ee.exits.config`; `nemo_ee/exits/__init__.py` -> `nemo_ee.exits`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _when_imported(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: what is in no function, and not for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not for_types and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from _when_imported(node)


def import_circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle when one is imported; empty where there is none.

    Args:
        sources: path relative to the repository -> source, of the modules among which circles are looked for.
    """
    modules = {_module(path): _parsed(source) for path, source in sources.items()}
    graph: dict[str, set[str]] = {}
    for module, tree in modules.items():
        named: set[str] = set()
        for node in _when_imported(tree):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= (inside & modules.keys()) or {str(node.module)}
        graph[module] = named & modules.keys()
    return _circle(graph)


def _circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def repeated_names(paths: Iterable[str]) -> dict[str, list[str]]:
    """File name -> the paths, of names that several Python files of the package have.

    `__init__.py` says nothing by itself, and what lies in `files/` is copied out of the package and not imported.
    """
    found = defaultdict(list)
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name != "__init__.py" and "files" not in folder.split("/"):
            found[name].append(path)
    return {name: same for name, same in found.items() if len(same) > 1}


def _package_sources() -> dict[str, str]:
    return {_name(p): p.read_text(encoding="utf-8") for p in _python_files() if ROOT / PACKAGE in p.parents}


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert import_circle(_package_sources()) == []


def test_no_parts_may_import_each_other_in_a_circle() -> None:
    assert _circle({part: boundary.parts for part, boundary in BOUNDARIES.items()}) == []
    assert _circle({"text": {"exits"}, "exits": {"text"}}), "control"


def test_control_a_circle_is_found() -> None:
    sources = {
        "nemo_ee/a/__init__.py": "",
        "nemo_ee/a/one.py": "from nemo_ee.a.two import x",
        "nemo_ee/a/two.py": "if True:\n    from nemo_ee.b import three",
        "nemo_ee/b/__init__.py": "",
        "nemo_ee/b/three.py": "import nemo_ee.a.one",
    }
    circle = import_circle(sources)
    assert set(circle) == {"nemo_ee.a.one", "nemo_ee.a.two", "nemo_ee.b.three"} and circle[0] == circle[-1]
    for harmless in (
        "def f():\n    import nemo_ee.a.one",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nemo_ee.a.one",
        "from nemo_ee.a import one_more",
        "",
    ):
        assert import_circle({**sources, "nemo_ee/b/three.py": harmless}) == [], harmless


def test_no_two_files_have_one_name() -> None:
    assert repeated_names(_package_sources()) == {}


def test_control_a_name_used_twice_is_found() -> None:
    paths = ["nemo_ee/a/checks.py", "nemo_ee/b/c/checks.py", "nemo_ee/b/files/checks.py", "nemo_ee/b/check.py"]
    paths += ["nemo_ee/a/__init__.py", "nemo_ee/b/__init__.py"]
    assert repeated_names(paths) == {"checks.py": paths[:2]}


def test_files_keep_the_house_rules() -> None:
    problems = _all_problems(
        _python_files(), lambda path: source_problems(_name(path), path.read_text(encoding="utf-8"))
    )
    assert not problems, _report(problems)


def test_control_a_careless_file_is_reported() -> None:
    careless = "print(1)\n" + "\n" * MAX_LINES
    rules = ["does not start with", "has no module docstring", "is named after nothing", "has 401 lines", "1: print()"]
    problems = source_problems("nemo_ee/exits/utils.py", careless)
    assert len(problems) == len(rules) and all(
        problem.startswith(rule) for problem, rule in zip(problems, rules, strict=True)
    )
    assert source_problems("tests/test_x.py", f'{HEADER}"""Says what it is."""\nprint(1)\n') == []


def test_no_file_names_a_developer_machine() -> None:
    def check(path: Path) -> list[str]:
        try:
            return path_problems(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            return []

    problems = _all_problems(_tracked_files(), check)
    assert not problems, _report(problems)


def test_control_a_machine_path_is_reported() -> None:
    for folder in ("work", "root", "home/somebody", "Users/somebody"):
        assert path_problems(f"data=/{folder}/data") == [f"1: data=/{folder}/data"]
    assert path_problems("cd /workspace/nemo_ee\nhttps://example.com/root/x\n./home/x/y") == []


def test_every_key_of_the_configs_has_a_comment() -> None:
    paths = sorted((ROOT / "conf").rglob("*.yaml"))
    assert paths
    problems = _all_problems(paths, lambda path: yaml_problems(path.read_text(encoding="utf-8")))
    assert not problems, _report(problems)


def test_control_a_bare_key_is_reported() -> None:
    text = "# header\nmodel:\n  lr: 1e-3\n  eps: 1e-5  # Adam's\n  data: {a: 1}\n  name: a#b\n"
    assert yaml_problems(text) == ["3: lr: 1e-3", "5: data: {a: 1}", "6: name: a#b"]


# -- inside megatron/ -------------------------------------------------------------------------------------------------

MEGATRON_FOLDERS = ("loss", "model", "optim", "pipeline", "decoding")  # each imports itself and those before it


def megatron_problems(folder: str, source: str) -> list[str]:
    """Imports in `source`, a file of nemo_ee/megatron/`folder`, of a folder behind it."""
    above = tuple(f"{PACKAGE}.megatron.{name}" for name in MEGATRON_FOLDERS[MEGATRON_FOLDERS.index(folder) + 1 :])
    imports = _imports(ast.parse(source))
    return [f"{line}: megatron/{folder} may not import {name}" for line, name, _ in imports if name.startswith(above)]


def test_the_folders_of_megatron_import_only_those_before_them() -> None:
    sources = [path for path in _python_files() if ROOT / PACKAGE / "megatron" in path.parent.parents]
    assert {path.parent.name for path in sources} == set(MEGATRON_FOLDERS)
    problems = _all_problems(
        sources, lambda path: megatron_problems(path.parent.name, path.read_text(encoding="utf-8"))
    )
    assert not problems, _report(problems)


def test_control_a_megatron_folder_that_imports_a_later_one_is_reported() -> None:
    source = "from nemo_ee.megatron.model.exit_head import ExitHead"
    assert megatron_problems("loss", source) == ["1: megatron/loss may not import nemo_ee.megatron.model.exit_head"]
    assert megatron_problems("optim", source) == []
