# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""What clients of OpenAI's and vLLM's servers send, over a real socket: log-probabilities of prompts against
transformers' forward, lm-eval's `local-completions` against its `hf` model, sampling fields against the engine.

fp32, CPU; tokens and texts exactly, ln p within 1e-4.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai
import torch

from nemo_ee.generation.engine import EarlyExitEngine
from nemo_ee.generation.policy import ExitPolicy
from nemo_ee.generation.sampling import SamplingParams
from nemo_ee.runtime.loader import load_tokenizer
from nemo_ee.serving.serve import make_server
from nemo_ee.serving.settings import ServerSettings
from tests.helpers.lm_eval_hf import hugging_face_lm
from tests.helpers.served_model import CHAT_TEMPLATE, post, records, running, serve_config, write_exported_model

PROMPT = "def test_add(self):\n    a = 1\n"
THRESHOLD = 0.1


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exported_model(tmp_path_factory.mktemp("served") / "hf_early_exit")


@pytest.fixture(scope="module")
def server(model_path: Path):
    template = model_path.parent / "chat.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    config = serve_config(model_path, threshold=THRESHOLD, num_slots=3, max_choices=8, chat_template=str(template))
    return make_server(ServerSettings.from_config(config))


@pytest.fixture(scope="module")
def url(server):
    with running(server) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as own:
        yield own


@pytest.fixture(scope="module")
def reference(model_path: Path):
    """transformers' model of the same weights; it leaves the exits alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(model_path, torch_dtype="float32")
    return LlamaForCausalLM.from_pretrained(model_path, config=config, torch_dtype=torch.float32).eval()


def complete(client, prompt=PROMPT, **changes):
    """A completion; fields that OpenAI's client does not know go beside it."""
    known = ("stream", "echo", "logprobs", "seed", "logit_bias", "presence_penalty", "frequency_penalty", "n", "stop")
    kind = {key: changes.pop(key) for key in known if key in changes}
    kind |= {"max_tokens": changes.pop("max_tokens", 12), "temperature": changes.pop("temperature", 0)}
    return client.completions.create(model="demo", prompt=prompt, extra_body=changes, **kind)


def prompt_logprobs(reference, ids: list[int]) -> torch.Tensor:
    """`[s - 1, v]`: ln p after each token but the last."""
    with torch.inference_mode():
        return reference(torch.tensor([ids])).logits[0, :-1].log_softmax(dim=1)


@pytest.mark.parametrize("given", [{}, {"mode": "self_speculative", "threshold": 0.05}], ids=["early_exit", "spec"])
@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_an_echoed_prompt_has_transformers_log_probabilities(max_tokens, given, client, server, reference) -> None:
    ids = server.model.tokenizer(PROMPT)["input_ids"]
    answer = complete(client, echo=True, logprobs=3, max_tokens=max_tokens, early_exit=given)
    (choice,) = answer.choices
    probs, count = choice.logprobs, len(ids)
    assert len(probs.tokens) == count + max_tokens == len(probs.token_logprobs) == len(probs.top_logprobs)
    assert "".join(probs.tokens) == choice.text and choice.text.startswith(PROMPT)
    assert probs.text_offset == [len("".join(probs.tokens[:i])) for i in range(count + max_tokens)]
    expected = prompt_logprobs(reference, ids)
    assert probs.token_logprobs[0] is None and probs.top_logprobs[0] is None
    own = expected[torch.arange(count - 1), torch.tensor(ids[1:])].tolist()
    assert probs.token_logprobs[1:count] == pytest.approx(own, abs=1e-4)
    for top, values in zip(probs.top_logprobs[1:count], expected.topk(3, dim=1).values.tolist(), strict=True):
        assert sorted(top.values(), reverse=True) == pytest.approx(values, abs=1e-4)
    assert answer.usage.completion_tokens == max_tokens and choice.finish_reason == "length"
    plain = complete(client, max_tokens=max(max_tokens, 1), early_exit=given, logprobs=3)
    assert records(choice) == records(plain.choices[0])[:max_tokens], "the answer is what it is without echo"
    if max_tokens == 6:
        stream = list(complete(client, echo=True, logprobs=3, max_tokens=6, early_exit=given, stream=True))
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            whole = [one for chunk in stream for one in getattr(chunk.choices[0].logprobs, key)]
            assert whole == getattr(probs, key)
        assert "".join(chunk.choices[0].text for chunk in stream) == choice.text


def test_prompts_of_a_batch_are_echoed_each_and_without_logprobs_too(client, server) -> None:
    ids = server.model.tokenizer("import os\n")["input_ids"]
    answer = complete(client, [ids, [7]], echo=True, max_tokens=2, n=2)
    texts = [choice.text for choice in answer.choices]
    assert [text.startswith("import os\n") for text in texts] == [True, True, False, False]
    assert answer.choices[0].logprobs is None and answer.usage.prompt_tokens == len(ids) + 1
    only = complete(client, "import <|endoftext|>os", echo=True, max_tokens=0)
    assert only.choices[0].text == "import <|endoftext|>os" and only.usage.completion_tokens == 0
    with_static = {"mode": "static_depth", "exits": ["layer6-mlp"]}
    scored = complete(client, echo=True, max_tokens=0, logprobs=0, early_exit=with_static)
    full = complete(client, echo=True, max_tokens=0, logprobs=0)
    assert scored.choices[0].logprobs.token_logprobs[1:] != full.choices[0].logprobs.token_logprobs[1:]
    long = complete(client, [5] * 1024, echo=True, max_tokens=0, logprobs=0)
    assert len(long.choices[0].logprobs.tokens) == 1024, "a prompt may fill the model"


