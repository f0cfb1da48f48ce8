"""From the queue to the service, and the task's Celery Strategy.

One message stays one request; a batch is only how they travel inside. What needs Celery's own machinery (ETA, chain,
group, callbacks) goes to Celery's default strategy, whose task hands the service a batch of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from producer.contract import ErrorCode, Reply, VerifyRequest
from producer.errors import RedisUnavailable
from producer.redis.connection import RedisConnection, raise_errors
from producer.redis.scripts import Command
from worker.databases import Database
from worker.job import Finished, Job
from worker.maintenance import Maintenance
from worker.metrics import Counters
from worker.queue.commands import MAX_MOVES, MaintenanceResult, RequestQueue
from worker.queue.message import (
    CELERY_REJECTED,
    DeadLetterCode,
    DeadLetterReason,
    Reserved,
    Unfit,
    for_celery,
    parse,
)
from worker.service import Service
from worker.settler import Settler
from worker.tracing import Recorder, Trace

AHEAD: Final = 0.03  # seconds of work, at most, that are held beyond what can be sent at once
SHARE: Final = 4  # of that, many places are filled at once: when one part in so many is free
_SHORTEST: Final = 0.1  # seconds between two ticks that count as such
_SMOOTH: Final = 8  # fetches over which their duration is averaged


class HasCapacity(Protocol):
    """Says how many mails can be sent at once at the moment."""

    @property
    def capacity(self) -> int:
        """How many."""


class Prefetch:
    """Decides how many messages to reserve, by how many mails can be sent soon."""

    def __init__(self, channel: HasCapacity, counters: Counters) -> None:
        self._channel = channel
        self._counters = counters
        self._mails = 0  # that were accepted until the last tick
        self._rate = 0.0  # mails a second, smoothed
        self._ticked = 0.0  # loop time
        self._fetch = 0.0  # seconds from asking for messages until their sends begin, smoothed

    def fetched(self, seconds: float) -> None:
        """So long after messages were asked for, their sends began."""
        self._fetch += (seconds - self._fetch) / _SMOOTH

    def tick(self, now: float) -> None:
        """Once a second, about; `now` is loop time."""
        mails = self._counters.mails
        self._rate += ((mails - self._mails) / max(now - self._ticked, _SHORTEST) - self._rate) / 2
        self._mails, self._ticked = mails, now

    def wanted(self, held: int, *, settling: int) -> int:
        """How many messages to reserve now, with so many in hand, of which some have left their connections already.

        A connection that becomes free finds its next mail here if what is sent in the time of a fetch, twice for good
        measure, is held ahead. More would wait here, while another worker may have connections with nothing to send.
        """
        at_once = self._channel.capacity
        ahead = round(self._rate * min(2 * self._fetch, AHEAD))
        most = at_once + ahead
        unsent = max(held - settling, 0)
        # However slowly outcomes are settled, what is in hand is bounded.
        free = min(most - unsent, 2 * most - held)
        return 0 if unsent >= at_once and free * SHARE < ahead else max(min(free, MAX_MOVES), 0)


BLOCK: Final = 1.0  # seconds of one wait for a message; below the link's time for an answer
LOOK: Final = 0.02  # seconds until an empty queue is looked at again, for what requests that were done may have woken


class Wakeup:
    """Rings once the queue has a message; which stays there."""

    def __init__(self, link: RedisConnection, queue: RequestQueue) -> None:
        """`link`: a connection that may block."""
        self._link = link
        self._queue = queue
        self._waiting: asyncio.Future[list[Any]] | None = None

    async def wait(self, room: asyncio.Event) -> None:
        """Until the queue has a message, BLOCK seconds passed, or `room` tells that something else is worth a look.

        Raises `RedisUnavailable`.
        """
        if self._waiting is None:
            self._waiting = asyncio.ensure_future(self._link.run([self._queue.await_message(BLOCK)]))
        news = asyncio.ensure_future(room.wait())
        both: list[asyncio.Future[Any]] = [self._waiting, news]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not self._waiting.done():
                # The queue is empty: no place that is free again need look at once, trip for trip.
                await asyncio.wait([self._waiting], timeout=LOOK)
        finally:
            news.cancel()
        if self._waiting.done():
            waited, self._waiting = self._waiting, None
            raise_errors(waited.result())

    async def close(self) -> None:
        """Wait no more."""
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.wait([self._waiting])


class CelerySide:
    """What the intake tells Celery's side, in batches. Called on the intake's loop."""

    def received(self, jobs: list[Job]) -> None:
        """These requests are about to be served."""

    def done(self, finished: Finished) -> None:
        """These requests are off this worker's hands."""

    def to_celery(self, message: dict[str, Any]) -> None:
        """This message needs Celery's own machinery; its delivery tag is the reservation's."""

    def is_revoked(self, request_id: str) -> bool:
        """Whether an operator revoked the request."""
        del request_id
        return False

    def give_up(self, reason: str) -> None:
        """The service cannot work at all."""


logger = logging.getLogger(__name__)

