# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The form of the documentation: line length, links and paths, the command at the top of a page. Every command
has only options that exist.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
ALL = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
MAX_LINE = 120


def long_lines(markdown: str) -> list[int]:
    """Numbers of lines that are too long and no row of a table."""
    lines = enumerate(markdown.splitlines(), 1)
    return [number for number, line in lines if len(line) > MAX_LINE and not line.startswith("|")]


def anchors(markdown: str) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, markdown: str) -> list[str]:
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", markdown):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        text = target.read_text(encoding="utf-8") if target.suffix == ".md" and target.is_file() else ""
        if not target.exists() or anchor and anchor not in anchors(text):
            found.append(link)
    return found


def broken_paths(markdown: str) -> list[str]:
    """Files and folders of this repository that a page names and that do not exist."""
    folders = "nemo_ee|docs|conf|scripts|examples|tests|benchmarks|docker|constraints|assets"
    named = re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w", markdown)
    return sorted({path for path in named if not (ROOT / path).exists()})


@pytest.mark.parametrize("path", ALL)
def test_a_page_wraps_and_names_what_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert long_lines(text) == []
    assert broken_links(path, text) == []
    assert broken_paths(text) == []


@pytest.mark.parametrize("path", PAGES)
def test_a_page_starts_with_its_purpose_and_a_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.match(r"# .+\n\nThis page ", text), "the first sentence says what the page is for"
    first = text.split("\n## ")[0]
    assert re.search(r"^```bash\n\S", first, re.MULTILINE) or "`make " in first, "no command before the first section"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 90


def test_control_a_careless_page_is_reported() -> None:
    text = f"# A\n\n{'x ' * 70}\n| {'y' * 130} |\n[a](none.md) [b](#b) [c](#a) nemo_ee/none.py tests/test_docs.py\n"
    assert long_lines(text) == [3]
    page = ROOT / "docs" / "README.md"
    assert (
        broken_links(page, text) == ["none.md", "#b", "#a"]
        and broken_links(page, "[a](README.md#documentation)") == []
    )
    assert broken_paths(text) == ["nemo_ee/none.py"]


def commands(markdown: str) -> Iterator[list[str]]:
    """The words of every command in a shell block that runs a Python file of this repository, from that file on."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", markdown, re.MULTILINE | re.DOTALL):
        text = ""
        for line in block.replace("\\\n", "").splitlines():
            text = f"{text}\n{line}" if text else line
            try:
                words = shlex.split(text, comments=True)
            except ValueError:  # a quotation goes on in the next line
                continue
            text = ""
            start = next((i for i, word in enumerate(words) if word.endswith(".py") and (ROOT / word).is_file()), None)
            if start is not None:
                yield words[start:]


def command_problem(words: list[str]) -> str | None:
    """Why a command cannot run: an option that its script or its yaml does not have."""
    script, *options = words
    stem = Path(script).stem
    if "--config-name" in options:
        at = options.index("--config-name")
        stem = options[at + 1]
        options = options[:at] + options[at + 2 :]
    if (ROOT / "conf" / f"{stem}.yaml").is_file():
        overrides = [option for option in options if option != "..." and not option.endswith("=...")]
        try:
            with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                compose(stem, overrides=[re.sub(r"<[^>]*>", "x", one) for one in overrides])
        except (HydraException, OmegaConfBaseException) as error:
            return f"{script}: {error}"
        return None
    source = (ROOT / script).read_text(encoding="utf-8")
    unknown = [option for option in options if option.startswith("--") and f'"{option}"' not in source]
    return f"{script} has no {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("path", ALL)
def test_commands_have_options_that_exist(path: Path) -> None:
    found = [command_problem(words) for words in commands(path.read_text(encoding="utf-8"))]
    assert [problem for problem in found if problem] == []


def test_the_pages_have_commands() -> None:
    assert sum(len(list(commands(path.read_text(encoding="utf-8")))) for path in ALL) >= 40


def test_control_a_command_with_an_unknown_option_is_reported() -> None:
    text = """```bash
torchrun --nproc-per-node 2 examples/megatron_gpt_early_exit_generate.py trainer.devices=2 \\
    treshold=0.5
python benchmarks/decoding.py --jsn x
python benchmarks/decoding.py --json x      # fine
python examples/megatron_gpt_early_exit_tune.py --config-name megatron_gpt_early_exit_sweep layer=6
```"""
    problems = [command_problem(words) for words in commands(text)]
    assert "treshold" in problems[0] and "--jsn" in problems[1] and problems[2:] == [None, None]
