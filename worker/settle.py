"""Marks, replies and acks of many requests in one round trip.

What is finished while one trip is under way leaves with the next. On one server the three databases share a connection,
and a trip's commands are executed in their order, mark, reply, ack: a cut leaves a prefix, and the redelivered message
finds what was done.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from producer.codes import Answered, CodeStore
from producer.contract import REPLY_TTL, ErrorCode, reply_key
from producer.errors import RedisUnavailable
from producer.link import ServerError
from producer.script import Command, Script
from worker.databases import Database, Databases
from worker.job import Finished, Job
from worker.queue import RequestQueue
from worker.tally import Tally

logger = logging.getLogger(__name__)

_REPLY = Script(Path(__file__).parent / "lua" / "reply.lua")
_PAUSE = 0.25  # seconds between tries while Redis is away
_PATIENCE = 2.0  # seconds for a reply to be stored, before its request makes room for others
_PUT_OFF = 1.0  # seconds until a reply that could not be stored is tried again


@dataclass(slots=True)
class _Item:
    """One request on its way out: the steps that are left."""

    job: Job
    mark: Command | None = None
    unmarkable: bool = False  # the mark was refused; the rest need not wait for it
    asks: bool = False  # the mark is a question too: the request may have its answer already
    reply: Command | None = None
    leave: list[Command] = field(default_factory=list)
    ack: bool = False
    error: ErrorCode | None = None
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


class Settler:
    """Takes each request's outcome and makes it known, in the order mark, reply, ack.

    `on_done` is called once a trip, with the requests that are off this worker's hands by it. A step that Redis does
    not take is repeated. A reply that cannot be stored does not hold up other requests: its own is parked for a second,
    and whoever gets it then finds what was done.
    """

    def __init__(
        self,
        databases: Databases,
        store: CodeStore,
        queue: RequestQueue,
        on_done: Callable[[Finished], None],
        tally: Tally,
    ) -> None:
        self._databases = databases
        self._store = store
        self._queue = queue
        self._on_done = on_done
        self._tally = tally
        self._pending: list[_Item] = []
        self._flushing: asyncio.Task[None] | None = None

    @property
    def one_trip(self) -> bool:
        """Whether a reply need not wait for its mark."""
        return self._databases.one_server

    def answer(self, job: Job, error: ErrorCode, *, mark: bool) -> None:
        """The request's final answer. `mark`: it is news to the store."""
        item = _Item(job, error=error)
        if mark:
            item.mark = self._store.answered(job.claim, error)
        item.reply = _reply(job, error)
        item.ack = not job.through_celery
        self._add(item)

    def retry(self, job: Job, delay: float, *, unknown: bool) -> None:
        """The mail was not sent (`unknown`: may have been): park the request for its next try, in `delay` seconds."""
        self._tally.retries += 1
        item = _Item(job, mark=self._store.unknown(job.claim) if unknown else self._store.failed(job.claim))
        item.leave.append(self._parked(job, delay))
        self._add(item)

    def wait(self, job: Job, delay: float) -> None:
        """Another send decides about this request: park it until that is known, at most `delay` seconds."""
        self._add(_Item(job, leave=[self._parked(job, delay)]))

    def bury(self, job: Job, reason: str, *, answer: ErrorCode | None = None) -> None:
        """The message becomes a dead letter; with `answer`, its request is answered so first."""
        item = _Item(job, leave=[self._queue.bury(job.tag, reason)])
        job.buried = True
        self._tally.buried(reason)
        if answer is not None:
            item.error = answer
            item.mark, item.asks = self._store.issue(job.claim, "", verdict=answer), True
            item.reply = _reply(job, answer)
        self._add(item)

    def release(self, job: Job) -> None:
        """Put the message back on the queue."""
        self._add(_Item(job, leave=[self._queue.release([job.tag])]))

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
        return self._queue.park(job.tag, job.request_id, delay, job.enqueued_at)

    def _add(self, item: _Item) -> None:
        item.until = asyncio.get_running_loop().time() + _PATIENCE
        self._pending.append(item)
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        try:
            while self._pending:
                batch, self._pending = self._pending, []
                left = await self._trip(batch)
                if left:
                    await asyncio.sleep(_PAUSE)
                    self._pending[:0] = left
        finally:
            self._flushing = None

    async def _trip(self, batch: list[_Item]) -> list[_Item]:
        """One round trip for all of `batch`; what is not finished."""
        await self._confirm(batch)
        stages = (self._marks, self._replies, self._leaves)
        if self._databases.one_server:
            # Gathered coroutines start in their order, so their writes leave in it.
            await asyncio.gather(*(stage(batch) for stage in stages))
        else:
            for stage in stages:
                await stage(batch)
        finished: Finished = []
        left, now = [], asyncio.get_running_loop().time()
        for item in batch:
            if item.marked and item.reply is None and not item.leave and not item.ack:
                if item.error is not None:
                    self._tally.replied(item.error, item.job.enqueued_at)
                finished.append((item.job, item.error))
            else:
                if item.until < now and item.reply is not None:
                    self._put_off(item)
                left.append(item)
        if finished:
            self._on_done(finished)
        return left

    def _put_off(self, item: _Item) -> None:
        """The reply cannot be stored now. The answer is remembered: whoever has the request next only replies."""
        logger.warning("a reply cannot be stored, it will be tried again")
        item.reply, item.error, item.ack = None, None, False
        item.leave = [self._parked(item.job, _PUT_OFF)]

    async def _confirm(self, batch: list[_Item]) -> None:
        """Where the lease has lapsed, another may have taken over: what it finds stands, not what we found."""
        doubtful = [item for item in batch if item.doubtful()]
        if doubtful:
            await self._marks(doubtful)

    async def _marks(self, batch: list[_Item]) -> None:
        items = [item for item in batch if item.mark is not None]
        answers = await _run(self._databases.codes, [item.mark for item in items if item.mark is not None])
        woken: list[str] = []
        for item, answer in zip(items, answers, strict=False):
            if isinstance(answer, ServerError):
                # Tried again with whatever else is tried again; alone it is not worth the caller's waiting.
                item.unmarkable = True
                continue
            if item.asks:
                match self._store.read_issue(answer):
                    case Answered(error) if error is not item.error:
                        item.error, item.reply = error, _reply(item.job, error)
            else:
                ours, wake = self._store.read_settle(answer)
                woken += wake
                if not ours and item.doubtful():
                    item.reply, item.error, item.ack = None, None, False
            item.mark = None
        if woken:
            await _run(self._databases.broker, [self._queue.wake(woken)])

    async def _replies(self, batch: list[_Item]) -> None:
        one_server = self._databases.one_server
        items = [
            item for item in batch if item.reply is not None and (item.marked or (one_server and not item.doubtful()))
        ]
        answers = await _run(self._databases.results, [item.reply for item in items if item.reply is not None])
        for item, answer in zip(items, answers, strict=False):
            if not isinstance(answer, ServerError):
                item.reply = None

    async def _leaves(self, batch: list[_Item]) -> None:
        one_server = self._databases.one_server
        items = [item for item in batch if (item.marked and item.reply is None) or (one_server and not item.doubtful())]
        acked = [item for item in items if item.ack]
        leaving = [item for item in items if item.leave]
        commands = [self._ack(acked)] if acked else []
        commands += [command for item in leaving for command in item.leave]
        answers = await _run(self._databases.broker, commands)
        if not answers:
            return
        if acked and answers.pop(0) == 0:
            for item in acked:
                item.ack = False
        rest = iter(answers)
        for item in leaving:
            refused = [command for command, answer in zip(item.leave, rest, strict=False) if _is_error(answer)]
            item.leave = refused

    def _ack(self, items: list[_Item]) -> Command:
        if not self._databases.one_server:
            return self._queue.ack([item.job.tag for item in items])
        replies = [(item.job.tag, "" if item.error is None else reply_key(item.job.request_id)) for item in items]
        broker, results = self._databases.broker.number, self._databases.results.number
        return self._queue.ack_if_stored(replies, broker=broker, results=results)


