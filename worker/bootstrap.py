"""Makes the worker's objects, each once, and hands them to each other. Nothing else makes any of these.

An own code store is wired here, in place of `RedisCodeStore`; another mail channel is one line in `CHANNELS`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from producer.errors import RedisLoginRefused, RedisUnavailable, ServerTooOld
from producer.metrics import MetricsServer
from producer.redis.connection import RedisConnections, require_version
from producer.settings import Settings
from producer.store import guessing
from producer.store.codes import CodePolicy
from producer.store.redis_codes import RedisCodeStore
from producer.tracing.setup import LAST_EXPORT, set_up
from worker.celery_side.events import Events
from worker.contact import BrokerContact
from worker.databases import Database, Databases
from worker.fetcher import CelerySide, Fetcher, Prefetch
from worker.gathering import Gathering
from worker.mail.failover import Failover
from worker.mail.pool import SmtpPool
from worker.mail.render import Renderer
from worker.maintenance import Maintenance
from worker.metrics import Counters, WorkerMetrics
from worker.queue.commands import RequestQueue
from worker.request_log import RequestLog
from worker.service import Service
from worker.settler import Settler
from worker.tracing import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from producer.setting_types import RelayURL
    from producer.tracing.spans import Traces
    from worker.mail.channel import RelayChannel

# The mail channel for each URL scheme of VERIFY_RELAYS
CHANNELS: Final[dict[str, Callable[[RelayURL, Settings], RelayChannel]]] = {
    "smtp": SmtpPool,
    "smtp+starttls": SmtpPool,
    "smtps": SmtpPool,
}

logger = logging.getLogger(__name__)

SERVICE = "verifyserver-worker"  # in traces, unless OTEL_SERVICE_NAME says otherwise


class Worker:
    """Everything that runs on the service's loop."""

    def __init__(
        self,
        settings: Settings,
        make_celery_side: Callable[[Events], CelerySide],
        broker_contact: BrokerContact,
        traces: Traces | None = None,
    ) -> None:
        """`broker_contact`: what Celery reports to as well."""
        self._redis = RedisConnections()
        self._databases = Databases(settings, self._redis)
        self._channel = Failover([CHANNELS[url.scheme](url, settings) for url in settings.relays])
        codes, broker = self._databases.codes, self._databases.broker
        self._policy = CodePolicy.of(settings)
        store = RedisCodeStore(codes.connection, self._policy, database=codes.number)
        queue = RequestQueue(settings.queue, visibility_timeout=settings.visibility_timeout)
        self._counters = counters = Counters()
        gathering = Gathering()
        self._events = Events(broker)
        self._celery_side = make_celery_side(self._events)
        settler = Settler(store, self._databases, queue, counters, gathering)
        service = Service(
            store,
            self._channel,
            Renderer(settings.mail_from, default_locale=settings.locale),
            settler,
            counters,
            gathering,
            sender=settings.mail_from.mailbox,
            code_digits=settings.code_max_length,
        )
        self.fetcher = Fetcher(
            broker,
            self._redis.connection(settings.broker_url),  # its own, as it blocks
            queue,
            service,
            settler,
            self._celery_side,
            counters,
            Prefetch(lambda: self._channel.capacity, counters),
            gathering,
            traced=traces is not None,
        )
        self._request_log = RequestLog()
        settler.on_outcome = self.fetcher.outcome
        settler.on_settled += [self.fetcher.done, self._request_log.settled]
        if traces is not None:
            settler.on_settled.append(Recorder(traces, settings.queue).finish)
        parts = (broker, queue, service, settler, counters, self.fetcher)
        self._maintenance = Maintenance(*parts, lambda: self._channel.healthy, broker_contact)
        self._traces = traces
        metrics = WorkerMetrics(
            counters, self._channel.statuses, lambda: len(self.fetcher.tags()), broker, settings.queue
        )
        self._metrics = MetricsServer(metrics.page)
        self._metrics_bind = settings.metrics_bind
        self._background: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to work, on the running loop."""
        if (risk := guessing.warning(self._policy)) is not None:
            logger.warning(risk)
        await self._metrics.open(self._metrics_bind)
        self.fetcher.start()
        self._maintenance.start()
        self._background = asyncio.create_task(self._require_versions())

    async def _require_versions(self) -> None:
        """Give up if a database's server is too old; wait for those that are not up yet, or refuse our login."""
        for name in ("codes", "broker", "results"):
            database: Database = getattr(self._databases, name)
            warned = answered = False
            while not answered:
                try:
                    [info] = await database.run([("INFO", "server")])
                    answered = True
                    require_version(info)
                except ServerTooOld as exc:
                    self._celery_side.give_up(str(exc))
                except RedisUnavailable as exc:
                    if isinstance(exc, RedisLoginRefused) and not warned:
                        logger.error("%s database (VERIFY_%s_URL): %s", name, name.upper(), exc)
                        warned = True
                    await asyncio.sleep(1)

    async def stop(self, seconds: float) -> None:
        """Finish within `seconds` what this worker holds, put back the rest, close every connection."""
        if self._background is not None:
            self._background.cancel()
        await self.fetcher.stop(seconds)
        await self._maintenance.stop()
        self._request_log.flush()
        self._counters.audit.flush()
        last_spans = None if self._traces is None else self._traces.close()
        await self._events.close()
        await self._channel.close()
        await self._metrics.close()
        await self._redis.close()
        if last_spans is not None:
            last_spans.join(LAST_EXPORT)


async def wire(
    settings: Settings, make_celery_side: Callable[[Events], CelerySide], broker_contact: BrokerContact
) -> Worker:
    """Make the worker and start it on the running loop."""
    worker = Worker(settings, make_celery_side, broker_contact, set_up(SERVICE))
    await worker.start()
    return worker
