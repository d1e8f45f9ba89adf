# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The report on a model's exits: its numbers against a plain pass over the same text, its page, its errors.

`NEMO_EE_SCREENSHOTS=<folder>` keeps pictures of the page.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from nemo_ee.evaluation.exit_report import (
    FULL,
    LIMITS,
    ExitReport,
    PolicyRow,
    calibration,
    measure_exits,
    text_windows,
    verdict,
)
from nemo_ee.evaluation.report_page import report_page
from nemo_ee.generation.decoding_model import TokenPositions
from nemo_ee.planning.threshold_search import DecodingCosts, ThresholdSearch
from nemo_ee.runtime.loader import load_model, load_tokenizer
from nemo_ee.runtime.model import RuntimeModel
from tests.helpers.browser import Browser
from tests.helpers.megatron_models import user_environment
from tests.helpers.served_model import EXITS, REFERENCE_MODEL, write_exported_model

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = REFERENCE_MODEL / "corpus" / "heldout.jsonl.gz"
WINDOW, WINDOWS = 48, 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exported_model(tmp_path_factory.mktemp("exported") / "hf_early_exit")


@pytest.fixture(scope="module")
def model(directory: Path) -> RuntimeModel:
    return load_model(directory)


@pytest.fixture(scope="module")
def windows(directory: Path) -> list[list[int]]:
    return text_windows(HELD_OUT, load_tokenizer(directory), WINDOW, WINDOWS, None)


@pytest.fixture(scope="module")
def report(model: RuntimeModel, directory: Path, windows: list[list[int]]) -> ExitReport:
    return measure_exits(model, load_tokenizer(directory), windows, 2 * WINDOW)


@pytest.fixture(scope="module")
def page(report: ExitReport) -> str:
    return report_page(report, title="<b>Exits & more</b>", facts={"text": "<script>alert(1)</script>"})


def logits_at(model: RuntimeModel, window: list[int], name: str | None) -> torch.Tensor:
    """`[n - 1, v]` of one exit, in one pass."""
    stops = {point.name: point.stop for point in model.exits} | {None: 2 * model.num_layers}
    positions = TokenPositions.of({0: range(len(window) - 1)})
    cache = model.new_cache(1, len(window), tuple(point.name for point in model.exits))
    hidden = model.run(model.embed(torch.tensor(window[:-1]), positions), positions, 0, stops[name], cache)
    return model.exit_logits(name, hidden, positions, cache)


def test_rows_of_exits_are_those_of_plain_passes(
    model: RuntimeModel, windows: list[list[int]], report: ExitReport
) -> None:
    full = torch.cat([logits_at(model, own, None) for own in windows])
    targets = torch.tensor([token for own in windows for token in own[1:]])
    assert report.full_loss == pytest.approx(float(torch.nn.functional.cross_entropy(full, targets)), rel=1e-5)
    assert [exit.name for exit in report.exits] == list(EXITS)
    for exit in report.exits:
        own = torch.cat([logits_at(model, window, exit.name) for window in windows])
        assert exit.loss == pytest.approx(float(torch.nn.functional.cross_entropy(own, targets)), rel=1e-5)
        agreement = (own.argmax(-1) == full.argmax(-1)).double().mean()
        assert exit.agreement == pytest.approx(float(agreement), abs=2 / len(targets))
        assert sum(one.tokens for one in exit.bins) == len(targets)
        mean = sum(one.tokens * one.agreement for one in exit.bins) / len(targets)
        assert mean == pytest.approx(exit.agreement)
        assert 0 < exit.cost < 1


def test_policies_keep_what_they_promise(report: ExitReport) -> None:
    never, *_, lowest = report.frontier
    assert (never.perplexity, never.agreement, never.depth, never.expected) == pytest.approx((1.0, 1.0, 1.0, 1.0))
    assert lowest.perplexity > 1.01 and lowest.depth < 1 < lowest.bound and lowest.agreement < 1
    assert len(report.policies) == len(LIMITS) and all(own.measured for own in report.policies)
    # The bound is in weights alone, so times cannot be far above it.
    assert all(own.measured < 1.5 * max(1.0, own.bound) for own in report.policies)
    assert sum(report.histogram.values()) == pytest.approx(1.0) and set(report.histogram) == {*EXITS, FULL}


