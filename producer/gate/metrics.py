"""What the doors count, for Prometheus. No address and no purpose is ever a label."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from producer.contract import ErrorCode
from producer.depth import Depth

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Seconds: from a check in one Redis round trip to the longest reply timeout that is usual.
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_WHAT = ("door", "verb")  # http or grpc; request or check


class DoorMetrics:
    """One process' metrics, in a registry of their own."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"verify_{name}", text, registry=own)

        self._answers = Counter(
            "verify_door_requests", "Answers, by their error code.", (*_WHAT, "error"), registry=own
        )
        self._seconds = Histogram(
            "verify_door_request_seconds",
            "From a request's arrival to its answer.",
            _WHAT,
            buckets=_BUCKETS,
            registry=own,
        )
        self._open = Gauge(
            "verify_door_requests_in_flight", "Requests that are being answered.", ("door",), registry=own
        )
        self._refusals = Counter(
            "verify_door_refusals", "HTTP answers with another status than 200.", ("status",), registry=own
        )
        self._queued = gauge("queue_requests", "Requests in the queue, without the parked ones.")
        self._parked = gauge("queue_parked_requests", "Requests that wait for a retry, or for another's send.")
        self._suspects = gauge("queue_suspect_requests", "Requests whose worker died twice.")
        self._dead = gauge("dead_letters", "Messages in the list of dead letters.")
        self._oldest = gauge("queue_oldest_age_seconds", "Age of the oldest request in the queue.")
        self._workers = gauge("workers", "Workers that gave a sign of life within 5 s.")
        self._broker_up = gauge("broker_up", "1: the broker answered, and the queue's figures are of now.")
        ProcessCollector(registry=self.registry)
        for door, verb in (("http", "request"), ("http", "check"), ("grpc", "request")):
            self._answers.labels(door, verb, "0")
            self._seconds.labels(door, verb)
            self._open.labels(door)

    @contextmanager
    def under_way(self, door: str, verb: str) -> Iterator[list[ErrorCode]]:
        """Around one request: put its answer in the list. One that was cancelled has none, and is not counted."""
        answer: list[ErrorCode] = []
        flight = self._open.labels(door)
        flight.inc()
        began = time.perf_counter()
        try:
            yield answer
        finally:
            flight.dec()
        for error in answer:
            self._answers.labels(door, verb, str(int(error))).inc()
            self._seconds.labels(door, verb).observe(time.perf_counter() - began)

    def refused(self, status: int) -> None:
        """An HTTP request was answered with another status than 200."""
        self._refusals.labels(str(status)).inc()

    def show(self, depth: Depth | None) -> bytes:
        """The page. `depth` None: the broker does not answer, and its figures would be stale."""
        unknown = float("nan")
        for gauge, name in (
            (self._queued, "queued"),
            (self._parked, "parked"),
            (self._suspects, "suspects"),
            (self._dead, "dead"),
            (self._workers, "workers"),
        ):
            gauge.set(unknown if depth is None else getattr(depth, name))
        self._oldest.set(unknown if depth is None else depth.oldest or 0)
        self._broker_up.set(depth is not None)
        return generate_latest(self.registry)
