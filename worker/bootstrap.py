"""The one place where the worker's objects are made and handed to each other."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from producer.codes import CodePolicy, CodeStore
from producer.errors import RedisUnavailable, ServerTooOld
from producer.link import Link, require_version
from producer.settings import Settings
from producer.traces import FAREWELL, set_up
from worker.appetite import Appetite
from worker.databases import Databases
from worker.events import Events
from worker.intake import Intake
from worker.job import Finished
from worker.mail.failover import Failover
from worker.mail.relay import Relay
from worker.mail.render import Renderer
from worker.metrics import MetricsServer, WorkerMetrics
from worker.queue import RequestQueue
from worker.service import Service
from worker.settle import Settler
from worker.tally import Tally
from worker.watcher import Watcher

if TYPE_CHECKING:
    from producer.spans import Traces
    from worker.spans import Recorder

SERVICE = "verifyserver-worker"  # in traces, unless OTEL_SERVICE_NAME says otherwise


class Worker:
    """What runs on the service's loop."""

    def __init__(self, settings: Settings, watcher: Watcher, traces: Traces | None = None) -> None:
        self._databases = Databases(settings)
        self._waiter = Link(settings.broker_url)
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
        tally = Tally()
        appetite = Appetite(lambda: self._mailer.capacity)
        settler = Settler(self._databases, store, queue, self._done, self._outcome, tally)
        service = Service(
            store,
            self._databases.codes,
            self._mailer,
            Renderer(settings.mail_from, default_locale=settings.locale),
            settler,
            tally,
            appetite,
            sender=settings.mail_from.mailbox,
            code_length=settings.code_length,
        )
        self.intake = Intake(
            self._databases.broker,
            self._waiter,
            queue,
            service,
            settler,
            watcher,
            tally,
            appetite,
            _recorder(traces, settings.queue),
        )
        self._traces = traces
        self.events = Events(self._databases.broker)
        self._metrics = MetricsServer(
            WorkerMetrics(
                tally, self._mailer.standings, lambda: self.intake.load, self._databases.broker, settings.queue
            )
        )
        self._metrics_bind = settings.metrics_bind
        self._watcher = watcher
        self._background: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to work, on the running loop."""
        await self._metrics.open(self._metrics_bind)
        self.intake.start()
        self._background = asyncio.create_task(self._require_versions())

    def _outcome(self) -> None:
        self.intake.outcome()

    def _done(self, finished: Finished) -> None:
        self.intake.done(finished)

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
                self._watcher.give_up(str(exc))

    async def stop(self, seconds: float) -> None:
        """Finish what is in hand within `seconds`, put back the rest, close every connection."""
        if self._background is not None:
            self._background.cancel()
        await self.intake.stop(seconds)
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
    from worker.spans import Recorder  # noqa: PLC0415 - needs what is installed only where traces are wanted

    return Recorder(traces, queue)


async def wire(settings: Settings, watcher: Watcher) -> Worker:
    """The worker, on the running loop."""
    worker = Worker(settings, watcher, set_up(SERVICE))
    await worker.start()
    return worker
