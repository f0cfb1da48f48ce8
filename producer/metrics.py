"""What the worker's and the API's Prometheus metrics have in common.

No address, purpose or request id is ever a label.
"""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from producer.audit import Audit
from producer.setting_types import Bind
from producer.store.backlog import Backlog

logger = logging.getLogger(__name__)

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
TIMEOUT: Final = 5.0  # seconds for a scraper to send its request and read the answer
_MAX_HEAD: Final = 16 * 1024  # bytes of a request's head
_NAN: Final = float("nan")
_Labels = TypeVar("_Labels", bound=tuple[str, ...])


class Histogram:
    """Durations in seconds.

    Plain integers: prometheus_client's histogram costs a request 7 us instead of 1.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # per bucket, not cumulative; the last one has no upper bound
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """The cumulative buckets as Prometheus wants them."""
        cumulative = accumulate(self.counts)
        return [(str(bound), float(count)) for bound, count in zip((*self.bounds, "+Inf"), cumulative, strict=True)]


class ProcessMetrics(Collector):
    """The metrics of one process, read at each scrape so that counting costs next to nothing."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._backlog: Backlog | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    @abstractmethod
    def own_metrics(self) -> Iterator[Metric]:
        """What only this kind of process shows."""

    def render(self, backlog: Backlog | None) -> bytes:
        """The page in Prometheus' text format. `backlog`: None while the broker does not answer."""
        self._backlog = backlog
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self.own_metrics()
        events = {(event.value,): count for event, count in self._audit.counts.items()}
        yield labelled_counter("audit_events", "Events that an attack would cause.", ("event",), events)
        # Every process shows the same figures of the whole queue: take max() over instances, not sum().
        queued, delayed, suspects, dead, workers, oldest = (self._backlog or (_NAN,) * 6)[:6]
        yield gauge("queue_requests", "Requests in the queue, without the delayed ones.", queued)
        yield gauge("queue_delayed_requests", "Requests that wait for a retry or for another request's send.", delayed)
        yield gauge("queue_suspect_requests", "Requests whose worker died twice.", suspects)
        yield gauge("dead_letters", "Messages in the list of dead letters.", dead)
        yield gauge("queue_oldest_age_seconds", "Age of the oldest request in the queue.", oldest or 0.0)
        yield gauge("workers", "Workers that gave a sign of life within 5 s.", workers)
        up = self._backlog is not None
        yield gauge("broker_up", "1: the broker answered and the queue's figures are current.", up)


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"verify_{name}", text, value=value)


def counter(name: str, text: str, value: int) -> Metric:
    return CounterMetricFamily(f"verify_{name}", text, value=value)


def labelled_counter(name: str, text: str, labels: Sequence[str], counts: Mapping[_Labels, int]) -> Metric:
    """A counter with one value for each combination of labels."""
    family = CounterMetricFamily(f"verify_{name}", text, labels=labels)
    for values, count in counts.items():
        family.add_metric(values, count)
    return family


def labelled_gauge(name: str, text: str, labels: Sequence[str], values: Mapping[_Labels, float]) -> Metric:
    """A gauge with one value for each combination of labels."""
    family = GaugeMetricFamily(f"verify_{name}", text, labels=labels)
    for labelled, value in values.items():
        family.add_metric(labelled, value)
    return family


def histogram(name: str, text: str, labels: Sequence[str], histograms: Mapping[_Labels, Histogram]) -> Metric:
    """One histogram for each combination of labels; the only key is `()` if there are none."""
    family = HistogramMetricFamily(f"verify_{name}", text, labels=labels)
    for values, found in histograms.items():
        family.add_metric(values, found.buckets(), found.total)
    return family


class MetricsServer:
    """Serves `GET /metrics` on the running loop, for a process that has no web server.

    prometheus_client's own server takes a thread for each connection and waits for a slow client as long as it likes.
    """

    def __init__(self, page: Callable[[], Awaitable[bytes]]) -> None:
        self._page = page
        self._server: asyncio.Server | None = None

    async def open(self, bind: Bind) -> None:
        """Listen. If the port is taken, log a warning and go on without metrics."""
        try:
            self._server = await asyncio.start_server(self._serve, bind.host, bind.port, limit=_MAX_HEAD)
        except OSError as exc:
            logger.warning(
                "VERIFY_METRICS_BIND: cannot listen on %s (%s); this worker goes on without metrics."
                " Port 0 picks a free one",
                bind,
                exc.strerror or type(exc).__name__,
            )
            return
        where = Bind(bind.host, self._server.sockets[0].getsockname()[1])
        logger.info("metrics are at http://%s/metrics", where)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and close the connection."""
        try:
            async with asyncio.timeout(TIMEOUT):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._answer(head.split(b"\r\n", 1)[0].split(b" ")))
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # the client left, was too slow (TimeoutError) or does not speak HTTP
        except Exception as exc:  # noqa: BLE001 - a bug in the metrics must not stop the worker
            logger.error("unexpected error in the metrics", extra={"kind": type(exc).__name__})
        finally:
            writer.transport.abort()

    async def _answer(self, request: list[bytes]) -> bytes:
        method, target = (*request, b"", b"")[:2]
        if method not in {b"GET", b"HEAD"}:
            return _response("405 Method Not Allowed", b"GET /metrics\n", "Allow: GET, HEAD\r\n")
        if target.partition(b"?")[0] != b"/metrics":
            return _response("404 Not Found", b"GET /metrics\n")
        page = _response("200 OK", await self._page(), content_type=CONTENT_TYPE)
        return page if method == b"GET" else page.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def _response(status: str, body: bytes, more: str = "", *, content_type: str = "text/plain") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{more}"
    return f"{head}Connection: close\r\n\r\n".encode() + body