def test_calibration_of_made_up_confidences() -> None:
    confidence, agrees = torch.tensor([0.05, 0.07, 0.95, 1.0, 0.5]), torch.tensor([0, 1, 1, 1, 0]).bool()
    found = [(one.tokens, one.confidence, one.agreement) for one in calibration(confidence, agrees)]
    assert found == [(2, pytest.approx(0.06), 0.5), (1, 0.5, 0.0), (2, pytest.approx(0.975), 1.0)]


def policy(perplexity: float, measured: float) -> PolicyRow:
    return PolicyRow("made up", {"a": 0.5}, perplexity, 0.97, 0.6, 1.3, 1.7, measured)


def test_the_verdict() -> None:
    for policies, worth, text in (
        ([policy(1.01, 1.05), policy(1.05, 1.3)], True, "Worth it. At +5.0% perplexity on held-out text"),
        ([policy(1.01, 1.05), policy(1.08, 1.3)], None, "Little to gain. At +1.0%"),
        ([policy(1.01, 1.0), policy(1.04, 1.02)], False, "Not worth it. At +4.0%"),
        ([policy(1.06, 1.2), policy(1.08, 1.3)], False, "Not worth it. No policy"),
    ):
        assert verdict(policies)[0] is worth and verdict(policies)[1].startswith(text)


