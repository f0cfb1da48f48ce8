"""Marks, replies and acks of many requests in one round trip.

What is finished while one trip is under way leaves with the next. On one server the three databases share a connection,
and a trip's commands are executed in their order, mark, reply, ack: a cut leaves a prefix, and the redelivered message
finds what was done.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from producer.contract import REPLY_TTL, ErrorCode, reply_key
from producer.errors import RedisUnavailable
from producer.redis.connection import ServerError, entries
from producer.redis.scripts import EACH, Command, Script
from producer.store.codes import FAILED, UNKNOWN, Answered, Asked, CodeStore, Outcome
from worker.databases import Database, Databases
from worker.job import Finished, Job
from worker.metrics import Counters
from worker.queue.commands import MAX_MOVES, RequestQueue
from worker.queue.message import DeadLetterReason


@dataclass(slots=True)
class Settlement:
    """One request on its way out: the steps that are left."""

    job: Job
    error: ErrorCode | None = None  # what it is answered
    mark: ErrorCode | Literal["failed", "unknown"] | None = None
    asks: bool = False  # the mark is a question too: the request may have its answer already
    unmarkable: bool = False  # the mark was refused; the rest need not wait for it
    reply: bool = False
    leave: Command | None = None
    ack: bool = False
    until: float = 0.0

    def doubtful(self) -> bool:
        """Whether the mark's answer decides about the reply: the lease has lapsed, so another may have taken over."""
        if self.mark is None or self.unmarkable:
            return False
        lease = self.job.lease_until
        lapsed = 0 < lease <= asyncio.get_running_loop().time()
        return self.asks or (lapsed and self.error not in {None, ErrorCode.SUCCESS})

    @property
    def marked(self) -> bool:
        """Whether reply and leave may follow."""
        return self.mark is None or self.unmarkable

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return not self.reply and self.leave is None and not self.ack and self.marked


_REPLY = Script(EACH, Path(__file__).parent / "queue" / "reply.lua")


def store_replies(answered: Iterable[tuple[Job, ErrorCode]]) -> Command:
    """Store and publish these replies. Answers, for each, 1 if it is the first one to its id, 0, or an error."""
    now = datetime.now(UTC).isoformat()
    pairs = [(reply_key(job.request_id), _payload(job, error, now)) for job, error in answered]
    return _REPLY([key for key, _ in pairs], [REPLY_TTL, *(payload for _, payload in pairs)])


def _payload(job: Job, error: ErrorCode, date_done: str) -> bytes:
    """A reply as Celery's Redis backend stores it."""
    meta: dict[str, Any] = {
        "status": "SUCCESS",
        "result": {"email": job.request.email, "error": int(error)},
        "traceback": None,
        "children": [],
        "date_done": date_done,
        "task_id": job.request_id,
    }
    try:
        return orjson.dumps(meta)
    except TypeError:
        # An "address" that only the standard library can write: a lone surrogate, an integer beyond 64 bits.
        return json.dumps(meta).encode()


logger = logging.getLogger(__name__)

_PAUSE = 0.25  # seconds between tries while Redis is away
_TIMEOUT = 2.0  # seconds for a reply to be stored, before its request makes room for others
_PUT_OFF = 1.0  # seconds until a reply that could not be stored is tried again


class _Step(NamedTuple):
    """What a trip asks of one database, and who reads the answers."""

    database: Database
    commands: list[Command]
    read: Callable[[list[Any]], None]


