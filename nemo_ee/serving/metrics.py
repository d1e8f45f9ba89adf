# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
"""The metrics of /metrics, in Prometheus' text format.

Tokens per second over a chosen time:
sum(rate(nemo_ee_tokens_total[1m])) / rate(nemo_ee_busy_seconds_total[1m]).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nemo_ee.generation.decoding_model import ExitPoint
from nemo_ee.generation.stats import FINAL, DecodingStats, TokenEvent

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SPEED_SECONDS = 5
_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of its own.

    Args:
        exits: the model's, in depth order.
        num_layers: the model's.
    """

    def __init__(self, exits: Sequence[ExitPoint], num_layers: int) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "nemo_ee_requests",
            "Requests for completions by status; a stream counts as 200 once it has begun.",
            ["endpoint", "status"],
            registry=registry,
        )
        self.cancelled = Counter(
            "nemo_ee_cancelled_requests", "Requests for completions whose client disconnected.", registry=registry
        )
        self.queued = Gauge("nemo_ee_queued_sequences", "Sequences that wait for a slot.", registry=registry)
        self.running = Gauge("nemo_ee_running_sequences", "Sequences being decoded.", registry=registry)
        self.pending = Gauge(
            "nemo_ee_pending_tokens", "Tokens that left early and whose deeper layers have not run.", registry=registry
        )
        self.prompt_tokens = Counter("nemo_ee_prompt_tokens", "Prompt tokens of started sequences.", registry=registry)
        self._tokens = Counter(
            "nemo_ee_tokens", "Tokens generated, by the exit that produced them.", ["exit"], registry=registry
        )
        self._depth = Histogram(
            "nemo_ee_token_depth_layers",
            "Layers below the exit that produced a token.",
            buckets=sorted({point.layer for point in exits} | {num_layers}),
            registry=registry,
        )
        self._drafted = Gauge("nemo_ee_drafted_tokens", "Drafts verified in this session.", registry=registry)
        self._accepted = Gauge("nemo_ee_accepted_tokens", "Drafts accepted in this session.", registry=registry)
        self._acceptance = Gauge("nemo_ee_acceptance_rate", "Share of drafts that were accepted.", registry=registry)
        self._fallbacks = Counter(
            "nemo_ee_fallbacks",
            "Answers that went on at full depth because their exits did not pay (cost_rule).",
            registry=registry,
        )
        self._num_fallbacks = 0  # of the session, at the last step
        self._speed = Gauge(
            "nemo_ee_tokens_per_second",
            f"Tokens of all sequences per second of decoding, over about its last {_SPEED_SECONDS} s.",
            registry=registry,
        )
        self._recent = (0.0, 0.0)  # tokens and seconds, older ones counting ever less
        self._busy = Counter("nemo_ee_busy_seconds", "Time spent in decoding steps.", registry=registry)
        self.latency = Histogram(
            "nemo_ee_request_seconds",
            "From the request to the end of its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "nemo_ee_first_token_seconds", "From the request to its first token.", buckets=_SECONDS, registry=registry
        )
        for name in [*(point.name for point in exits), FINAL]:
            self._tokens.labels(name)  # shown with 0 from the start

    def step(self, events: Sequence[TokenEvent], stats: DecodingStats, seconds: float) -> None:
        """A decoding step. Called by the model's thread only.

        Args:
            events: its tokens.
            stats: statistics of the session so far.
            seconds: duration of the step, above 0.
        """
        decay = math.exp(-seconds / _SPEED_SECONDS)
        self._recent = (self._recent[0] * decay + len(events), self._recent[1] * decay + seconds)
        self._speed.set(self._recent[0] / self._recent[1])
        for name, number in collections.Counter(event.exit for event in events).items():
            self._tokens.labels(FINAL if name is None else name).inc(number)
        for event in events:
            self._depth.observe(event.layer)
        self._drafted.set(stats.drafted)
        self._accepted.set(stats.accepted)
        self._acceptance.set(stats.acceptance_rate)
        # A new session begins at 0, and no first step has any.
        self._fallbacks.inc(max(0, stats.num_fallbacks - self._num_fallbacks))
        self._num_fallbacks = stats.num_fallbacks
        self._busy.inc(seconds)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)