def _is_error(answer: object) -> bool:
    return isinstance(answer, ServerError)


async def _run(database: Database, commands: list[Command]) -> list[Any]:
    """The answers, or none if Redis is away."""
    if not commands:
        return []
    try:
        answers = await database.run(commands)
    except RedisUnavailable:
        return []
    for answer in answers:
        if isinstance(answer, ServerError):
            logger.warning("Redis refused a step", extra={"kind": str(answer).partition(" ")[0]})
            break
    return answers


def _reply(job: Job, error: ErrorCode) -> Command:
    payload = reply_payload(job.request_id, job.request.email, error)
    return _REPLY([reply_key(job.request_id)], [payload, REPLY_TTL])


def reply_payload(request_id: str, email: Any, error: ErrorCode) -> bytes:
    """A reply as Celery's Redis backend stores it, so that any Celery client reads it as its task's result."""
    meta: dict[str, Any] = {
        "status": "SUCCESS",
        "result": {"email": email, "error": int(error)},
        "traceback": None,
        "children": [],
        "date_done": datetime.now(UTC).isoformat(),
        "task_id": request_id,
    }
    try:
        return orjson.dumps(meta)
    except TypeError:
        # An "address" that only the standard library can write: a lone surrogate, an integer beyond 64 bits.
        return json.dumps(meta).encode()
