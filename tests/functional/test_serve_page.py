# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The pages in a real, headless Chromium, driven over its debugging pipe: what a person sees after pressing Run.

The text on the page is compared with the server's own answer; a page of hostile text shows that none of it is markup.
`NEMO_EE_SCREENSHOTS=<folder>` keeps pictures of wide, dark and narrow windows, `NEMO_EE_SERVED_MODEL=<directory>`
serves a tuned model instead of the untuned one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai

from nemo_ee.serving.serve import make_server
from nemo_ee.serving.settings import ServerSettings
from tests.helpers.browser import Browser
from tests.helpers.served_model import running, serve_config, write_exported_model

pytestmark = pytest.mark.browser


TUNED_MODEL = os.environ.get("NEMO_EE_SERVED_MODEL")  # makes better pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if TUNED_MODEL:
        return Path(TUNED_MODEL)
    return write_exported_model(tmp_path_factory.mktemp("served") / "hf_early_exit")


@pytest.fixture(scope="module")
def server(model: Path):
    threshold = 0.6 if TUNED_MODEL else 0.1
    return make_server(ServerSettings.from_config(serve_config(model, name="reference-model", threshold=threshold)))


@pytest.fixture(scope="module")
def url(server):
    with running(server) as address:
        yield address


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    own = Browser(tmp_path / "profile")
    yield own
    own.close()


IDLE = "document.getElementById('run')?.disabled === false"
TOKENS = "[...document.querySelectorAll('#own-text .token')]"


def test_a_prompt_typed_and_run(url: str, browser: Browser, tmp_path: Path) -> None:
    pictures = Path(os.environ.get("NEMO_EE_SCREENSHOTS", tmp_path))
    browser.size(1280, 800)
    browser.call("Page.navigate", url=url)
    browser.until(IDLE)
    browser.run("document.getElementById('prompt').focus()")
    browser.run("document.getElementById('prompt').value = ''")
    prompt = "class TestStack(unittest.TestCase):\n    def test_push(self):"
    browser.call("Input.insertText", text=prompt)
    browser.run("document.getElementById('tokens').value = 120")
    browser.run("document.getElementById('run').click()")
    browser.until(f"{TOKENS}.length > 3")
    assert not browser.run(IDLE), "tokens show while others are still to come"
    browser.until(IDLE)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        kind = {"model": "reference-model", "prompt": prompt, "max_tokens": 120, "temperature": 0}
        answer = client.completions.create(**kind)
        full = client.completions.create(**kind, extra_body={"early_exit": {"mode": "full"}})
    assert browser.run(f"{TOKENS}.map(t => t.textContent).join('')") == answer.choices[0].text
    shown = "[...document.querySelectorAll('#full-text .token')].map(t => t.textContent).join('')"
    assert browser.run(shown) == full.choices[0].text
    told = answer.choices[0].early_exit["tokens"]
    colours = browser.run(f"{TOKENS}.map(t => getComputedStyle(t).backgroundColor)")
    by_exit = {one["exit"]: colour for one, colour in zip(told, colours, strict=True)}
    assert len(by_exit) > 1 and len(set(by_exit.values())) == len(by_exit), "each exit has a colour of its own"
    assert [by_exit[one["exit"]] for one in told] == colours
    assert "tokens/s" in browser.run("document.getElementById('own-speed').textContent")
    assert "×" in browser.run("document.getElementById('own-told').textContent")
    # By keyboard: the second token, and what it says.
    browser.run("document.getElementById('own-text').focus()")
    browser.key("ArrowRight")
    browser.key("ArrowRight")
    tip = browser.run("document.getElementById('tip').innerText")
    assert json.dumps(told[1]["text"]) in tip and f"confidence {told[1]['confidence']:.3f}" in tip
    browser.key("Escape")
    assert browser.run("document.getElementById('tip').hidden")
    early = next(i for i, one in enumerate(told) if one["exit"] != "final" and one["text"].strip() and i > 9)
    browser.run("document.activeElement.blur()")
    browser.run("document.getElementById('own-text').scrollTop = 0")
    browser.run(f"{TOKENS}[{early}].dispatchEvent(new MouseEvent('mouseover', {{bubbles: true}}))")
    assert f"{told[early]['exit']}, {told[early]['layer']} of" in browser.run(
        "document.getElementById('tip').innerText"
    )
    browser.picture(pictures / "server.png")
    for name, *size in (("dark", 1280, 800, "dark"), ("phone", 390, 844, "light", True)):
        browser.size(*size)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), f"{name} scrolls sideways"
        browser.picture(pictures / f"server-{name}.png")
    assert browser.problems() == []


def test_modes_errors_and_stop(url: str, server, browser: Browser) -> None:
    browser.call("Page.navigate", url=url)
    browser.until(IDLE)
    assert browser.run("earlyExit()") == {"mode": "early_exit"}, "the server's own setting, until the slider is moved"
    slider = "const slider = document.getElementById('threshold'); slider.value = 0.25;"
    browser.run(f"(() => {{ {slider} slider.dispatchEvent(new Event('input', {{bubbles: true}})); }})()")
    assert browser.run("earlyExit()") == {"mode": "early_exit", "threshold": 0.25, "criterion": "max_probability"}
    browser.run("document.querySelector('[value=static_depth]').click()")
    assert browser.run("getComputedStyle(document.getElementById('threshold-row')).display") == "none"
    browser.run("document.getElementById('compare').click()")
    browser.run("document.getElementById('tokens').value = 5")
    browser.run("document.getElementById('run').click()")
    browser.until(f"{TOKENS}.length == 5 && {IDLE}")
    assert set(browser.run(f"{TOKENS}.map(t => t.record.exit)")) == {"layer9-mlp"}
    browser.run("document.getElementById('prompt').value = ''")
    browser.run("document.getElementById('run').click()")
    browser.until("document.getElementById('error').textContent.includes('none of them empty')")
    browser.run("document.getElementById('prompt').value = 'x = '")
    browser.run("document.getElementById('tokens').value = 900")
    browser.run("document.getElementById('run').click()")
    browser.until(f"{TOKENS}.length > 3")
    browser.run("document.getElementById('stop').click()")
    browser.until(IDLE)
    assert browser.run(f"{TOKENS}.length") < 900
    value = server.metrics.registry.get_sample_value
    end = time.monotonic() + 20
    while value("nemo_ee_running_sequences"):
        assert time.monotonic() < end, "stopped on the page, but it still runs"
        time.sleep(0.02)