SHAPES = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 1.2},
    {"logit_bias": {"11": 8.0, "199": -100}},
    {"min_p": 0.3, "temperature": 1.3, "seed": 4},
    {"frequency_penalty": 0.9, "min_p": 0.05, "logit_bias": {"11": 2.0}, "temperature": 0.9, "seed": 8},
]


@pytest.mark.parametrize("mode", ["full", "early_exit", "self_speculative"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(shape))
def test_sampling_fields_are_the_engine_s(shape: dict[str, Any], mode: str, client, server) -> None:
    """And greedy `self_speculative` gives the text of `full`, by penalties and bias too."""
    given = {"mode": mode} if mode == "full" else {"mode": mode, "threshold": 0.05}
    told = [one["id"] for one in records(complete(client, early_exit=given, max_tokens=16, **shape).choices[0])]
    params = {**shape, "logit_bias": tuple((int(token), bias) for token, bias in shape.get("logit_bias", {}).items())}
    params |= {} if "temperature" in shape else {"greedy": True}
    sampling = SamplingParams(**{"greedy": False, **params})
    ids = server.model.tokenizer(PROMPT)["input_ids"]
    engine = EarlyExitEngine(server.model.model)

    def directly(own_mode: str, own: SamplingParams) -> list[int]:
        kind = {"max_new_tokens": 16, "policy": ExitPolicy(0.05), "stop_tokens": server.model.stop_tokens}
        return list(engine.generate([ids], mode=own_mode, sampling=own, **kind).tokens[0])

    assert told == directly(mode, sampling)
    if sampling.greedy:
        if mode == "self_speculative":
            assert told == directly("full", sampling)
        assert told != directly(mode, SamplingParams()), "or this test shows little"


def test_where_an_answer_ends(client, server) -> None:
    """The end-of-text token is made the most likely one: it ends an answer at once, or with `ignore_eos` never."""
    end = next(iter(server.model.stop_tokens))
    sure = {"logit_bias": {str(end): 100}}
    kept = complete(client, **sure)
    assert kept.choices[0].finish_reason == "stop" and kept.usage.completion_tokens == 1 and kept.choices[0].text == ""
    ignored = complete(client, **sure, ignore_eos=True)
    assert ignored.choices[0].finish_reason == "length" and ignored.usage.completion_tokens == 12
    assert ignored.choices[0].text == "", "a special token has no text"
    shown = complete(client, **sure, ignore_eos=True, skip_special_tokens=False)
    assert shown.choices[0].text == "<|endoftext|>" * 12
    later = complete(client, **sure, min_tokens=5)
    assert later.usage.completion_tokens == 6 and later.choices[0].finish_reason == "stop"
    whole = records(complete(client, early_exit={"mode": "full"}).choices[0])
    third = whole[2]["id"]
    first = [one["id"] for one in whole].index(third)
    cut = complete(client, stop_token_ids=[third], early_exit={"mode": "full"})
    assert cut.usage.completion_tokens == first + 1 and cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == "".join(one["text"] for one in whole[:first])


def test_a_neighbour_s_fields_are_its_own(client) -> None:
    """Sequences with penalties, bias, scored prompts and none of these, decoded together and alone."""
    from concurrent.futures import ThreadPoolExecutor

    scored = {"echo": True, "logprobs": 1}
    asked = [{}, scored, {"logit_bias": {"11": 5.0}}, {"presence_penalty": 2.0}, {**scored, "max_tokens": 0},
             {"min_p": 0.5, "temperature": 1.5, "seed": 2}]  # fmt: skip
    alone = [records(complete(client, **one).choices[0]) for one in asked]
    with ThreadPoolExecutor(len(asked)) as threads:
        together = list(threads.map(lambda one: records(complete(client, **one).choices[0]), asked))
    assert [[(one["id"], one["exit"]) for one in own] for own in together] == [
        [(one["id"], one["exit"]) for one in own] for own in alone
    ]


def test_what_changes_nothing_changes_nothing(url: str) -> None:
    plain = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "temperature": 0}
    named = {**plain, "messages": [{"role": "user", "content": "x", "name": "Ann"}]}
    same = {"stream_options": {"include_usage": True}, "top_k": -1, "min_p": 0.0, "ignore_eos": False,
            "skip_special_tokens": True, "prediction": None}  # fmt: skip
    answers = [post(url, body, "/v1/chat/completions") for body in (plain, {**named, **same})]
    assert [status for status, _ in answers] == [200, 200]
    assert answers[0][1]["choices"] == answers[1][1]["choices"]


