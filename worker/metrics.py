"""The worker's `/metrics` for Prometheus. No address, no purpose and no request id is ever a label."""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from producer.contract import ErrorCode
from producer.errors import RedisUnavailable
from producer.redis.connection import ServerError
from producer.setting_types import Bind
from producer.store.backlog import Backlog, backlog, read_backlog
from producer.store.codes import BUCKET_HIT, COOLDOWN_HIT
from worker.databases import Database
from worker.mail.failover import RelayStatus

# Seconds: from a relay that answers at once to a request that was given up after the longest VERIFY_GIVE_UP_AFTER.
BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
_LONGEST: Final = BOUNDS[-1]
# Why a message was buried, in a word; by how the reason in the dead letter begins.
_REASONS: Final = {
    "unknown task": "unknown_task",
    "no ": "envelope",
    "not ": "envelope",
    "content-": "envelope",
    "body_encoding": "envelope",
    "the envelope": "envelope",
    "the body": "body",
    "an argument": "body",
    "callbacks": "body",
    "errbacks": "body",
    "chain": "body",
    "chord": "body",
    "expires": "time",
    "eta": "time",
    "the request id": "id_conflict",
    "it killed": "killer",
    "Celery": "celery",
}
OTHER: Final = "other"
REASONS: Final = (*dict.fromkeys(_REASONS.values()), OTHER)


class Durations:
    """A histogram of seconds."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)  # not cumulative; the last one is what is beyond all bounds
        self.total = 0.0

    def since(self, moment: float | None) -> None:
        """Count the time since `moment` (Unix seconds by whoever wrote it down; None: nobody did)."""
        if moment is not None:
            # Another host's clock may be ahead, and a message may say anything.
            seconds = time.time() - moment
            if not 0.0 <= seconds <= _LONGEST:
                seconds = 0.0 if seconds < 0.0 else _LONGEST
            self.counts[bisect_left(BOUNDS, seconds)] += 1
            self.total += seconds


class Counters:
    """One worker's numbers since its start."""

    def __init__(self) -> None:
        self.taken = 0  # requests that were taken from the queue, each time they were
        self.through_celery = 0  # of these, what needed Celery's own machinery
        self.replies = dict.fromkeys((error for error in ErrorCode if error < 1000), 0)
        self.until_reply = Durations()  # from `enqueued_at`
        self.until_accepted = Durations()
        self.retries = 0
        self.joins = 0
        self.hits = dict.fromkeys((COOLDOWN_HIT, BUCKET_HIT), 0)
        self.restored = 0
        self.dead = dict.fromkeys(REASONS, 0)

    def replied(self, error: ErrorCode, enqueued_at: float | None) -> None:
        """A request has its answer."""
        self.replies[error] += 1
        self.until_reply.since(enqueued_at)

    def dead_lettered(self, reason: str) -> None:
        """A message became a dead letter."""
        found = (word for start, word in _REASONS.items() if reason.startswith(start))
        self.dead[next(found, OTHER)] += 1


logger = logging.getLogger(__name__)

TIMEOUT: Final = 5.0  # seconds for a scraper to say what it wants, and to take it
_LONGEST_HEAD: Final = 16 * 1024  # bytes of a request's head
_UNKNOWN: Final = float("nan")


