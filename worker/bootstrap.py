"""The one place where the worker's objects are made and handed to each other."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from producer.errors import RedisUnavailable, ServerTooOld
from producer.metrics import MetricsServer
from producer.redis.connection import RedisConnection, require_version
from producer.settings import Settings
from producer.store.codes import CodePolicy, CodeStore
from producer.tracing.setup import FAREWELL, set_up
from worker.celery_side.events import Events
from worker.databases import Databases
from worker.fetcher import CelerySide, Fetcher, Prefetch
from worker.job import Finished
from worker.mail.failover import Failover
from worker.mail.pool import Relay
from worker.mail.render import Renderer
from worker.metrics import Counters, WorkerMetrics
from worker.queue.commands import RequestQueue
from worker.service import Service
from worker.settler import Settler

if TYPE_CHECKING:
    from producer.tracing.spans import Traces
    from worker.trace_spans import Recorder

SERVICE = "verifyserver-worker"  # in traces, unless OTEL_SERVICE_NAME says otherwise


class Worker:
    """What runs on the service's loop."""

    def __init__(self, settings: Settings, celery_side: CelerySide, traces: Traces | None = None) -> None:
        self._databases = Databases(settings)
        self._waiter = RedisConnection(settings.broker_url)
        self._mailer = Failover(
            [
                Relay(
                    url,
                    connections=settings.relay_connections,
                    connect_timeout=settings.connect_timeout,
                    send_timeout=settings.send_timeout,
                )
                for url in settings.relays
            ]
        )
        store = CodeStore(CodePolicy.of(settings))
        queue = RequestQueue(settings.queue, visibility_timeout=settings.visibility_timeout)
        counters = Counters()
        prefetch = Prefetch(lambda: self._mailer.capacity)
        settler = Settler(self._databases, store, queue, self._done, self._outcome, counters)
        service = Service(
            store,
            self._databases.codes,
            self._mailer,
            Renderer(settings.mail_from, default_locale=settings.locale),
            settler,
            counters,
            prefetch,
            sender=settings.mail_from.mailbox,
            code_length=settings.code_length,
        )
        self.fetcher = Fetcher(
            self._databases.broker,
            self._waiter,
            queue,
            service,
            settler,
            celery_side,
            counters,
            prefetch,
            lambda: not all(relay.unhealthy for relay in self._mailer.statuses()),
            _recorder(traces, settings.queue),
        )
        self._traces = traces
        self.events = Events(self._databases.broker)
        self._metrics = MetricsServer(
            WorkerMetrics(
                counters, self._mailer.statuses, lambda: self.fetcher.load, self._databases.broker, settings.queue
            ).page
        )
        self._metrics_bind = settings.metrics_bind
        self._celery_side = celery_side
        self._background: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to work, on the running loop."""
        await self._metrics.open(self._metrics_bind)
        self.fetcher.start()
        self._background = asyncio.create_task(self._require_versions())

    def _outcome(self) -> None:
        self.fetcher.outcome()

    def _done(self, finished: Finished) -> None:
        self.fetcher.done(finished)

    async def _require_versions(self) -> None:
        """Wait for each database, and give up if one is a server that is too old."""
        for database in (self._databases.codes, self._databases.broker, self._databases.results):
            while True:
                try:
                    [info] = await database.run([("INFO", "server")])
                except RedisUnavailable:
                    await asyncio.sleep(1)
                    continue
                break
            try:
                # A user without the right to ask is no reason not to work.
                if isinstance(info, bytes):
                    require_version(info)
            except ServerTooOld as exc:
                self._celery_side.give_up(str(exc))

    async def stop(self, seconds: float) -> None:
        """Finish what is in hand within `seconds`, put back the rest, close every connection."""
        if self._background is not None:
            self._background.cancel()
        await self.fetcher.stop(seconds)
        last_spans = None if self._traces is None else self._traces.close()
        await self.events.close()
        await self._mailer.close()
        await self._metrics.close()
        await self._waiter.close()
        await self._databases.close()
        if last_spans is not None:
            last_spans.join(FAREWELL)


def _recorder(traces: Traces | None, queue: str) -> Recorder | None:
    if traces is None:
        return None
    from worker.trace_spans import Recorder  # noqa: PLC0415 - needs what is installed only where traces are wanted

    return Recorder(traces, queue)


async def wire(settings: Settings, celery_side: CelerySide) -> Worker:
    """The worker, on the running loop."""
    worker = Worker(settings, celery_side, set_up(SERVICE))
    await worker.start()
    return worker