SETTLING = 1.0  # seconds that a stopping worker keeps for settling what it has sent
UNHEARD_MOST = 10_000  # tags; those of a few answers, the first of which count, as then there still was a connection
_PAUSE = 0.25  # seconds between tries while Redis is away


class Fetcher:
    """Reserves as many messages as can be sent soon, reads them, and hands them to the service as batches."""

    def __init__(
        self,
        broker: Database,
        waiter: RedisConnection,
        queue: RequestQueue,
        service: Service,
        settler: Settler,
        celery_side: CelerySide,
        counters: Counters,
        prefetch: Prefetch,
        relay_healthy: Callable[[], bool],
        recorder: Recorder | None = None,
    ) -> None:
        """`waiter`: a connection that may block. `recorder`: None: nothing is traced."""
        self._relay_healthy = relay_healthy
        self._broker = broker
        self._wakeup = Wakeup(waiter, queue)
        self.queue = queue
        self._service = service
        self._settler = settler
        self._celery_side = celery_side
        self._counters = counters
        self._prefetch = prefetch
        self._recorder = recorder
        self.held: dict[str, Job] = {}  # by tag: everything in this worker's hands on the fast way
        self._at_celery: dict[str, Job] = {}  # by tag: what went to Celery and is not done
        self._hurried: set[str] = set()  # of these, what Celery runs as soon as it can
        self._for_celery: dict[str, asyncio.Future[ErrorCode | None]] = {}  # by tag: what Celery's task waits for
        self._unheard: list[str] = []  # tags that may have been given in answers that never came
        self._room = asyncio.Event()
        self._consuming = False
        self._suspects = 0
        self._alone = False
        self._serving: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._taking: asyncio.Task[None] | None = None
        self._maintenance: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to tend; messages are taken once `consume` was called."""
        self._taking = asyncio.create_task(self._take())
        parts = (self._broker, self.queue, self._service, self._settler, self._counters)
        tags = lambda: [*self.held, *self._at_celery]  # noqa: E731
        tender = Maintenance(*parts, tags, self._on_maintained, self._relay_healthy)
        self._maintenance = asyncio.create_task(tender.run())

    def _on_maintained(self, result: MaintenanceResult) -> None:
        self._suspects = result.suspects
        self._prefetch.tick(asyncio.get_running_loop().time())
        if result.ready or result.suspects:
            self._room.set()

    def consume(self, *, on: bool) -> None:
        """Take messages, or stop taking."""
        self._consuming = on
        self._room.set()

    def outcome(self) -> None:
        """The settler's word that a request has its outcome: there may be room for the next, before that is settled."""
        if self._wanted() > 0:
            self._room.set()

    def done(self, finished: Finished) -> None:
        """The settler's word that requests are off our hands."""
        held = len(self.held)
        for job, _ in finished:
            self.held.pop(job.tag, None)
        if len(self.held) < held:
            self._alone = self._alone and bool(self.held)
            self._room.set()
        if self._recorder is not None:
            self._recorder.finish(finished)
        if self._for_celery:
            finished = [each for each in finished if not self._tell_celery(*each)]
        self._celery_side.done(finished)

    def _tell_celery(self, job: Job, error: ErrorCode | None) -> bool:
        """Whether Celery's task waits for this request, and so tells the world of it: of a reply, and nothing else."""
        future = self._for_celery.pop(job.tag, None)
        if future is not None and not future.done():
            future.set_result(error)
        return future is not None and error is not None

    async def serve_for_celery(self, tag: str) -> Reply | None:
        """What became of a request whose task Celery runs now; None: it was parked, buried or put back."""
        job = self._at_celery.get(tag)
        if job is None:  # it went back to the queue meanwhile
            return None
        job.through_celery = True
        job.began = asyncio.get_running_loop().time()  # until now it waited for its time
        self.held[tag] = job
        future = self._for_celery[tag] = asyncio.get_running_loop().create_future()
        await self._serve([job], job.began)
        error = await future
        return None if error is None else Reply(job.request.email, error)

    @property
    def load(self) -> int:
        """How many requests are in this worker's hands, on either way."""
        return len(self.held.keys() | self._at_celery.keys())

    async def dead_letter_from_celery(self, tag: str) -> None:
        """A message that Celery rejects becomes a dead letter."""
        self._counters.dead_lettered(CELERY_REJECTED)
        await self.leave_celery(tag, lambda tag: [self.queue.dead_letter(tag, CELERY_REJECTED)])

    async def leave_celery(self, tag: str, command: Callable[[str], list[Command]]) -> None:
        """Celery is done with a message: settle its reservation."""
        self._at_celery.pop(tag, None)
        self._hurried.discard(tag)
        self._room.set()
        try:
            await self._broker.run(command(tag))
        except RedisUnavailable:
            logger.warning("a message that Celery is done with could not be settled; it will be redelivered")

    async def celery_forgot(self) -> None:
        """Celery lost its connection, and with it what it had not begun: that goes back to the queue."""
        tags = [tag for tag, job in self._at_celery.items() if not job.through_celery]
        for tag in tags:
            del self._at_celery[tag]
            self._hurried.discard(tag)
        if tags:
            self._room.set()
            with contextlib.suppress(RedisUnavailable):  # it is redelivered, then
                await self._broker.run([self.queue.release(tags)])

    def revoke(self, tag: str) -> None:
        """Celery will not run this message: its request is answered unsent."""
        job = self._at_celery.get(tag)
        if job is not None:
            self._settler.answer(job, ErrorCode.TIMEOUT, mark=False)

    async def stop(self, seconds: float) -> None:
        """Take nothing more, finish what is in hand within `seconds`, put back the rest if Redis is there."""
        self._stopping = True
        self.consume(on=False)
        with contextlib.suppress(TimeoutError, RedisUnavailable):
            async with asyncio.timeout(seconds):
                if self._taking is not None:
                    await asyncio.wait([self._taking])  # it may have messages on their way
                if self._serving:
                    await asyncio.wait(self._serving)
                await self._service.drain(seconds - SETTLING)
                await self._settler.drain()
                if self._at_celery:
                    tags = list(self._at_celery)
                    self._at_celery.clear()
                    self._hurried.clear()
                    await self._broker.run([self.queue.release(tags)])
        await self._settler.abandon()
        for task in (self._taking, self._maintenance):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        await self._wakeup.close()

    def _wanted(self) -> int:
        """How many messages to reserve now."""
        # What Celery's threads have still to run is in hand too; what waits there for its ETA is not.
        held = len(self.held.keys() | self._hurried) if self._hurried else len(self.held)
        if not self._consuming or self._alone or (self._suspects and held):
            return 0
        return self._prefetch.wanted(held, settling=self._settler.under_way)

    async def _take(self) -> None:
        while not self._stopping:
            wanted = self._wanted()
            self._room.clear()  # what happens while we ask is news
            if wanted <= 0:
                await self._room.wait()
                continue
            try:
                if self._unheard:
                    await self._broker.run([self.queue.release(self._unheard)])
                    self._unheard = []
                more = await self._reserve(wanted)
                if not more:
                    await self._wakeup.wait(self._room)
            except RedisUnavailable:
                await asyncio.sleep(_PAUSE)
            except Exception as exc:  # noqa: BLE001 - whatever it is, the next message is taken
                logger.error("unforeseen error at the intake", extra={"kind": type(exc).__name__})
                await asyncio.sleep(_PAUSE)

    async def _reserve(self, wanted: int) -> bool:
        """Take up to so many messages. Whether to ask again at once; if not, a message is worth waiting for."""
        asked = asyncio.get_running_loop().time()
        command = self.queue.reserve(wanted, held=len(self.held))
        try:
            [answer] = await self._broker.run([command])
        except RedisUnavailable:
            if len(self._unheard) < UNHEARD_MOST:
                self._unheard += self.queue.tags_of(command)
            raise
        raise_errors([answer])
        taken, self._suspects, alone, dead_lettered = self.queue.read_reserve(answer)
        for reason in dead_lettered:
            self._counters.dead_lettered(reason)
        if not self._consuming:  # told so while they were on their way
            await self._broker.run([self.queue.release([reserved.tag for reserved in taken])])
            return True
        jobs = self._read(taken)
        self._alone = alone and bool(jobs)
        if jobs:
            task = asyncio.create_task(self._serve(jobs, asked))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
            self._celery_side.received(jobs)
        return len(taken) + len(dead_lettered) >= wanted or self._suspects > 0

    def _read(self, taken: Iterable[Reserved]) -> list[Job]:
        jobs = []
        now = asyncio.get_running_loop().time()
        for reserved in taken:
            try:
                parsed = parse(reserved)
                message = for_celery(parsed) if parsed.needs_celery else None
            except Exception as exc:  # noqa: BLE001 - no message stops a worker, or the others of its batch
                if isinstance(exc, Unfit):
                    reason = exc.reason
                else:
                    reason = DeadLetterReason(DeadLetterCode.OTHER, f"it cannot be read ({type(exc).__name__})")
                self._settler.dead_letter(Job("", reserved.tag, VerifyRequest(None), None, None), reason)
                continue
            job = parsed.job
            job.began = now
            if self._recorder is not None:
                job.trace = Trace(parsed.envelope["headers"])
            self._counters.taken += 1
            if self._celery_side.is_revoked(job.request_id):
                self._celery_side.received([job])
                self._settler.answer(job, ErrorCode.TIMEOUT, mark=False)
            elif message is not None:
                self._counters.through_celery += 1
                self._at_celery[job.tag] = job
                if not job.scheduled:
                    self._hurried.add(job.tag)
                self._celery_side.to_celery(message)
            else:
                self.held[job.tag] = job
                jobs.append(job)
        return jobs

    async def _serve(self, jobs: list[Job], asked: float) -> None:
        try:
            await self._service.serve(jobs)
            self._prefetch.fetched(asyncio.get_running_loop().time() - asked)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the requests get an answer
            logger.error("unforeseen error in the service", extra={"kind": type(exc).__name__})
            for job in jobs:
                if job.tag in self.held:
                    self._settler.answer(job, ErrorCode.EXCEPTION, mark=True)