def test_an_assistant_s_words_are_continued(client) -> None:
    messages = [{"role": "user", "content": "write"}, {"role": "assistant", "content": "import"}]
    kind = {"model": "demo", "temperature": 0, "max_tokens": 8}
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    chat = client.chat.completions.create(messages=messages, extra_body=extra, **kind)
    plain = client.completions.create(prompt="# user: write\n# assistant: import", **kind)
    assert chat.choices[0].message.content == plain.choices[0].text
    other = client.chat.completions.create(messages=messages, **kind)
    assert other.usage.prompt_tokens > chat.usage.prompt_tokens
    tool = [*messages, {"role": "tool", "tool_call_id": "a", "content": "20 C"}]
    told = client.chat.completions.create(messages=tool, **kind).choices[0].message.content
    prompt = "# user: write\n# assistant: import\n# tool: 20 C\n# assistant:"
    assert told == client.completions.create(prompt=prompt, **kind).choices[0].text


def test_special_tokens_that_are_typed_become_real_ones(client) -> None:
    """As docs/server.md says; token ids are the way around it."""
    typed = complete(client, "x<|endoftext|>", max_tokens=1).usage.prompt_tokens
    assert typed == complete(client, "x", max_tokens=1).usage.prompt_tokens + 1


def ask_raw(url: str, text: str) -> str:
    """The status line of the answer to a request written by hand."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as own:
        own.sendall(text.encode())
        return own.makefile("rb").readline().decode().strip()


def test_health_checks_of_load_balancers(url: str) -> None:
    for method in ("GET", "HEAD"):
        assert " 200 " in ask_raw(url, f"{method} /health HTTP/1.0\r\n\r\n")
    assert " 400 " in ask_raw(url, "GET /health HTTP/1.1\r\n\r\n")
    assert " 400 " in ask_raw(url, "GET /v1/models HTTP/1.0\r\n\r\n")
    for host in ("[::1]evil.com", "localhost:80@evil.com", "127.0.0.1:evil.com"):
        assert " 400 " in ask_raw(url, f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n")
    assert " 200 " in ask_raw(url, "GET /health HTTP/1.1\r\nHost: [::1]:80\r\n\r\n")


TEXTS = [
    "import",
    " os\n",
    "def add(a, b):\n    return",
    " a + b\n",
    "class Point:\n    def __init__(self, x, y):\n" * 3,
    "",
]


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """lm-eval; it wants tenacity to try again what failed, which is not needed here."""
    api = pytest.importorskip("lm_eval.models.api_models")
    pytest.importorskip("requests")
    pytest.importorskip("aiohttp")
    if importlib.util.find_spec("tenacity") is None:
        import tqdm

        once = ModuleType("tenacity")
        once.__spec__ = importlib.machinery.ModuleSpec("tenacity", None)
        monkeypatch.setitem(sys.modules, "tenacity", once)
        for name, value in {
            "retry": lambda **_: lambda call: call, "stop_after_attempt": lambda *_, **__: None,
            "wait_exponential": lambda *_, **__: None, "RetryError": KeyError, "tqdm": tqdm.tqdm,
        }.items():  # fmt: skip
            monkeypatch.setattr(api, name, value, raising=False)
    return pytest.importorskip("lm_eval")


def test_lm_eval_s_local_completions_give_what_its_hf_model_gives(lm_eval, url, model_path, reference, server) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    theirs = hugging_face_lm(reference, load_tokenizer(model_path), batch_size=2)
    ours = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="demo", tokenizer=str(model_path), max_length=1024, batch_size=3
    )

    def ask(lm, kind: str, args: list[tuple]) -> list:
        requests = [Instance(kind, {}, own, index) for index, own in enumerate(args)]
        return getattr(lm, kind)(requests, disable_tqdm=True)

    pairs = [(context, text) for context in TEXTS for text in (" os\n", " a + b\n", " a")]
    both = [ask(lm, "loglikelihood", pairs) for lm in (ours, theirs)]
    assert [one for one, _ in both[0]] == pytest.approx([one for one, _ in both[1]], abs=1e-4)
    # After the end-of-text token alone this model gives every token the same probability: all are the most likely one.
    greedy = [[one for (context, _), (_, one) in zip(pairs, own, strict=True) if context] for own in both]
    assert greedy[0] == greedy[1] and set(greedy[0]) == {True, False}
    long = [(text * 8,) for text in TEXTS[:5]]  # one window; longer texts are cut elsewhere, for room to generate
    rolling = [ask(lm, "loglikelihood_rolling", long) for lm in (ours, theirs)]
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-5, abs=1e-4)
    settings = {"until": ["\n\n", "return"], "max_gen_toks": 12, "do_sample": False}
    full = {**settings, "early_exit": {"mode": "full"}}  # the server's own mode is another
    texts = [ask(ours, "generate_until", [(text, full) for text in TEXTS[:5]])]
    texts.append(ask(theirs, "generate_until", [(text, settings) for text in TEXTS[:5]]))
    assert texts[0] == texts[1] and len(set(texts[0])) > 2
