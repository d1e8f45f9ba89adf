# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: one thread is the only user of the model, with a bounded queue in front of it.

    submit -> queue -> a free slot of the session -> a step of all sequences at once -> updates to each, as text

Sequences join and leave between steps; the tokens of one do not depend on the others (see `DecodingSession`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nemo_ee.generation.request import Request
from nemo_ee.generation.session import DecodingSession
from nemo_ee.generation.stats import Failure, PromptScores, TokenEvent
from nemo_ee.serving.errors import ApiError
from nemo_ee.serving.metrics import Metrics
from nemo_ee.serving.prompt_pace import PromptPace
from nemo_ee.serving.text_stream import Piece, TextStream

_LOG = logging.getLogger(__name__)
# Errors for clients. The cause is only in the log, because it may contain details of the machine.
_FAILED = (500, "decoding failed; the server's log says why")
_NOT_STARTED = (500, "the request could not be started; the server's log says why")
_STOPPING = (503, "the server is stopping; try again later")


class QueueFull(Exception):
    """The queue has no room for the sequences."""


class Stopped(Exception):
    """The server accepts no sequences any more."""


@dataclass(frozen=True)
class Update:
    """New tokens of one sequence, or its end.

    Attributes:
        pieces: tokens with their text.
        prompt: scores of the prompt, once, for a request with `prompt_logprobs`.
        finish_reason: `stop` or `length` with the last update, else None.
        error: the error, with the last update, else None.
    """

    pieces: tuple[Piece, ...] = ()
    finish_reason: str | None = None
    error: ApiError | None = None
    prompt: PromptScores | None = None


@dataclass(eq=False)
class Work:
    """A sequence to generate.

    Attributes:
        request: the engine's request.
        text: turns its tokens into text.
        deliver: called in the model's thread with every `Update`; must not block.
        cancelled: no update is needed any more; the sequence ends before the next step.
    """

    request: Request
    text: TextStream
    deliver: Callable[[Update], None]
    cancelled: bool = field(default=False, init=False)


class Scheduler:
    """Runs sequences on a session.

    Args:
        start_session: makes an empty session; called again if a step fails.
        max_queue: most sequences that may wait for a slot.
        metrics: gets the numbers of every step.
        prompt_share: see `PromptPace`.
    """

    def __init__(
        self,
        start_session: Callable[[], DecodingSession],
        max_queue: int,
        metrics: Metrics,
        prompt_share: float | None = None,
    ) -> None:
        self._pace = PromptPace(prompt_share)
        self._start_session, self._max_queue, self._metrics = start_session, max_queue, metrics
        self._session: DecodingSession | None = start_session()
        self._num_slots = self._session.num_free_slots
        self._changed = threading.Condition()  # guards the attributes up to the blank line
        self._waiting: deque[Work] = deque()
        self._num_taken = 0  # sequences that have a slot or are about to get one
        self._stopping = False

        self._running: dict[int, Work] = {}  # by index in the session; the model's thread only
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    @property
    def healthy(self) -> bool:
        """Whether the model's thread runs and takes sequences."""
        return self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        """Start the model's thread."""
        self._thread.start()

    def submit(self, sequences: Sequence[Work]) -> None:
        """Queue sequences, all or none.

        Raises:
            QueueFull, Stopped: none was queued.
        """
        with self._changed:
            if self._stopping or not self._thread.is_alive():
                raise Stopped
            # Sequences that free slots take at once do not count as waiting.
            room = self._max_queue + self._num_slots - self._num_taken
            if len(self._waiting) + len(sequences) > room:
                raise QueueFull
            self._waiting.extend(sequences)
            self._metrics.queued.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, sequences: Sequence[Work]) -> None:
        """End sequences before the next step; those that have ended stay as they are. They get no further update."""
        with self._changed:
            for sequence in sequences:
                sequence.cancelled = True
            self._waiting = deque(one for one in self._waiting if not one.cancelled)
            self._metrics.queued.set(len(self._waiting))
            self._changed.notify()

    def stop(self) -> None:
        """End running and waiting sequences with an error, then the thread. Returns when it has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            taken: deque[Work] = deque()
            while self._admit(taken):
                whole = False
                try:
                    self._add(taken)
                    if self._running:
                        self._step()
                    whole = True
                except Exception:
                    _LOG.exception("a decoding step failed")
                # Outside of `except`, where the error still refers to the old session: two may not fit into memory.
                if not whole:
                    self._start_again(taken)
        finally:  # also when no new session could be created, so that no client waits for a dead thread
            with self._changed:
                self._stopping = True
            self._fail(*_STOPPING)

    def _admit(self, taken: deque[Work]) -> bool:
        """Wait for work, end cancelled sequences, take as many new ones as there are free slots.

        Returns False when it is time to stop.
        """
        with self._changed:
            while not (self._waiting or self._running or self._stopping):
                self._changed.wait()
            if self._stopping:
                return False
            for index in [index for index, one in self._running.items() if one.cancelled]:
                self._end(index)
            taken += [self._waiting.popleft() for _ in range(min(len(self._waiting), self._session.num_free_slots))]
            self._metrics.queued.set(len(self._waiting))
            self._count(len(taken))
        return True

    def _add(self, taken: deque[Work]) -> None:
        """Give slots to sequences. If one raises, it is the first that is left."""
        if not taken:
            return
        while taken:
            try:
                index = self._session.add(taken[0].request)
            except ValueError:  # the session is unchanged
                _LOG.exception("a request was not accepted")
                taken.popleft().deliver(Update(error=ApiError(*_NOT_STARTED)))
                continue
            sequence = taken.popleft()
            self._running[index] = sequence
            self._metrics.prompt_tokens.inc(len(sequence.request.prompt))
        self._count()

    def _start_again(self, taken: deque[Work]) -> None:
        """End the running sequences, and the one being added, with an error; start a new session for the others."""
        self._session = None
        self._fail(*_FAILED)
        if taken:
            taken.popleft().deliver(Update(error=ApiError(*_FAILED)))
        with self._changed:
            self._waiting.extendleft(one for one in reversed(taken) if not one.cancelled)
            self._num_taken = 0
            self._metrics.queued.set(len(self._waiting))
        taken.clear()
        self._session = self._start_session()

    def _count(self, num_coming: int = 0) -> None:
        """Record the running sequences, their pending tokens, and the number that are about to join."""
        with self._changed:
            self._num_taken = len(self._running) + num_coming
        self._metrics.running.set(len(self._running))
        self._metrics.pending.set(sum(self._session.num_pending(index) for index in self._running))

    def _end(self, index: int) -> None:
        self._session.cancel(index)
        del self._running[index]

    def _step(self) -> None:
        started, waiting = time.perf_counter(), self._session.prompt_tokens_left
        num_answers = self._session.num_answers
        events = self._session.step(self._pace.budget(len(self._running) - num_answers, num_answers))
        self._pace.took(time.perf_counter() - started, waiting - self._session.prompt_tokens_left, num_answers)
        pieces: dict[int, list[Piece]] = {}
        failed: dict[int, ApiError] = {}
        prompts: dict[int, PromptScores] = {}
        for event in events:
            own = pieces.setdefault(event.sequence, [])
            if isinstance(event, Failure):
                _LOG.error("decoding failed: %s", event.message)
                failed[event.sequence] = ApiError(*_FAILED)
            elif isinstance(event, PromptScores):
                prompts[event.sequence] = event
                self._running[event.sequence].text.finish_reason = event.finish_reason
            # A verification may give several tokens; those behind a stop string are dropped.
            elif self._running[event.sequence].text.finish_reason is None:
                own.extend(self._running[event.sequence].text.push(event))
        updates = []
        for index, own in pieces.items():
            sequence = self._running[index]
            update = Update(tuple(own), sequence.text.finish_reason, failed.get(index), prompts.get(index))
            updates.append((sequence, update))
            if sequence.text.finish_reason is not None or index in failed:
                self._end(index)
        # Counted before delivery, so that a client that has an answer finds it in the metrics.
        tokens = [event for event in events if isinstance(event, TokenEvent)]
        self._metrics.step(tokens, self._session.stats(()), time.perf_counter() - started)
        self._count()
        for sequence, update in updates:
            if not sequence.cancelled and update != Update():
                sequence.deliver(update)

    def _fail(self, status: int, message: str) -> None:
        """End the running sequences with an error; when stopping, the waiting ones too."""
        lost = list(self._running.values())
        self._running.clear()
        if self._stopping:
            with self._changed:
                lost += self._waiting
                self._waiting.clear()
        for sequence in lost:
            if not sequence.cancelled:
                sequence.deliver(Update(error=ApiError(status, message)))
        self._metrics.running.set(0)
        self._metrics.pending.set(0)
