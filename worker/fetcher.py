"""Takes requests off the queue: how many (`Prefetch`), when, and where each goes.

Messages are reserved many at a time, and the service gets those of one reservation as a batch. Of all idle workers one
waits on the queue, and a message wakes no other: the same one while it can take more, so that batches are large. A
message with an ETA waits for it in Redis. One that needs Celery's own machinery (group, callbacks, chain, chord) goes
to Celery instead, whose task hands it to the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

from producer.contract import ErrorCode, Reply
from producer.errors import RedisUnavailable
from producer.redis.connection import RedisConnection, raise_errors
from producer.redis.scripts import Command
from worker.databases import Database
from worker.gathering import Gathering
from worker.job import Finished, Job
from worker.metrics import Counters
from worker.queue.commands import MAX_MOVES, NOTHING_TAKEN, MaintenanceResult, RequestQueue, Waiter
from worker.queue.message import (
    CELERY_REJECTED,
    DeadLetterCode,
    DeadLetterReason,
    Parsed,
    Reserved,
    TooLarge,
    UnfitMessage,
    for_celery,
    parse,
    unreadable_job,
)
from worker.service import Service
from worker.settler import Settler
from worker.tracing import Trace

logger = logging.getLogger(__name__)

SETTLE_TIME: Final = 1.0  # seconds of its last ones in which a stopping worker settles what it has sent
MAX_LOST_TAGS: Final = 10_000  # a few reservations' tags; only the first ones can matter, made while Redis was there
RECHECK_TIME: Final = 0.02  # seconds until a worker that wants few messages asks for them: its sends may be slow
REFUSED_WITHIN: Final = 0.01  # seconds; waits that end sooner and bring nothing do not follow each other sooner
_PAUSE: Final = 0.25  # seconds between tries while Redis is unreachable


class CelerySide(Protocol):
    """What the fetcher needs of Celery. All methods are called on the service's loop."""

    def received(self, jobs: list[Job]) -> None:
        """These requests are about to be served."""

    def done(self, finished: Finished) -> None:
        """This worker does not hold these requests any more."""

    def to_celery(self, message: dict[str, Any]) -> None:
        """Deliver a message to Celery's consumer."""

    def is_revoked(self, request_id: str) -> bool:
        """Whether an operator revoked the request."""

    def give_up(self, reason: str) -> None:
        """End the process: the service cannot work."""


