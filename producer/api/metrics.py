"""What the doors count, for Prometheus. No address and no purpose is ever a label."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import Final, Literal

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from producer.contract import ErrorCode
from producer.store.backlog import Backlog

Door = Literal["http", "grpc"]
Verb = Literal["request", "check"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Seconds: from a check in one Redis round trip to the longest reply timeout that is usual.
BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_WHAT: Final = ("door", "verb")
_SERVED: Final[tuple[tuple[Door, Verb], ...]] = (("http", "request"), ("http", "check"), ("grpc", "request"))
_UNKNOWN: Final = (float("nan"),) * 6


class Counts:
    """One verb's at one door. Plain numbers: the library's own counters would cost a request 7 us instead of one."""

    __slots__ = ("answers", "durations", "in_flight", "seconds")

    def __init__(self) -> None:
        self.in_flight = 0
        self.answers = {ErrorCode.SUCCESS: 0}
        self.durations = [0] * (len(BOUNDS) + 1)  # not cumulative; the last one is what is beyond all bounds
        self.seconds = 0.0  # of all answers together

    def answered(self, error: ErrorCode, seconds: float) -> None:
        """A request that came `seconds` ago has its answer."""
        self.answers[error] = self.answers.get(error, 0) + 1
        self.durations[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds


class ApiMetrics(Collector):
    """One process' counts, in a registry of their own, read at each scrape."""

    def __init__(self) -> None:
        self.counts = {served: Counts() for served in _SERVED}
        self.refusals: Counter[int] = Counter()  # HTTP answers with another status than 200
        self._backlog: Backlog | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def in_flight(self, door: Door) -> int:
        """Requests that are being answered at a door."""
        return sum(counts.in_flight for (where, _), counts in self.counts.items() if where == door)

    def show(self, backlog: Backlog | None) -> bytes:
        """The page. `depth` None: the broker does not answer, and its figures would be stale."""
        self._backlog = backlog
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        yield from self._requests()
        yield from self._queue()

    def _requests(self) -> Iterator[Metric]:
        answers = CounterMetricFamily("verify_door_requests", "Answers, by their error code.", labels=(*_WHAT, "error"))
        seconds = HistogramMetricFamily(
            "verify_door_request_seconds", "From a request's arrival to its answer.", labels=_WHAT
        )
        opened = GaugeMetricFamily(
            "verify_door_requests_in_flight", "Requests that are being answered.", labels=("door",)
        )
        refusals = CounterMetricFamily(
            "verify_door_refusals", "HTTP answers with another status than 200.", labels=("status",)
        )
        for served, counts in self.counts.items():
            for error, count in counts.answers.items():
                answers.add_metric((*served, str(int(error))), count)
            buckets = zip((*BOUNDS, "+Inf"), accumulate(counts.durations), strict=True)
            seconds.add_metric(served, [(str(bound), count) for bound, count in buckets], counts.seconds)
        for door in dict.fromkeys(door for door, _ in self.counts):
            opened.add_metric((door,), self.in_flight(door))
        for status, count in self.refusals.items():
            refusals.add_metric((str(status),), count)
        yield from (answers, seconds, opened, refusals)

    def _queue(self) -> Iterator[Metric]:
        # Workers show these too, under the same names. They are the whole queue's: max() over instances, not sum().
        queued, parked, suspects, dead, workers, oldest = (self._backlog or _UNKNOWN)[:6]
        yield _gauge("queue_requests", "Requests in the queue, without the parked ones.", queued)
        yield _gauge("queue_parked_requests", "Requests that wait for a retry, or for another's send.", parked)
        yield _gauge("queue_suspect_requests", "Requests whose worker died twice.", suspects)
        yield _gauge("dead_letters", "Messages in the list of dead letters.", dead)
        yield _gauge("queue_oldest_age_seconds", "Age of the oldest request in the queue.", oldest or 0.0)
        yield _gauge("workers", "Workers that gave a sign of life within 5 s.", workers)
        up = self._backlog is not None
        yield _gauge("broker_up", "1: the broker answered, and the queue's figures are of now.", up)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"verify_{name}", text, value=value)