class Settler:
    """Takes each request's outcome and makes it known, in the order mark, reply, ack.

    `on_outcome` is called when a request has one, and needs no connection to a relay any more; `on_done` once a trip,
    with the requests that are off this worker's hands by it. A step that Redis does
    not take is repeated. A reply that cannot be stored does not hold up other requests: its own is parked for a second,
    and whoever gets it then finds what was done.
    """

    def __init__(
        self,
        databases: Databases,
        store: CodeStore,
        queue: RequestQueue,
        on_done: Callable[[Finished], None],
        on_outcome: Callable[[], None],
        counters: Counters,
    ) -> None:
        self._databases = databases
        self._store = store
        self._queue = queue
        self._on_done = on_done
        self._on_outcome = on_outcome
        self._counters = counters
        self._pending: list[Settlement] = []
        self._leaving = 0  # how many the present trip settles
        self._woken: list[str] = []
        self._flushing: asyncio.Task[None] | None = None

    @property
    def under_way(self) -> int:
        """How many outcomes are not settled yet."""
        return len(self._pending) + self._leaving

    @property
    def one_trip(self) -> bool:
        """Whether a reply need not wait for its mark."""
        return self._databases.one_server

    def answer(self, job: Job, error: ErrorCode, *, mark: bool) -> None:
        """The request's final answer. `mark`: it is news to the store."""
        self._add(Settlement(job, error, error if mark else None, reply=True, ack=not job.through_celery))

    def retry(self, job: Job, delay: float, *, unknown: bool) -> None:
        """The mail was not sent (`unknown`: may have been): park the request for its next try, in `delay` seconds."""
        self._counters.retries += 1
        self._add(Settlement(job, mark=UNKNOWN if unknown else FAILED, leave=self._parked(job, delay)))

    def wait(self, job: Job, delay: float) -> None:
        """Another send decides about this request: park it until that is known, at most `delay` seconds."""
        self._add(Settlement(job, leave=self._parked(job, delay)))

    def dead_letter(self, job: Job, reason: DeadLetterReason, *, answer: ErrorCode | None = None) -> None:
        """The message becomes a dead letter; with `answer`, its request is answered so first."""
        job.dead_lettered = True
        self._counters.dead_lettered(reason)
        asks = answer is not None
        self._add(
            Settlement(job, answer, answer, asks=asks, reply=asks, leave=self._queue.dead_letter(job.tag, reason))
        )

    def release(self, job: Job) -> None:
        """Put the message back on the queue."""
        self._add(Settlement(job, leave=self._queue.release([job.tag])))

    async def drain(self) -> None:
        """Wait until nothing is on its way."""
        while self._flushing is not None:
            await asyncio.shield(self._flushing)

    async def abandon(self) -> None:
        """Stop trying."""
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.wait([self._flushing])

    def _parked(self, job: Job, delay: float) -> Command:
        return self._queue.delay_request(job.tag, job.request_id, delay, job.enqueued_at)

    def _add(self, item: Settlement) -> None:
        item.until = asyncio.get_running_loop().time() + _TIMEOUT
        self._pending.append(item)
        if item.job.trace is not None:
            item.job.trace.leaving()
        self._on_outcome()
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        try:
            while self._pending or self._woken:
                batch, self._pending = self._pending[:MAX_MOVES], self._pending[MAX_MOVES:]
                self._leaving = len(batch)
                try:
                    left = await self._trip(batch)
                except Exception as exc:  # noqa: BLE001 - whatever it is, the requests do not stay in our hands
                    logger.error("unforeseen error in settling", extra={"kind": type(exc).__name__})
                    left = [item for item in batch if not item.finished]
                    with contextlib.suppress(Exception):
                        self._on_done([(item.job, item.error) for item in batch if item.finished])
                self._leaving = 0
                if left or self._woken:
                    await asyncio.sleep(_PAUSE)
                    self._pending[:0] = left
        finally:
            self._flushing = None

    async def _trip(self, batch: list[Settlement]) -> list[Settlement]:
        """One round trip for all of `batch`; what is not finished."""
        # Where the lease has lapsed, another may have taken over: what it finds stands, not what we found.
        doubtful = [item for item in batch if item.doubtful()]
        if doubtful:
            await self._take(self._marks(doubtful))
        stages = (self._marks, self._replies, self._leaves)
        if self._databases.one_server:
            await self._take(*(stage(batch) for stage in stages))
        else:
            for stage in stages:
                await self._take(stage(batch))
        finished: Finished = []
        left, now = [], asyncio.get_running_loop().time()
        for item in batch:
            if item.finished:
                if item.error is not None:
                    self._counters.replied(item.error, item.job.enqueued_at)
                finished.append((item.job, item.error))
            else:
                if item.until < now and item.reply:
                    self._put_off(item)
                left.append(item)
        if finished:
            self._on_done(finished)
        return left

    def _put_off(self, item: Settlement) -> None:
        """The reply cannot be stored now. The answer is remembered: whoever has the request next only replies."""
        logger.warning("a reply cannot be stored, it will be tried again")
        item.reply, item.error, item.ack = False, None, False
        item.leave = self._parked(item.job, _PUT_OFF)

    async def _take(self, *steps: _Step) -> None:
        """Take steps, in one write; several only on one server. Without Redis their items stay as they are."""
        asked = [step for step in steps if step.commands]
        woken: list[str] = []
        try:
            if asked:
                found = await self._databases.run_all([(step.database, step.commands) for step in asked])
                for step, answers in zip(asked, found, strict=True):
                    step.read(answers)
            if self._woken:
                woken, self._woken = self._woken, []
                _warn_of(await self._databases.broker.run([self._queue.wake(woken)]))
        except RedisUnavailable:
            # Not heard: once more, or those who wait for this send wait out its lease. Heard after all, a second time
            # only leaves a note.
            self._woken = woken + self._woken

    def _marks(self, batch: list[Settlement]) -> _Step:
        items = [item for item in batch if item.mark is not None]
        telling = [item for item in items if not item.asks]
        asking = [item for item in items if item.asks]
        commands = []
        if telling:
            commands.append(
                self._store.settle([Outcome(item.job.claim, item.mark) for item in telling if item.mark is not None])
            )
        if asking:
            commands.append(self._store.issue([Asked(item.job.claim, "", item.error) for item in asking]))

        def read(answers: list[Any]) -> None:
            for items, answer in zip([each for each in (telling, asking) if each], answers, strict=True):
                for item, entry in _each(items, answer):
                    self._read_mark(item, entry)

        return _Step(self._databases.codes, commands, read)

    def _read_mark(self, item: Settlement, entry: Any) -> None:
        if isinstance(entry, ServerError):
            # Tried again with whatever else is tried again; alone it is not worth the caller's waiting.
            item.unmarkable = True
            return
        if item.asks:
            match self._store.read_issue(entry):
                case Answered(error):
                    item.error = error
        else:
            ours, wake = self._store.read_settle(entry)
            self._woken += wake
            if not ours and item.doubtful():
                item.reply, item.error, item.ack = False, None, False
        item.mark = None

    def _replies(self, batch: list[Settlement]) -> _Step:
        one_server = self._databases.one_server
        items = [item for item in batch if item.reply and (item.marked or (one_server and not item.doubtful()))]

        answered = [(item.job, item.error) for item in items if item.error is not None]

        def read(answers: list[Any]) -> None:
            for item, entry in _each(items, answers[0]):
                item.reply = isinstance(entry, ServerError)

        return _Step(self._databases.results, [store_replies(answered)] if answered else [], read)

    def _leaves(self, batch: list[Settlement]) -> _Step:
        one_server = self._databases.one_server
        items = [item for item in batch if (item.marked and not item.reply) or (one_server and not item.doubtful())]
        acked = [item for item in items if item.ack]
        leaving = [item for item in items if item.leave is not None]
        commands = [self._ack(acked)] if acked else []
        commands += [item.leave for item in leaving if item.leave is not None]

        def read(answers: list[Any]) -> None:
            _warn_of(answers)
            all_done = answers.pop(0) == 0 if acked else False
            for item in acked:
                if all_done:
                    item.ack = False
                elif not item.reply:
                    # Stored, whatever became of it since: whoever has read a reply may delete it at once.
                    item.ack, item.leave = False, self._queue.ack([item.job.tag])
            for item, answer in zip(leaving, answers, strict=True):
                if not isinstance(answer, ServerError):
                    item.leave = None

        return _Step(self._databases.broker, commands, read)

    def _ack(self, items: list[Settlement]) -> Command:
        tags = [item.job.tag for item in items]
        if not self._databases.one_server:
            return self._queue.ack(tags)
        replies = [reply_key(item.job.request_id) for item in items]
        broker, results = self._databases.broker.number, self._databases.results.number
        return self._queue.ack_if_stored(tags, replies, broker=broker, results=results)


def _each(items: list[Settlement], answer: Any) -> Iterator[tuple[Settlement, Any]]:
    """Each item with what a script answered to it."""
    answers = entries(answer, len(items))
    _warn_of(answers)
    return zip(items, answers, strict=True)


def _warn_of(answers: Iterable[Any]) -> None:
    for answer in answers:
        if isinstance(answer, ServerError):
            logger.warning("Redis refused a step", extra={"kind": str(answer).partition(" ")[0]})
            break