class Fetcher:
    """Reserves as many messages as can be sent soon and hands them to the service, or to Celery."""

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
        gathering: Gathering,
        *,
        traced: bool = False,
    ) -> None:
        """`waiter`: a connection of its own, as it blocks. `traced`: whether each job gets a `Trace`."""
        self._broker = broker
        self._waiter = waiter
        self.queue = queue
        self._service = service
        self._settler = settler
        self._celery_side = celery_side
        self._counters = counters
        self._prefetch = prefetch
        self._gathering = gathering
        self._traced = traced
        self.held: dict[str, Job] = {}  # by tag: what the service has
        self._at_celery: dict[str, Job] = {}  # by tag: what went to Celery and is not done
        self._task_results: dict[str, asyncio.Future[ErrorCode | None]] = {}  # by tag: what Celery's tasks wait for
        self._lost_tags: list[str] = []  # of reservations whose answer was lost: their messages may be ours
        self._changed = asyncio.Event()  # it is worth asking again how many messages are wanted
        self._full = False  # whether the fetcher waits for such a change
        self._waits = Waiter.NONE  # who waits on the queue, as the last reservation found it
        self._in_vain = 0  # waits in a row that ended at once and brought nothing
        self._consuming = False
        self._suspects = 0  # suspected poison messages that wait
        self._alone = False  # the one message held is a suspect: nothing may run beside it
        self._serving: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._fetching: asyncio.Task[None]

    def start(self) -> None:
        """Start the loop that takes messages; it takes none before `consume`."""
        self._fetching = asyncio.create_task(self._fetch_all())

    def consume(self, *, on: bool) -> None:
        self._consuming = on
        self._changed.set()

    async def stop(self, seconds: float) -> None:
        """Take no more, finish what is in hand within `seconds`, put back the rest if Redis is there."""
        self._stopping = True
        self.consume(on=False)
        with contextlib.suppress(TimeoutError, RedisUnavailable):
            async with asyncio.timeout(seconds):
                await asyncio.wait([self._fetching])  # a reservation may be on its way
                if self._serving:
                    await asyncio.wait(self._serving)
                await self._service.drain(seconds - SETTLE_TIME)
                await self._settler.drain()
                await self._put_back(list(self._at_celery))
        await self._settler.abandon()
        self._fetching.cancel()
        await asyncio.wait([self._fetching])

    def tags(self) -> list[str]:
        """The tags of all requests that this worker holds, those at Celery included."""
        return list(self.held | self._at_celery)

    async def _fetch_all(self) -> None:
        more = True  # whether there may be messages that can be taken at once
        while not self._stopping:
            try:
                more = await self._take_part(more)
            except RedisUnavailable:
                more = True
                await asyncio.sleep(_PAUSE)
            except Exception as exc:  # noqa: BLE001 - no error may end the loop
                logger.error("unexpected error in the fetcher", extra={"kind": type(exc).__name__})
                more = True
                await asyncio.sleep(_PAUSE)
        await self._leave_wait()

    async def _take_part(self, more: bool) -> bool:
        """Take messages that are there, or wait for some, or until any are wanted; whether there may be more."""
        if self._lost_tags:
            await self._broker.run([self.queue.release(self._lost_tags)])
            self._lost_tags = []
        self._changed.clear()
        wanted = self._wanted()
        if wanted <= 0:
            await self._leave_wait()
            await self._change()
            return True
        if more:
            return await self._fetch(wanted)
        if self._serving:
            # What comes while a batch is issued makes up the next one.
            await asyncio.wait(self._serving)
            await self._gathering.pause()
            return False
        if wanted < self._prefetch.worth_waiting_for:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECHECK_TIME):
                    await self._change()
                    return False
        if self._waits is Waiter.NONE:
            return await self._fetch(wanted)
        return await self._wait(wanted)

    async def _change(self) -> None:
        self._full = True
        try:
            await self._changed.wait()
        finally:
            self._full = False

    def _wanted(self) -> int:
        # A message that Celery has still to run counts as held.
        held = len(self.held.keys() | self._at_celery.keys()) if self._at_celery else len(self.held)
        if not self._consuming or self._alone or (self._suspects and held):
            return 0
        return self._prefetch.wanted(held, settling=self._settler.under_way)

    async def _fetch(self, wanted: int) -> bool:
        """Take up to `wanted` messages that are there; whether there may be more."""
        asked = asyncio.get_running_loop().time()
        command = self._reservation(wanted, held=len(self.held))
        try:
            [answer] = await self._broker.run([command])
        except RedisUnavailable:
            self._lose(command)
            raise
        return await self._take(answer, wanted, asked)

    async def _wait(self, wanted: int) -> bool:
        """Wait until there are messages and take up to `wanted`; whether there may be more.

        In one trip: the reservation waits in Redis, behind a command that blocks.
        """
        # As if it held some: a suspect runs alone, and this worker may hold others by then.
        command = self._reservation(wanted, held=1)
        block = self.queue.await_message() if self._waits is Waiter.SELF else self.queue.await_turn()
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            answer = await self._waiter.run_muted(block, command)
        except RedisUnavailable:
            self._lose(command)
            raise
        came = loop.time()
        more = await self._take(answer, wanted, came)
        if len(answer) > NOTHING_TAKEN or came - began >= REFUSED_WITHIN:
            self._in_vain = 0
        else:
            self._in_vain += 1
            if self._in_vain > 1:  # the server is full and refuses to block; muted, it cannot say so
                await asyncio.sleep(REFUSED_WITHIN)
        return more

    def _reservation(self, wanted: int, *, held: int) -> Command:
        return self.queue.reserve(wanted, held=held, worth_waiting_for=self._prefetch.worth_waiting_for)

    async def _take(self, answer: Any, wanted: int, asked: float) -> bool:
        """Start what a reservation of `wanted` messages brought; whether there may be more.

        `asked`: loop time at which they were asked for or, if they were waited for, came.
        """
        raise_errors([answer])
        taken, self._suspects, alone, self._waits = self.queue.read_reserve(answer)
        if not self._consuming:  # switched off while the reservation was on its way
            if taken:
                await self._broker.run([self.queue.release([reserved.tag for reserved in taken])])
            return True
        messages = self._read(taken)
        jobs = self._start([each for each in messages if each.eta is None], asked)
        scheduled = [each for each in messages if each.eta is not None]
        self._alone = alone and bool(jobs or scheduled)
        if scheduled:
            self._in_background(self._schedule(scheduled))
        return len(taken) >= wanted or self._suspects > 0

    def _lose(self, command: Command) -> None:
        if len(self._lost_tags) < MAX_LOST_TAGS:
            self._lost_tags += self.queue.tags_of(command)

    async def _leave_wait(self) -> None:
        """Let another worker wait on the queue."""
        if self._waits is Waiter.SELF:
            self._waits = Waiter.NONE
            with contextlib.suppress(RedisUnavailable):
                await self._broker.run([self.queue.reserve(0, held=0, worth_waiting_for=1)])

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    def _read(self, taken: list[Reserved]) -> list[Parsed]:
        """The messages that can be executed, now or later. Answers or dead-letters the others."""
        found = []
        now = asyncio.get_running_loop().time()
        for reserved in taken:
            try:
                parsed = parse(reserved)
                if parsed.needs_celery:
                    parsed.for_celery = for_celery(parsed)
            except TooLarge as exc:
                self._counters.audit.message_too_large(exc.size)
                self._dead_letter_cut(exc, reserved.tag)
                continue
            except UnfitMessage as exc:
                self._dead_letter(unreadable_job(reserved.tag), exc.reason)
                continue
            except Exception as exc:  # noqa: BLE001 - no message may stop the worker, or the rest of its batch
                reason = DeadLetterReason(DeadLetterCode.OTHER, f"it cannot be read ({type(exc).__name__})")
                self._dead_letter(unreadable_job(reserved.tag), reason)
                continue
            job = parsed.job
            job.began = now
            if self._celery_side.is_revoked(job.request_id):
                self._counters.taken += 1
                self._celery_side.received([job])
                self._settler.answer(job, ErrorCode.TIMEOUT, mark=False)
            else:
                found.append(parsed)
        return found

    def _start(self, messages: list[Parsed], asked: float) -> list[Job]:
        """Hand messages that are due to Celery or to the service; the jobs that the service got.

        `asked`: as for `_take`.
        """
        jobs = []
        for parsed in messages:
            job = parsed.job
            self._counters.taken += 1
            if self._traced:
                job.trace = Trace(parsed.envelope["headers"])
            if parsed.for_celery is not None:
                self._counters.through_celery += 1
                self._at_celery[job.tag] = job
                self._celery_side.to_celery(parsed.for_celery)
            else:
                self.held[job.tag] = job
                jobs.append(job)
        if jobs:
            self._in_background(self._serve(jobs, asked))
            self._celery_side.received(jobs)
        return jobs

    async def _schedule(self, messages: list[Parsed]) -> None:
        """Delay messages until their ETA; start those whose ETA has come, by Redis' clock.

        A message that expires before its ETA comes back when it expires, and is answered then.
        """
        self.held.update((each.job.tag, each.job) for each in messages)
        due = [(each.job.tag, min(each.eta or 0.0, each.job.expires_at or math.inf)) for each in messages]
        asked = asyncio.get_running_loop().time()
        try:
            answer = raise_errors(await self._broker.run([self.queue.schedule(due)]))[0]
        except RedisUnavailable:
            logger.warning("requests with an ETA could not be delayed; they will be redelivered")
            answer = [1] * len(messages)
        finally:
            for each in messages:
                del self.held[each.job.tag]
        self._start([each for each, delayed in zip(messages, answer, strict=True) if not delayed], asked)
        self._alone = self._alone and bool(self.held)
        self._changed.set()

    def _dead_letter_cut(self, cut: TooLarge, tag: str) -> None:
        """Dead-letter what is left of a message; answer its caller if the request id was found."""
        job = unreadable_job(tag, cut.request_id)
        if not cut.request_id:
            self._dead_letter(job, cut.reason)
            return
        job.began = asyncio.get_running_loop().time()
        job.validate()
        self._celery_side.received([job])
        self._dead_letter(job, cut.reason, answer=ErrorCode.EXCEPTION)

    def _dead_letter(self, job: Job, reason: DeadLetterReason, *, answer: ErrorCode | None = None) -> None:
        self.held[job.tag] = job  # until it is settled, so that it is renewed and counts against the prefetch
        self._settler.dead_letter(job, reason, answer=answer)

    async def _serve(self, jobs: list[Job], asked: float) -> None:
        try:
            await self._service.serve(jobs)
            self._prefetch.fetched(asyncio.get_running_loop().time() - asked)
        except Exception as exc:  # noqa: BLE001 - every request gets an answer
            logger.error("unexpected error in the service", extra={"kind": type(exc).__name__})
            for job in jobs:
                if job.tag in self.held:
                    self._settler.answer(job, ErrorCode.EXCEPTION, mark=True)

    def outcome(self) -> None:
        """A request has its outcome: its relay connection is free before it is settled."""
        if self._full and self._wanted() > 0:
            self._changed.set()

    def done(self, finished: Finished) -> None:
        """The settler has settled these requests."""
        held = len(self.held)
        for job, _ in finished:
            self.held.pop(job.tag, None)
        if len(self.held) < held:
            self._alone = self._alone and bool(self.held)
            self._changed.set()
        if self._task_results:
            finished = [each for each in finished if not self._resolve_task(*each)]
        self._celery_side.done(finished)

    def on_maintained(self, result: MaintenanceResult) -> None:
        """A round of maintenance has ended."""
        self._suspects = result.suspects
        self._prefetch.tick(asyncio.get_running_loop().time())
        if result.ready or result.suspects:
            self._changed.set()

    async def serve_for_celery(self, tag: str) -> Reply | None:
        """Serve a request as Celery runs its task. None: it was delayed, dead-lettered or put back on the queue."""
        if (job := self._at_celery.get(tag)) is None:  # it has been put back meanwhile
            return None
        job.through_celery = True
        job.began = asyncio.get_running_loop().time()
        self.held[tag] = job
        result = self._task_results[tag] = asyncio.get_running_loop().create_future()
        await self._serve([job], job.began)
        error = await result
        return None if error is None else Reply(job.request.email, error)

    def _resolve_task(self, job: Job, error: ErrorCode | None) -> bool:
        """Hand the outcome to Celery's task, if one waits for it. True: Celery itself sends the event of this reply."""
        result = self._task_results.pop(job.tag, None)
        if result is not None and not result.done():
            result.set_result(error)
        return result is not None and error is not None

    def revoke(self, tag: str) -> None:
        """Celery will not run this message: its request is answered 6, unsent."""
        if (job := self._at_celery.get(tag)) is not None:
            self._settler.answer(job, ErrorCode.TIMEOUT, mark=False)

    async def dead_letter_from_celery(self, tag: str) -> None:
        """Celery rejected the message: dead-letter it."""
        self._counters.dead_lettered(CELERY_REJECTED)
        await self.leave_celery(tag, self.queue.dead_letter(tag, CELERY_REJECTED))

    async def leave_celery(self, tag: str, command: Command) -> None:
        """Celery is done with a message: settle its reservation with `command`."""
        self._at_celery.pop(tag, None)
        self._changed.set()
        try:
            await self._broker.run([command])
        except RedisUnavailable:
            logger.warning("a message that Celery is done with could not be settled; it will be redelivered")

    async def celery_forgot(self) -> None:
        """Celery reconnected and has forgotten the messages it had not started: put them back on the queue."""
        self._changed.set()
        with contextlib.suppress(RedisUnavailable):  # then they are redelivered
            await self._put_back([tag for tag, job in self._at_celery.items() if not job.through_celery])

    async def _put_back(self, tags: list[str]) -> None:
        for tag in tags:
            del self._at_celery[tag]
        if tags:
            await self._broker.run([self.queue.release(tags)])


