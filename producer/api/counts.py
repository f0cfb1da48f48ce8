"""The API's metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Final, Literal

from prometheus_client.metrics_core import Metric

from producer.audit import Audit
from producer.contract import ErrorCode
from producer.metrics import Histogram, ProcessMetrics, histogram, labelled_counter, labelled_gauge

Protocol = Literal["http", "grpc"]
Verb = Literal["request", "check"]

# Seconds: from a check, which is one Redis round trip, to the longest reply timeout in common use.
BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LABELS: Final = ("protocol", "verb")
_SERVED: Final[tuple[tuple[Protocol, Verb], ...]] = (("http", "request"), ("http", "check"), ("grpc", "request"))


class Counts:
    """What is counted of one verb over one protocol with one key."""

    __slots__ = ("answers", "durations", "in_flight")

    def __init__(self) -> None:
        self.in_flight = 0
        self.answers = {ErrorCode.SUCCESS: 0}
        self.durations = Histogram(BOUNDS)

    def answered(self, error: ErrorCode, seconds: float) -> None:
        self.answers[error] = self.answers.get(error, 0) + 1
        self.durations.observe(seconds)


class ApiMetrics(ProcessMetrics):
    """One API process's counts."""

    def __init__(self, audit: Audit, keys: Collection[str] = ()) -> None:
        """`keys`: the names of the API's keys. Where there are none, nothing has the label `key`."""
        super().__init__(audit)
        self._labels = (*_LABELS, "key") if keys else _LABELS
        self.counts = {(*served, key): Counts() for key in sorted(keys) or [""] for served in _SERVED}
        self.refusals: Counter[int] = Counter()  # HTTP answers with a status other than 200
        self._evictions: dict[Protocol, int] = {"http": 0, "grpc": 0}

    def in_flight(self, protocol: Protocol) -> int:
        return sum(counts.in_flight for (each, *_), counts in self.counts.items() if each == protocol)

    def evicted(self, protocol: Protocol) -> None:
        """Count a connection that was closed to make room for another."""
        self._evictions[protocol] += 1

    def own_metrics(self) -> Iterator[Metric]:
        answers = {
            (*served[: len(self._labels)], str(int(error))): count
            for served, counts in self.counts.items()
            for error, count in counts.answers.items()
        }
        durations = {served[: len(self._labels)]: counts.durations for served, counts in self.counts.items()}
        in_flight = {(protocol,): self.in_flight(protocol) for protocol, *_ in self.counts}
        refusals = {(str(status),): count for status, count in self.refusals.items()}
        yield labelled_counter("api_requests", "Answers by error code.", (*self._labels, "error"), answers)
        yield histogram("api_request_seconds", "From a request's arrival to its answer.", self._labels, durations)
        yield labelled_gauge("api_requests_in_flight", "Requests that are being answered.", ("protocol",), in_flight)
        evictions = {(protocol,): count for protocol, count in self._evictions.items()}
        text = "Connections that were closed to make room for others."
        yield labelled_counter("api_evicted_connections", text, ("protocol",), evictions)
        yield labelled_counter("api_refusals", "HTTP answers with a status other than 200.", ("status",), refusals)
