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

from producer.codes import CodeStore
from producer.contract import REPLY_TTL, ErrorCode, reply_key
from producer.errors import RedisUnavailable
from producer.link import ServerError
from producer.script import Command, Script
from worker.databases import Database, Databases
from worker.job import Job
from worker.queue import RequestQueue

logger = logging.getLogger(__name__)

_REPLY = Script(Path(__file__).parent / "lua" / "reply.lua")
_PAUSE = 0.25  # seconds between tries while Redis is away


@dataclass(slots=True)
class _Item:
    """One request on its way out: the steps that are left."""

    job: Job
    mark: Command | None = None
    unmarkable: bool = False  # the mark was refused; the rest need not wait for it
    reply: Command | None = None
    leave: list[Command] = field(default_factory=list)
    ack: bool = False
    error: ErrorCode | None = None
    until: float = 0.0

    @property
    def marked(self) -> bool:
        """Whether reply and leave may follow."""
        return self.mark is None or self.unmarkable


class Settler:
    """Takes each request's outcome and makes it known, in the order mark, reply, ack.

    `on_done(job, error)` is called when a request is off this worker's hands; error None: it was parked, buried or
    given back. A step that Redis does not take is repeated until the request's visibility has lapsed; whoever gets the
    message then finds what was done.
    """

    def __init__(
        self,
        databases: Databases,
        store: CodeStore,
        queue: RequestQueue,
        on_done: Callable[[Job, ErrorCode | None], None],
        *,
        visibility_timeout: float,
    ) -> None:
        self._databases = databases
        self._store = store
        self._queue = queue
        self._on_done = on_done
        self._visibility_timeout = visibility_timeout
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
        payload = reply_payload(job.request_id, job.request.email, error)
        item.reply = _REPLY([reply_key(job.request_id)], [payload, REPLY_TTL])
        item.ack = not job.through_celery
        self._add(item)

    def retry(self, job: Job, delay: float, *, unknown: bool) -> None:
        """The mail was not sent (`unknown`: may have been): park the request for its next try, in `delay` seconds."""
        item = _Item(job, mark=self._store.unknown(job.claim) if unknown else self._store.failed(job.claim))
        item.leave.append(self._parked(job, delay))
        self._add(item)

    def wait(self, job: Job, delay: float) -> None:
        """Another send decides about this request: park it until that is known, at most `delay` seconds."""
        self._add(_Item(job, leave=[self._parked(job, delay)]))

    def bury(self, job: Job, reason: str, *, answer: ErrorCode | None = None) -> None:
        """The message becomes a dead letter; with `answer`, its request is answered so first."""
        item = _Item(job, leave=[self._queue.bury(job.tag, reason)])
        if answer is not None:
            item.error = answer
            item.mark = self._store.issue(job.claim, "", verdict=answer)
            payload = reply_payload(job.request_id, job.request.email, answer)
            item.reply = _REPLY([reply_key(job.request_id)], [payload, REPLY_TTL])
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
        item.until = asyncio.get_running_loop().time() + self._visibility_timeout
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
        stages = (self._marks, self._replies, self._leaves)
        if self._databases.one_server:
            # Gathered coroutines start in their order, so their writes leave in it.
            await asyncio.gather(*(stage(batch) for stage in stages))
        else:
            for stage in stages:
                await stage(batch)
        left, now = [], asyncio.get_running_loop().time()
        for item in batch:
            if item.marked and item.reply is None and not item.leave and not item.ack:
                self._on_done(item.job, item.error)
            elif item.until < now and (item.ack or item.leave):
                logger.warning("a request could not be settled in time; it will be redelivered")
                self._on_done(item.job, None)
            else:
                left.append(item)
        return left

    async def _marks(self, batch: list[_Item]) -> None:
        items = [item for item in batch if item.mark is not None]
        answers = await _run(self._databases.codes, [item.mark for item in items if item.mark is not None])
        woken: list[str] = []
        for item, answer in zip(items, answers, strict=False):
            if isinstance(answer, ServerError):
                # Tried again with whatever else is tried again; alone it is not worth the caller's waiting.
                item.unmarkable = True
                continue
            item.mark = None
            if isinstance(answer[0], int):
                woken += self._store.read_settle(answer)[1]
        if woken:
            await _run(self._databases.broker, [self._queue.wake(woken)])

    async def _replies(self, batch: list[_Item]) -> None:
        one_server = self._databases.one_server
        items = [item for item in batch if item.reply is not None and (one_server or item.marked)]
        answers = await _run(self._databases.results, [item.reply for item in items if item.reply is not None])
        for item, answer in zip(items, answers, strict=False):
            if not isinstance(answer, ServerError):
                item.reply = None

    async def _leaves(self, batch: list[_Item]) -> None:
        one_server = self._databases.one_server
        items = [item for item in batch if one_server or (item.marked and item.reply is None)]
        acked = [item for item in items if item.ack]
        leaving = [item for item in items if item.leave]
        commands = [self._queue.ack([item.job.tag for item in acked])] if acked else []
        commands += [command for item in leaving for command in item.leave]
        answers = await _run(self._databases.broker, commands)
        if not answers:
            return
        if acked and not isinstance(answers.pop(0), ServerError):
            for item in acked:
                item.ack = False
        rest = iter(answers)
        for item in leaving:
            refused = [command for command, answer in zip(item.leave, rest, strict=False) if _is_error(answer)]
            item.leave = refused


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
