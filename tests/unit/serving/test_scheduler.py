# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The scheduler over a scripted session: what fails is told, what waits is not lost, what is free is counted once."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("prometheus_client")

from nemo_ee.generation.decoding_model import ExitPoint
from nemo_ee.generation.stats import TokenEvent
from nemo_ee.serving import scheduler as module
from nemo_ee.serving.metrics import Metrics
from nemo_ee.serving.scheduler import QueueFull, Scheduler, Update, Work
from nemo_ee.serving.text_stream import TextStream


class Session:
    """Each sequence gets its prompt's tokens, one a step. A prompt of `b"!.."` makes `add` raise, `b"?.."` a step."""

    problems = {ord("!"): RuntimeError, ord("v"): ValueError}

    def __init__(self, num_slots: int = 2) -> None:
        self.num_slots, self.own, self.added = num_slots, {}, 0
        self.may_step, self.may_add, self.asks = threading.Event(), threading.Event(), threading.Event()
        self.may_step.set()
        self.may_add.set()

    @property
    def num_free_slots(self) -> int:
        return self.num_slots - len(self.own)

    def add(self, request) -> int:
        self.asks.set()
        self.may_add.wait(20)
        if request.prompt[0] in self.problems:
            raise self.problems[request.prompt[0]]("/a/path of the machine")
        self.own[self.added] = list(request.prompt)
        self.added += 1
        return self.added - 1

    def cancel(self, index: int) -> None:
        self.own.pop(index, None)

    num_answers, prompt_tokens_left, limits = 0, 0, ()

    def step(self, max_prompt_tokens: int | None = None) -> tuple[TokenEvent, ...]:
        self.limits = (*self.limits, max_prompt_tokens)
        self.may_step.wait(20)
        events = []
        for index, left in list(self.own.items()):
            if left[0] == ord("?"):
                raise RuntimeError("/a/path of the machine")
            token = left.pop(0)
            events.append(TokenEvent(index, 0, token, None, 8, 0.5, -1.0, None if left else "length"))
            if not left:
                del self.own[index]
        return tuple(events)

    def num_pending(self, index: int) -> int:
        return 3 if index in self.own else 0

    def stats(self, _events) -> SimpleNamespace:
        return SimpleNamespace(drafted=0, accepted=0, acceptance_rate=0.0, num_fallbacks=0)


@contextmanager
def scheduling(start, max_queue: int = 4, prompt_share: float | None = None) -> Iterator[Scheduler]:
    own = Scheduler(start, max_queue, Metrics([ExitPoint("a", 4, 8)], 8), prompt_share)
    own.start()
    try:
        yield own
    finally:
        own.stop()


def work(prompt: bytes) -> tuple[Work, queue.Queue[Update]]:
    news: queue.Queue[Update] = queue.Queue()
    request = SimpleNamespace(prompt=tuple(prompt))
    return Work(request, TextStream(lambda ids: bytes(ids).decode("utf-8", "replace"), ()), news.put), news


def last(news: queue.Queue[Update]) -> Update:
    while True:
        update = news.get(timeout=20)
        if update.finish_reason or update.error:
            return update


def value(own: Scheduler, name: str) -> float:
    return own._metrics.registry.get_sample_value(f"nemo_ee_{name}")


@pytest.mark.parametrize("bad", [b"!", b"v"], ids=["session-broken", "request-refused"])
def test_a_request_that_cannot_be_added_is_told_and_no_other_is_lost(bad: bytes) -> None:
    session = Session(3)
    session.may_add.clear()
    sessions = [session, Session(3)]
    with scheduling(lambda: sessions.pop(0)) as own:
        first, front = work(b"abc")
        own.submit([first])
        assert session.asks.wait(20)
        works = [work(bad + b"x"), work(b"de"), work(b"fg")]
        own.submit([one for one, _ in works])
        session.may_add.set()
        error = last(works[0][1]).error
        assert error.status == 500 and "path" not in error.message and "log" in error.message
        assert [last(news).finish_reason for _, news in works[1:]] == ["length", "length"]
        told = last(front)  # what ran in the session that broke has failed; with a problem of one request it went on
        assert (told.error is not None) == (bad == b"!") and own.healthy


def test_the_old_session_is_gone_before_a_new_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._LOG, "disabled", True)  # a log that is kept by a test keeps the error's frames
    made: list[weakref.ref] = []
    alive: list[int] = []

    def start() -> Session:
        alive.append(sum(one() is not None for one in made))
        session = Session()
        made.append(weakref.ref(session))
        return session

    with scheduling(start) as own:
        bad, news = work(b"a?")
        own.submit([bad])
        error = last(news).error
        assert error.status == 500 and "path" not in error.message
        good, news = work(b"ab")
        own.submit([good])
        assert last(news).finish_reason == "length"
    assert alive == [0, 0]


def test_a_slot_is_counted_once_while_it_is_being_filled() -> None:
    """Two slots and a queue of one: three sequences fit, at every moment."""
    session = Session(2)
    session.may_add.clear()
    with scheduling(lambda: session, max_queue=1) as own:
        works = [work(b"abcdef") for _ in range(4)]
        own.submit([works[0][0]])
        assert session.asks.wait(20), "it has left the queue and has no slot yet"
        own.submit([works[1][0], works[2][0]])
        with pytest.raises(QueueFull):
            own.submit([works[3][0]])
        session.may_add.set()
        assert [last(news).finish_reason for _, news in works[:3]] == ["length"] * 3
        own.submit([one for one, _ in (work(b"a"), work(b"b"), work(b"c"))])


def test_nothing_waits_in_sequences_that_were_cancelled() -> None:
    session = Session()
    with scheduling(lambda: session) as own:
        one, news = work(b"ab" * 10_000)
        own.submit([one])
        news.get(timeout=20)
        session.may_step.clear()
        assert value(own, "pending_tokens") == 3
        own.cancel([one])
        session.may_step.set()
        end = time.monotonic() + 20
        while value(own, "pending_tokens") or value(own, "running_sequences"):
            assert time.monotonic() < end
            time.sleep(0.01)


def test_stopping_tells_who_runs_and_who_waits() -> None:
    session = Session(1)
    with scheduling(lambda: session) as own:
        works = [work(b"ab" * 100_000) for _ in range(3)]
        own.submit([one for one, _ in works])
        own.stop()
        assert {last(news).error.status for _, news in works} == {503}
    assert value(own, "pending_tokens") == 0


def test_answers_that_fell_back_are_counted_over_sessions():
    metrics = Metrics([ExitPoint("a", 4, 8)], 8)
    for told in (0, 1, 3, 3, 0, 2):  # a new session after the fourth
        stats = SimpleNamespace(drafted=0, accepted=0, acceptance_rate=0.0, num_fallbacks=told)
        metrics.step((), stats, 0.1)
    assert metrics.registry.get_sample_value("nemo_ee_fallbacks_total") == 3 + 2


@pytest.mark.parametrize("share", [0.5, None])
def test_prompts_are_limited_while_answers_run(share: float | None) -> None:
    """Three sequences run, the prompts of two of them have not; the first step measures the answers."""
    session = Session(3)
    session.may_add.clear()
    session.num_answers, session.prompt_tokens_left = 1, 100
    with scheduling(lambda: session, prompt_share=share) as own:
        works = [work(b"abc") for _ in range(3)]
        own.submit([one for one, _ in works])
        assert session.asks.wait(20)
        session.may_add.set()
        assert [last(news).finish_reason for _, news in works] == ["length"] * 3
    assert list(session.limits[:2]) == ([None, None] if share is None else [0, 1]), "the answers are measured first"