def test_the_second_half_does_not_choose(
    model: RuntimeModel, directory: Path, windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = DecodingCosts(1.0, 1.0, 0.1, dict.fromkeys((*EXITS, None), 0.5))
    monkeypatch.setattr("nemo_ee.evaluation.exit_report.measured_costs", lambda model: costs)
    monkeypatch.setattr("nemo_ee.evaluation.exit_report.LIMITS", (1.0, 20.0))  # the exits are not tuned
    tokenizer, other = load_tokenizer(directory), [*windows[:3], *(own[::-1] for own in windows[3:])]
    left, right = (measure_exits(model, tokenizer, own, WINDOW) for own in (windows, other))
    assert [own.thresholds for own in left.policies] == [own.thresholds for own in right.policies]
    assert left.policies[-1].thresholds and left.policies[-1].perplexity != right.policies[-1].perplexity


def test_names_of_exits_are_checked_and_escaped(directory: Path, report: ExitReport, tmp_path: Path) -> None:
    hostile = "</span><script>alert(1)</script>"
    exits = tuple(dataclasses.replace(exit, name=hostile) for exit in report.exits[:1]) + report.exits[1:]
    sample = tuple(dataclasses.replace(token, exit=hostile) for token in report.sample)
    assert "<script>" not in report_page(dataclasses.replace(report, exits=exits, sample=sample), title="x", facts={})
    config = json.loads((directory / "config.json").read_text())
    config["early_exit"]["exits"][0]["name"] = hostile
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is no name of an exit"):
        load_model(tmp_path)


class Checker(HTMLParser):
    """Open tags, and everything that could load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.foreign: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        self.foreign += [tag] if tag in ("script", "link", "img", "iframe", "b") else []
        self.foreign += [
            f"{key}={value}"
            for key, value in attrs
            if key in ("src", "href", "xlink:href", "onload") and not (value or "").startswith("#")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(page: str, report: ExitReport) -> None:
    checker = Checker()
    checker.feed(page)
    assert checker.open == [] and checker.foreign == []
    ids = re.findall(r'\bid="([^"]+)"', page)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', page))
    assert used <= set(ids), "every reference has its target"
    assert "&lt;b&gt;Exits &amp; more&lt;/b&gt;" in page and "&lt;script&gt;alert(1)" in page
    for exit in report.exits:
        assert f"<td>{exit.name}</td>" in page and f"{exit.loss:.3f}" in page
    text = "".join(token.text for token in report.sample)
    shown = page[page.index('<div class="text">') :]
    assert re.sub(r"<[^>]+>", "", shown[: shown.index("</div>")]).startswith(
        text[:40].replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;").replace("'", "&#x27;")
    )


@pytest.mark.browser
def test_the_page_in_a_browser(report: ExitReport, tmp_path: Path) -> None:
    many = [dataclasses.replace(report.exits[0], name=f"exit-number-{index}") for index in range(20)]
    report = dataclasses.replace(report, exits=(*report.exits, *many))
    file = tmp_path / "report.html"
    file.write_text(report_page(report, title="Exits", facts={}), encoding="utf-8")
    pictures, browser = Path(os.environ.get("NEMO_EE_SCREENSHOTS", tmp_path)), Browser(tmp_path / "profile")
    try:
        for name, width, height in (("wide", 1280, 2400), ("phone", 390, 2400)):
            browser.size(width, height, mobile=name == "phone")
            browser.call("Page.navigate", url=file.as_uri())
            browser.until("document.readyState === 'complete'")
            assert browser.run("document.documentElement.scrollWidth <= innerWidth"), f"{name} scrolls sideways"
            assert browser.run("document.querySelectorAll('svg').length") == 4
            browser.picture(pictures / f"report-{name}.png")
        assert browser.call("Page.printToPDF")["data"]
        assert browser.problems() == []
    finally:
        browser.close()


def run(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "megatron_gpt_early_exit_report.py"), *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=user_environment())


def test_the_command_on_a_nemo_file(tmp_path: Path) -> None:
    output, earlier = tmp_path / "out" / "report.html", ROOT / "tests" / "data" / "earlier" / "complete.nemo"
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"def f{i}(x): return x + {i}\n" * 20}) + "\n" for i in range(6)))
    small = ["window_tokens=16", "max_windows=4", "measured_tokens=16", f"hydra.run.dir={tmp_path}"]
    done = run(f"checkpoint={earlier}", f"data={text}", f"output={output}", "title=A title", *small)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "orth it" in done.stdout or "Little to gain" in done.stdout
    assert "<h1>A title</h1>" in output.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window_tokens": 4}, "window_tokens=4 must be a whole number of at least 8"),
        ({"data": "nowhere.jsonl"}, "data='nowhere.jsonl' does not exist"),
        ({"checkpoint": "nowhere.nemo"}, "checkpoint='nowhere.nemo' does not exist"),
        ({"window_tokens": 5000}, "more than the model's"),
        ({"max_windows": 1}, "max_windows=1 must be a whole number of at least 2"),
        ({"checkpoint": str(REFERENCE_MODEL)}, "has no exits to report on"),
        ({"output": str(ROOT)}, "is a directory"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_wrong_input_is_one_error(changed: dict, message: str, directory: Path, tmp_path: Path) -> None:
    values = {"checkpoint": directory, "data": HELD_OUT, "output": tmp_path / "report.html", **changed}
    done = run(*(f"{key}={value}" for key, value in values.items()), f"hydra.run.dir={tmp_path / 'log'}")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "report.html").exists()


def test_too_little_text_is_refused(directory: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("x = 1\n" * 20)
    with pytest.raises(ValueError, match="windows of 48 tokens, and at least two are needed"):
        text_windows(short, load_tokenizer(directory), WINDOW, WINDOWS, None)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match='field "text"'):
        text_windows(broken, load_tokenizer(directory), WINDOW, WINDOWS, None)


def test_a_policy_that_is_full_depth_has_speed_one(
    model: RuntimeModel, directory: Path, windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timing it would show noise, of which the verdict could make a gain."""
    monkeypatch.setattr(ThresholdSearch, "fastest", lambda self, limit: self.at({}))
    found = measure_exits(model, load_tokenizer(directory), windows, WINDOW)
    assert [(one.thresholds, one.measured) for one in found.policies] == [({}, 1.0)] * len(LIMITS)
    assert found.verdict[0] is False


def test_windows_come_from_as_many_documents_as_possible(directory: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(directory)
    texts = [f"value_{index} = {index}\n" * 60 for index in range(3)]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = text_windows(file, tokenizer, 32, 4, None)
    starts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert found == [starts[0][:32], starts[0][32:64], starts[1][:32], starts[1][32:64]]
    assert text_windows(file, tokenizer, 32, 3, None) == [own[:32] for own in starts]
    assert len(text_windows(file, tokenizer, 32, 1000, None)) == sum(len(own) // 32 for own in starts)


def test_a_chat_template_writes_conversations(directory: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(directory)
    chats = [[{"role": "user", "content": f"value_{index}\n" * 20}] for index in range(2)]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    with pytest.raises(ValueError, match='"messages" need a tokenizer with a chat template'):
        text_windows(file, tokenizer, 32, 4, None)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    texts = [f"<user>{chat[0]['content']}" for chat in chats]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"][:32] for text in texts]
    assert text_windows(file, tokenizer, 32, 2, None) == expected
    tokenizer.chat_template = "{{ raise_exception('no user') }}"
    with pytest.raises(ValueError, match="the chat template fails on these messages: no user"):
        text_windows(file, tokenizer, 32, 2, None)