# Seconds of sending; less would have a second worker take what this one sends in a moment, in batches half as large.
MIN_AHEAD: Final = 0.01
MAX_AHEAD: Final = 0.03  # seconds of sending; more is never held beyond what can be sent at once
REFILL_SHARE: Final = 4  # what is held ahead is refilled when one part in so many is free
_SHORTEST_TICK: Final = 0.1  # seconds; the rate of a shorter time is counted as if over this one
_SMOOTHING: Final = 8  # fetches over which their duration is averaged


class Prefetch:
    """Decides how many messages to reserve, by how many mails can be sent soon.

    A connection that becomes free must find its next mail here. So beyond what can be sent at once, this worker holds
    what it sends during two fetches. More would wait here while another worker may have idle connections.
    """

    def __init__(self, capacity: Callable[[], int], counters: Counters) -> None:
        """`capacity`: how many mails can be sent at once at the moment."""
        self._capacity = capacity
        self._counters = counters
        self._mails = 0  # accepted until the last tick
        self._rate = 0.0  # mails per second, smoothed
        self._ticked = 0.0  # loop time
        self._fetch = 0.0  # seconds from asking for messages until their sends begin, smoothed

    def fetched(self, seconds: float) -> None:
        """A fetch took so long, from asking for the messages until their sends began."""
        self._fetch += (seconds - self._fetch) / _SMOOTHING

    def tick(self, now: float) -> None:
        """Measure the rate; called about once a second. `now`: loop time."""
        mails = self._counters.mails
        self._rate += ((mails - self._mails) / max(now - self._ticked, _SHORTEST_TICK) - self._rate) / 2
        self._mails, self._ticked = mails, now

    @property
    def worth_waiting_for(self) -> int:
        """A worker that wants fewer messages leaves the wait to others: one message a trip is dear."""
        return max((self._capacity() + self._ahead()) // REFILL_SHARE, 1)

    def _ahead(self) -> int:
        return round(self._rate * min(max(2 * self._fetch, MIN_AHEAD), MAX_AHEAD))

    def wanted(self, held: int, *, settling: int) -> int:
        """How many messages to reserve now. `held`: by this worker, of which `settling` need no connection any more."""
        at_once, ahead = self._capacity(), self._ahead()
        most = at_once + ahead
        unsent = max(held - settling, 0)
        # The second bound holds however slowly outcomes are settled.
        free = min(most - unsent, 2 * most - held)
        return 0 if unsent >= at_once and free * REFILL_SHARE < ahead else max(min(free, MAX_MOVES), 0)
