"""What a living worker does every second: it renews what it holds, and restores what dead workers held."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from producer.contract import ErrorCode
from producer.errors import RedisUnavailable
from producer.redis.clock import ASK
from producer.redis.connection import raise_errors
from worker.contact import SERVICE, BrokerContact
from worker.databases import Database
from worker.fetcher import Fetcher
from worker.metrics import Counters
from worker.queue.commands import DEAD_AGE, DEAD_KEPT, RequestQueue
from worker.queue.message import POISON, Reserved, UnfitMessage, parse, unreadable_job
from worker.service import Service
from worker.settler import Settler

logger = logging.getLogger(__name__)

# Seconds of unbroken contact with Redis before other workers' messages are restored. After an outage of Redis all look
# abandoned until their workers have renewed them.
RESTORE_AFTER: Final = 2.0


class Maintenance:
    """Renews leases and reservations, restores abandoned messages, and deals with poison messages and dead letters."""

    def __init__(
        self,
        broker: Database,
        queue: RequestQueue,
        service: Service,
        settler: Settler,
        counters: Counters,
        fetcher: Fetcher,
        relay_healthy: Callable[[], bool],
        contact: BrokerContact,
    ) -> None:
        """`relay_healthy`: whether this worker has a healthy relay now."""
        self._broker = broker
        self._queue = queue
        self._service = service
        self._settler = settler
        self._counters = counters
        self._fetcher = fetcher
        self._relay_healthy = relay_healthy
        self._contact = contact
        self._in_contact_since: float | None = None  # loop time; None: Redis is unreachable
        self._reported = counters.dead.copy()
        self._left_to_others = False  # whether it was logged that entries of another release are left
        self._running: asyncio.Task[None]

    def start(self) -> None:
        self._running = asyncio.create_task(self._run())

    async def stop(self) -> None:
        self._running.cancel()
        await asyncio.wait([self._running])
        self._report_dead_letters()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            self._report_dead_letters()
            self._settler.free_leases()
            try:
                await asyncio.gather(self._service.renew_leases(), self._round(began))
            except RedisUnavailable as exc:
                self._contact.lost(SERVICE, exc.kind, exc)
                self._in_contact_since = None
            except Exception as exc:  # noqa: BLE001 - no error may end the rounds: leases would lapse
                logger.error("unexpected error in the maintenance", extra={"kind": type(exc).__name__})
            await asyncio.sleep(max(0.0, self._queue.tick - (loop.time() - began)))

    async def _round(self, now: float) -> None:
        since = now if self._in_contact_since is None else self._in_contact_since
        restore = now - since >= RESTORE_AFTER
        command = self._queue.maintain(
            self._fetcher.tags(),
            restore=restore,
            relay_healthy=self._relay_healthy(),
            redis_time=self._counters.clock.now(),
        )
        asked = time.monotonic()
        answer, said = await self._broker.run([command, ASK])
        if self._counters.clock.read(said, asked) > self._queue.tick:
            since = now  # Redis' clock was set forward, and all look abandoned as they do after an outage
        raise_errors([answer])
        result = self._queue.read_maintain(answer)
        if result.refusal:
            self._in_contact_since = None  # it may have refused others to renew what they hold
            self._contact.lost(SERVICE, result.refusal)
        else:
            self._in_contact_since = since
            self._contact.found(SERVICE)
        if result.restored:
            self._counters.restored += result.restored
            logger.warning("requests of a dead worker were restored", extra={"count": result.restored})
        if result.dead_too_old or result.dead_too_many:
            self._counters.dead_removed["age"] += result.dead_too_old
            self._counters.dead_removed["number"] += result.dead_too_many
            logger.warning(
                "dead letters were removed: %d older than %d days, %d beyond the newest %d",
                *(result.dead_too_old, DEAD_AGE // 86_400, result.dead_too_many, DEAD_KEPT),
            )
        if result.left and not self._left_to_others:
            self._left_to_others = True
            logger.warning("another release wrote entries that this one cannot read; they are left to its workers")
        for poison in result.poison:
            self._dead_letter_poison(poison)
        self._fetcher.on_maintained(result)

    def _dead_letter_poison(self, poison: Reserved) -> None:
        """Answer a message that killed its worker too often, and dead-letter it."""
        try:
            job = parse(poison).job
        except UnfitMessage:
            self._settler.dead_letter(unreadable_job(poison.tag), POISON)
        else:
            job.validate()
            self._settler.dead_letter(job, POISON, answer=ErrorCode.EXCEPTION)

    def _report_dead_letters(self) -> None:
        """Log the messages dead-lettered since the last report: one line a round, however many there are."""
        new = self._counters.dead - self._reported
        if new:
            self._reported = self._counters.dead.copy()
            logger.warning(
                "messages were dead-lettered, the last one because: %s. See: python -m worker dead list",
                self._counters.last_dead_letter,
                extra={"count": new.total(), "reason": ", ".join(f"{code} {count}" for code, count in new.items())},
            )