def test_a_key_is_asked_for(model: Path, browser: Browser, monkeypatch) -> None:
    key = "a-key-of-sixteen-characters"
    monkeypatch.setenv("NEMO_EE_API_KEYS", key)
    guarded = make_server(ServerSettings.from_config(serve_config(model)))
    with running(guarded) as url:
        browser.call("Page.navigate", url=url)
        browser.until("document.getElementById('card')?.textContent.includes('needs an API key')")
        browser.run("document.getElementById('key').focus()")
        browser.call("Input.insertText", text=key)
        browser.run("document.getElementById('key').blur()")
        browser.until(IDLE)
        browser.run("document.getElementById('tokens').value = 2")
        browser.run("document.getElementById('run').click()")
        browser.until(f"{TOKENS}.length == 2 && {IDLE}")


def test_text_of_a_model_is_never_markup(url: str, server, browser: Browser, monkeypatch) -> None:
    """The tokenizer is made to decode everything as markup; the policy would refuse a script that got in, too."""
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    monkeypatch.setattr(server.model, "decode", lambda ids, **_: hostile * len(ids))
    browser.call("Page.navigate", url=url)
    browser.until(IDLE)
    browser.run("document.getElementById('tokens').value = 3")
    browser.run("document.getElementById('run').click()")
    browser.until(f"{TOKENS}.length == 3 && {IDLE}")
    assert browser.run(f"{TOKENS}[1].textContent") == hostile
    assert browser.run("document.querySelectorAll('#own-text img, #own-text script').length") == 0
    assert browser.run("document.title") != "owned"
    # Control: the policy of the page refuses a script that would get in.
    browser.run(
        "(() => { const s = document.createElement('script'); s.textContent = \"document.title='owned'\";"
        " document.body.append(s); })()"
    )
    assert browser.run("document.title") != "owned"


def test_the_api_page_shows_the_document(url: str, browser: Browser, tmp_path: Path) -> None:
    pictures = Path(os.environ.get("NEMO_EE_SCREENSHOTS", tmp_path))
    browser.size(1100, 1000)
    browser.call("Page.navigate", url=f"{url}/docs")
    browser.until("document.querySelectorAll('section').length > 10")
    text = browser.run("document.body.innerText")
    for words in ("POST/v1/chat/completions", "openapi.json", "max_completion_tokens", "number, 0 to 2 | null",
                  "list of (text, 1 to 256 characters), at most 16 entries",
                  "a token leaves if its confidence is greater",
                  f"curl {url}/v1/completions", "more fields, accepted for clients of other servers"):  # fmt: skip
        assert words in text, words
    links = browser.run("[...document.querySelectorAll('main a')].map(a => decodeURIComponent(a.hash.slice(1)))")
    assert "EarlyExit" in links
    for name in set(links):
        assert browser.run(f"document.getElementById('{name}') !== null"), name
    browser.picture(pictures / "api.png")
    for name, *size in (("dark", 1100, 1000, "dark"), ("phone", 390, 844, "light", True)):
        browser.size(*size)
        browser.run("document.getElementById('CompletionRequest').scrollIntoView()")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), f"{name} scrolls sideways"
        browser.picture(pictures / f"api-{name}.png")
    assert browser.problems() == []


def test_the_api_page_asks_for_a_key_and_shows_text_as_text(model: Path, browser: Browser, monkeypatch) -> None:
    from nemo_ee.serving import http_server

    key, hostile = "a-key-of-sixteen-characters", "<img src=x onerror=\"document.title='owned'\">"
    real = http_server.openapi_document

    def document(*args: Any, **kwargs: Any) -> dict[str, Any]:
        own = real(*args, **kwargs)
        own["info"] |= {"title": hostile, "description": hostile}
        own["paths"]["/health"]["get"]["description"] = hostile
        own["components"]["schemas"][hostile] = {"properties": {hostile: {"description": hostile, "enum": [hostile]}}}
        return own

    monkeypatch.setattr(http_server, "openapi_document", document)
    monkeypatch.setenv("NEMO_EE_API_KEYS", key)
    with running(make_server(ServerSettings.from_config(serve_config(model)))) as url:
        browser.call("Page.navigate", url=f"{url}/docs")
        browser.until("document.getElementById('error')?.textContent.includes('no or wrong API key')")
        browser.run("document.getElementById('key').focus()")
        browser.call("Input.insertText", text=key)
        browser.run("document.getElementById('key').blur()")
        browser.until("document.querySelectorAll('section').length > 10")
        assert browser.run("document.body.innerText").count(hostile) >= 6
        assert browser.run("document.querySelectorAll('img, main script').length") == 0
        assert browser.run("document.title") != "owned" and browser.run("document.getElementById('key-row').hidden")
