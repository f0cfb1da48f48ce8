"""What a living worker does every second: leases and visibility anew, and what others left behind comes back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from producer.contract import ErrorCode, VerifyRequest
from producer.errors import RedisUnavailable
from producer.redis.connection import raise_errors
from worker.databases import Database
from worker.job import Job
from worker.metrics import Counters
from worker.queue.commands import MaintenanceResult, RequestQueue
from worker.queue.message import POISON, Reserved, Unfit, parse
from worker.service import Service
from worker.settler import Settler

logger = logging.getLogger(__name__)

SETTLED = 2.0  # seconds of unbroken contact with Redis before others' messages count as abandoned: they come back too


class Maintenance:
    """Tends until it is cancelled. `mine` names the tags in this worker's hands; `on_tended` is told what was found."""

    def __init__(
        self,
        broker: Database,
        queue: RequestQueue,
        service: Service,
        settler: Settler,
        counters: Counters,
        mine: Callable[[], list[str]],
        on_result: Callable[[MaintenanceResult], None],
        relay_healthy: Callable[[], bool],
    ) -> None:
        self._broker = broker
        self._queue = queue
        self._service = service
        self._settler = settler
        self._counters = counters
        self._mine = mine
        self._on_maintained = on_result
        self._relay_healthy = relay_healthy
        self._in_touch_since: float | None = None
        self._reported = counters.dead.copy()

    async def run(self) -> None:
        """A round each tick, whatever happens."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            self._report_dead_letters()
            try:
                await asyncio.gather(self._service.renew_leases(), self._round(began))
            except RedisUnavailable as exc:
                if self._in_touch_since is not None:
                    logger.warning("the broker database cannot be used, waiting for it: %s", exc)
                self._in_touch_since = None
            except Exception as exc:  # noqa: BLE001 - whatever it is, leases want renewing
                logger.error("unforeseen error in tending", extra={"kind": type(exc).__name__})
            await asyncio.sleep(max(0.0, self._queue.tick - (loop.time() - began)))

    async def _round(self, now: float) -> None:
        since = now if self._in_touch_since is None else self._in_touch_since
        restore = now - since >= SETTLED
        command = self._queue.maintain(self._mine(), restore=restore, relay_healthy=self._relay_healthy())
        [answer] = await self._broker.run([command])
        raise_errors([answer])
        if self._in_touch_since is None:
            logger.info("in touch with the broker database")
        self._in_touch_since = since
        result = self._queue.read_maintain(answer)
        if result.restored:
            self._counters.restored += result.restored
            logger.warning("requests of a dead worker came back", extra={"count": result.restored})
        for killer in result.poison:
            self._condemn(killer)
        self._on_maintained(result)

    def _report_dead_letters(self) -> None:
        """Log the messages dead-lettered since the last report: one line a round, however many there are."""
        new = self._counters.dead - self._reported
        if new:
            self._reported = self._counters.dead.copy()
            logger.warning(
                "messages were dead-lettered, the latest because: %s (python -m worker dead list)",
                self._counters.last_dead_letter,
                extra={"count": new.total(), "reason": ", ".join(f"{code} {count}" for code, count in new.items())},
            )

    def _condemn(self, killer: Reserved) -> None:
        """A message that killed its worker four times: answered, and buried."""
        try:
            job = parse(killer).job
        except Unfit:
            self._settler.dead_letter(Job("", killer.tag, VerifyRequest(None), None, None), POISON)
            return
        job.validate()
        self._settler.dead_letter(job, POISON, answer=ErrorCode.EXCEPTION)