class WorkerMetrics(Collector):
    """Reads what there is at each scrape, so that counting itself costs next to nothing."""

    def __init__(
        self,
        counters: Counters,
        relays: Callable[[], Iterable[RelayStatus]],
        held: Callable[[], int],
        broker: Database,
        queue: str,
    ) -> None:
        self._counters = counters
        self._relays = relays
        self._held = held
        self._broker = broker
        self._queue = queue
        self._backlog: Backlog | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    async def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        self._backlog = await self._ask_backlog()
        return generate_latest(self._registry)

    async def _ask_backlog(self) -> Backlog | None:
        """How the queue stands now; None: the broker does not answer, and what it said before would be stale."""
        try:
            [answer] = await self._broker.run([backlog(self._queue)])
        except RedisUnavailable:
            return None
        return None if isinstance(answer, ServerError) else read_backlog(answer)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        yield from self._requests()
        yield from self._sends()
        yield from self._stock()

    def _requests(self) -> Iterator[Metric]:
        counters = self._counters
        paths = {"fast": counters.taken - counters.through_celery, "celery": counters.through_celery}
        replies = {str(int(error)): count for error, count in counters.replies.items()}
        yield _counter("worker_requests_taken", "Requests taken from the queue, retries too.", "path", paths)
        yield _counter("worker_replies", "Replies, by their error code.", "error", replies)
        yield _histogram("worker_reply_seconds", "From a request's enqueued_at to its reply.", counters.until_reply)
        yield _histogram("worker_accepted_seconds", "From a request's enqueued_at to the 250.", counters.until_accepted)
        yield _plain("worker_retries", "Sends that failed for now; their request was parked.", counters.retries)
        yield _plain("worker_joins", "Requests that met another's mail on the wire, and wait.", counters.joins)
        hits = counters.hits
        yield _plain("worker_cooldown_hits", "Requests answered Success without another mail.", hits["cooldown"])
        yield _plain("worker_bucket_hits", "Requests whose address had its mails for now.", hits["bucket"])
        yield _plain("worker_redeliveries", "Requests of dead workers that this one brought back.", counters.restored)
        yield _counter("worker_dead_letters", "Messages that this worker buried.", "reason", counters.dead)

    def _sends(self) -> Iterator[Metric]:
        sends = CounterMetricFamily(
            "verify_worker_sends", "Tries to send a mail through a relay.", labels=("relay", "outcome")
        )
        opened = GaugeMetricFamily("verify_worker_relay_connections", "Connections to a relay.", labels=("relay",))
        unhealthy = GaugeMetricFamily(
            "verify_worker_relay_sick", "1: the relay is skipped for a while.", labels=("relay",)
        )
        for relay, status in _by_name(self._relays()).items():
            for outcome, count in status.sends.items():
                sends.add_metric((relay, outcome), count)
            opened.add_metric((relay,), status.connections)
            unhealthy.add_metric((relay,), status.unhealthy)
        yield from (sends, opened, unhealthy)

    def _stock(self) -> Iterator[Metric]:
        stood = self._backlog
        queued, parked, suspects, dead, workers, oldest = (stood or (_UNKNOWN,) * 6)[:6]
        oldest = oldest or 0.0
        yield _gauge("worker_requests_held", "Requests in this worker's hands.", self._held())
        # The doors show these too, under the same names. They are the whole queue's: max() over instances, not sum().
        yield _gauge("queue_requests", "Requests in the queue, without the parked ones.", queued)
        yield _gauge("queue_parked_requests", "Requests that wait for a retry, or for another's send.", parked)
        yield _gauge("queue_suspect_requests", "Requests whose worker died twice.", suspects)
        yield _gauge("dead_letters", "Messages in the list of dead letters.", dead)
        yield _gauge("queue_oldest_age_seconds", "Age of the oldest request in the queue.", oldest)
        yield _gauge("workers", "Workers that gave a sign of life within 5 s.", workers)
        yield _gauge("broker_up", "1: the broker answered, and the queue's figures are of now.", stood is not None)


class MetricsServer:
    """Serves `/metrics` on the service's loop."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics
        self._server: asyncio.Server | None = None

    async def open(self, bind: Bind) -> None:
        """Listen; if that is not possible say so, and go on without."""
        try:
            self._server = await asyncio.start_server(self._serve, bind.host, bind.port, limit=_LONGEST_HEAD)
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
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one answer."""
        try:
            async with asyncio.timeout(TIMEOUT):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._answer(head.split(b"\r\n", 1)[0].split(b" ")))
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # it left, or is too slow, or no HTTP client
        except Exception as exc:  # noqa: BLE001 - whatever it is, requests are served
            logger.error("unforeseen error in the metrics", extra={"kind": type(exc).__name__})
        finally:
            writer.transport.abort()

    async def _answer(self, request: list[bytes]) -> bytes:
        method, target = (*request, b"", b"")[:2]
        if method not in {b"GET", b"HEAD"}:
            return _response("405 Method Not Allowed", b"GET /metrics\n", "Allow: GET, HEAD\r\n")
        if target.partition(b"?")[0] != b"/metrics":
            return _response("404 Not Found", b"GET /metrics\n")
        page = _response("200 OK", await self._metrics.page(), content_type=CONTENT_TYPE_LATEST)
        return page if method == b"GET" else page.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def _response(status: str, body: bytes, more: str = "", *, content_type: str = "text/plain") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{more}"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def _by_name(relays: Iterable[RelayStatus]) -> dict[str, RelayStatus]:
    """Relays that differ only in what may not be shown, such as the user, as one."""
    found: dict[str, RelayStatus] = {}
    for each in relays:
        found[each.relay] = _both(found[each.relay], each) if each.relay in found else each
    return found


def _both(one: RelayStatus, other: RelayStatus) -> RelayStatus:
    sends = {outcome: count + other.sends[outcome] for outcome, count in one.sends.items()}
    return RelayStatus(one.relay, sends, one.connections + other.connections, one.unhealthy or other.unhealthy)


def _plain(name: str, text: str, value: int) -> Metric:
    return CounterMetricFamily(f"verify_{name}", text, value=value)


def _counter(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(f"verify_{name}", text, labels=(label,))
    for value, count in values.items():
        family.add_metric((value,), count)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"verify_{name}", text, value=value)


def _histogram(name: str, text: str, durations: Durations) -> Metric:
    counts = accumulate(durations.counts)
    buckets = [(str(bound), float(count)) for bound, count in zip((*BOUNDS, "+Inf"), counts, strict=True)]
    return HistogramMetricFamily(f"verify_{name}", text, buckets=buckets, sum_value=durations.total)
