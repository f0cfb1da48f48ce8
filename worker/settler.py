"""Marks, replies and acks of many requests in one round trip.

A request is settled in three steps: the code store records its outcome (the mark), the reply is stored and published,
the message is acked. What finishes during one round trip is settled in the next. Where replies and messages are on one
Redis server, one script stores the reply and acks. If codes are there too, mark and script are one write, executed in
that order: a lost connection leaves a prefix of them, and whoever gets the redelivered message finds what was done.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import orjson

from producer.contract import REPLY_TTL, ErrorCode, reply_key
from producer.errors import StoreUnavailable
from producer.redis.connection import ServerError, Step, entries, run_steps
from producer.redis.protocol import kind_of
from producer.redis.scripts import EACH, Arg, Command, Script
from producer.store.codes import (
    FAILED,
    UNKNOWN,
    Answered,
    Claim,
    CodeStore,
    Conflict,
    IssueRequest,
    Outcome,
    Refusal,
    Result,
    Settled,
    StoreError,
)
from worker.databases import Database, Databases
from worker.gathering import Gathering
from worker.job import Finished, Job
from worker.metrics import Counters
from worker.queue.commands import INDEX, MAX_MOVES, UNACKED, RequestQueue
from worker.queue.message import DeadLetterReason

logger = logging.getLogger(__name__)

_PAUSE = 0.25  # seconds between tries while Redis is unreachable
_TIMEOUT = 2.0  # seconds for a reply to be stored, before its request makes room for others
_POSTPONED = 1.0  # seconds until a reply that could not be stored is tried again


@dataclass(slots=True)
class Settlement:
    """The steps that are left for one request."""

    job: Job
    error: ErrorCode | None = None  # the answer
    mark: Result | None = None
    refusal: Refusal = ""  # goes with the mark
    ask: bool = False  # the mark is a question too: the request may have another answer already
    mark_refused: bool = False  # the store refused the mark; the other steps do not wait for it
    reply: bool = False
    move: Command | None = None  # delays or dead-letters the message in place of an ack
    ack: bool = False
    until: float = 0.0  # loop time; see _TIMEOUT

    @property
    def marked(self) -> bool:
        """Whether the reply and what follows need not wait for the mark."""
        return self.mark is None or self.mark_refused

    @property
    def finished(self) -> bool:
        return not self.reply and self.move is None and not self.ack and self.marked

    def mark_decides(self) -> bool:
        """Whether the reply depends on how the mark is answered: another holder may have taken over a lapsed lease."""
        if self.marked:
            return False
        lease = self.job.lease_until
        lapsed = 0 < lease <= asyncio.get_running_loop().time()
        return self.ask or (lapsed and self.error not in {None, ErrorCode.SUCCESS})

    def drop_reply(self) -> None:
        """Nothing is answered: another holder does, or this one later."""
        self.reply, self.error, self.ack = False, None, False


_ANSWER = Script(EACH, Path(__file__).parent / "queue" / "answer.lua")


def answer_requests(items: Iterable[Settlement], *, broker: int | None) -> Command:
    """Store and publish replies, those of REDIS_ERR only the latter. Ack, where that is left, if the reply was taken.

    `broker`: the number of the messages' database on the same server; None: nothing is acked. The answer has for each
    1 if it is the first reply to its id, else 0, or an error; last, 1 if the messages are removed, else 0 or an error.
    """
    now = datetime.now(UTC).isoformat()
    keys = [UNACKED, INDEX]
    arguments: list[Arg] = ["" if broker is None else broker]
    for item in items:
        if item.error is not None:
            keys.append(reply_key(item.job.request_id))
            life = "" if item.error is ErrorCode.REDIS_ERR else REPLY_TTL
            arguments += (life, reply_payload(item.job, item.error, now), item.job.tag if item.ack else "")
    return _ANSWER(keys, arguments)


def reply_payload(job: Job, error: ErrorCode, date_done: str) -> bytes:
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
        # Only the standard library writes these "addresses": a lone surrogate, an integer beyond 64 bits.
        return json.dumps(meta).encode()


_Work = tuple[Awaitable[Any], Callable[[Any], None]]  # one step for a batch, and what applies its result


class Settler:
    """Takes each request's outcome and makes it known.

    A step that Redis does not take is repeated. A reply that cannot be stored does not hold up other requests: its
    request is delayed for a second, and whoever gets it then finds in the code store what was done. A reply of
    REDIS_ERR is not final: it is published, and nothing remembers it, so that the same id asked again is served.
    """

    def __init__(
        self, store: CodeStore, databases: Databases, queue: RequestQueue, counters: Counters, gathering: Gathering
    ) -> None:
        self._store = store
        self._databases = databases
        self._queue = queue
        self._counters = counters
        self._gathering = gathering
        connections = (store.connection, databases.results.connection, databases.broker.connection)
        self._one_write = all(connection is connections[0] for connection in connections)
        # Where replies and messages are on one server: the number of the messages' database.
        self._joined = databases.broker.number if connections[1] is connections[2] else None
        self.on_outcome: Callable[[], None] = lambda: None  # called when a request needs no relay connection any more
        self.on_settled: list[Callable[[Finished], None]] = []  # called once a trip
        self._pending: list[Settlement] = []
        self._in_trip = 0  # how many requests the present round trip settles
        self._to_wake: list[str] = []
        self._perhaps_leased: list[tuple[float, Claim]] = []  # until (loop time), by an `issue` that was not answered
        self._freeing: asyncio.Task[None] | None = None
        self._warned: set[str] = set()  # of what, since a trip without a refusal
        self._refused = False  # whether this trip met a refusal
        self._flushing: asyncio.Task[None] | None = None

    @property
    def under_way(self) -> int:
        """How many outcomes are not settled yet."""
        return len(self._pending) + self._in_trip

    def answer(self, job: Job, error: ErrorCode, *, mark: bool, refusal: Refusal = "") -> None:
        """Give the request its final answer.

        `mark`: the code store does not know it yet. `refusal`: how a relay refused the mailbox for good, if one did.
        """
        ack = not job.through_celery
        self._add(Settlement(job, error, error if mark else None, refusal, reply=True, ack=ack))

    def retry(self, job: Job, delay: float, *, unknown: bool) -> None:
        """Schedule the next try in `delay` seconds. `unknown`: a relay may have accepted the mail."""
        self._counters.retries += 1
        self._add(Settlement(job, mark=UNKNOWN if unknown else FAILED, move=self._delay(job, delay)))

    def wait(self, job: Job, delay: float) -> None:
        """Delay the request until another send, which decides about it, is settled; at most `delay` seconds."""
        self._add(Settlement(job, move=self._delay(job, delay)))

    def store_unavailable(self, job: Job) -> None:
        """The code store could not be asked for this request."""
        if self._one_write:
            # Then no reply can be stored either. The request is served once Redis is back; as `issue` may have been
            # executed all the same, its lease and its charge are given back.
            self.retry(job, 0.0, unknown=False)
        else:
            self._perhaps_leased.append((asyncio.get_running_loop().time() + self._store.lease, job.claim))
            self.answer(job, ErrorCode.REDIS_ERR, mark=False)

    def free_leases(self) -> None:
        """Free what `issue` may have taken for requests that were answered REDIS_ERR; called every second.

        Otherwise the same ids asked again would wait for these leases to expire.
        """
        now = asyncio.get_running_loop().time()
        self._perhaps_leased = [(until, claim) for until, claim in self._perhaps_leased if until > now]
        if self._perhaps_leased and (self._freeing is None or self._freeing.done()):
            self._freeing = asyncio.create_task(self._free_leases())

    def dead_letter(self, job: Job, reason: DeadLetterReason, *, answer: ErrorCode | None = None) -> None:
        """Dead-letter the message. With `answer`, give its request that answer first, unless it has one."""
        job.dead_lettered = True
        self._counters.dead_lettered(reason)
        ask = answer is not None
        self._add(Settlement(job, answer, answer, ask=ask, reply=ask, move=self._queue.dead_letter(job.tag, reason)))

    async def drain(self) -> None:
        """Wait until everything is settled."""
        while self._flushing is not None:
            await asyncio.shield(self._flushing)

    async def abandon(self) -> None:
        """Stop trying."""
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.wait([self._flushing])

    async def _free_leases(self) -> None:
        leased, self._perhaps_leased = self._perhaps_leased[:MAX_MOVES], self._perhaps_leased[MAX_MOVES:]
        try:
            results = await self._store.settle([Outcome(claim, FAILED) for _, claim in leased])
        except StoreUnavailable:
            self._perhaps_leased += leased
            return
        for (_, claim), result in zip(leased, results, strict=True):
            if isinstance(result, Settled) and result.held:
                self._to_wake += [claim.request_id, *result.wake]
        self._start_flushing()

    def _delay(self, job: Job, seconds: float) -> Command:
        return self._queue.delay_request(job.tag, job.request_id, seconds, job.enqueued_at)

    def _add(self, item: Settlement) -> None:
        item.until = asyncio.get_running_loop().time() + _TIMEOUT
        self._pending.append(item)
        if item.job.trace is not None:
            item.job.trace.settling()
        self.on_outcome()
        self._start_flushing()

    def _start_flushing(self) -> None:
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        try:
            while self._pending or self._to_wake:
                await self._gathering.pause()
                batch, self._pending = self._pending[:MAX_MOVES], self._pending[MAX_MOVES:]
                self._in_trip = len(batch)
                self._refused = False
                try:
                    await self._trip(batch)
                except Exception as exc:  # noqa: BLE001 - whatever it is, the batch must not stay here for ever
                    logger.error("unexpected error in settling", extra={"kind": type(exc).__name__})
                self._announce([item for item in batch if item.finished])
                left = [item for item in batch if not item.finished]
                self._postpone_late(left)
                self._in_trip = 0
                if not left and not self._refused:
                    self._warned.clear()
                if left or self._to_wake:
                    await asyncio.sleep(_PAUSE)
                    self._pending[:0] = left
        finally:
            self._flushing = None

    def _announce(self, items: list[Settlement]) -> None:
        for item in items:
            if item.error is not None:
                self._counters.replied(item.error, item.job.enqueued_at)
        finished = [(item.job, item.error) for item in items]
        for on_settled in self.on_settled if finished else ():
            try:
                on_settled(finished)
            except Exception as exc:  # noqa: BLE001 - the other subscribers and the next batch go on
                logger.error("unexpected error after settling", extra={"kind": type(exc).__name__})

    def _postpone_late(self, left: list[Settlement]) -> None:
        """Delay requests whose reply could not be stored in time. The code store has their final answers for later."""
        now = asyncio.get_running_loop().time()
        for item in left:
            if item.reply and item.until < now:
                self._warn_once("replies cannot be stored, they will be tried again")
                item.drop_reply()
                item.move = self._delay(item.job, _POSTPONED)

    async def _trip(self, batch: list[Settlement]) -> None:
        """Take as many of the batch's steps as possible."""
        undecided = [item for item in batch if item.mark_decides()]
        if undecided:
            await self._take(self._marks([item for item in undecided if not item.ask]))
            await self._take(self._questions([item for item in undecided if item.ask]))
        if self._one_write:
            await self._take(self._marks(batch), self._replies(batch), self._moves(batch))
        else:
            for work_of in (self._marks, self._replies, self._moves):
                await self._take(work_of(batch))

    async def _take(self, *parts: _Work | None) -> None:
        """Take steps; several are one write. If the store or Redis is unavailable, everything stays as it is."""
        work = [part for part in parts if part is not None]
        steps = [step for step, _ in work]
        waking: list[str] = []
        try:
            if len(steps) > 1:  # of one connection
                results = await run_steps(cast("list[Step[Any]]", steps))
            else:
                results = [await step for step in steps]
            for (_, apply), result in zip(work, results, strict=True):
                apply(result)
            if self._to_wake:
                waking, self._to_wake = self._to_wake, []
                self._warn_of(await self._databases.broker.run([self._queue.wake(waking)]))
        except StoreUnavailable:
            # Wake them again, or they wait until the lease of a settled send expires. Twice does no harm.
            self._to_wake = waking + self._to_wake

    def _marks(self, batch: list[Settlement]) -> _Work | None:
        items = [item for item in batch if item.mark is not None and not item.ask]
        outcomes = [Outcome(item.job.claim, item.mark, item.refusal) for item in items if item.mark is not None]
        return (self._store.settle(outcomes), partial(self._marked, items)) if items else None

    def _questions(self, items: list[Settlement]) -> _Work | None:
        requests = [IssueRequest(item.job.claim, "", item.error) for item in items]
        return (self._store.issue(requests), partial(self._marked, items)) if items else None

    def _marked(self, items: list[Settlement], results: Sequence[Any]) -> None:
        self._warn_of(results)
        for item, result in zip(items, results, strict=True):
            match result:
                case StoreError():
                    item.mark_refused = True
                    continue
                case Settled(held, wake):
                    self._to_wake += wake
                    if not held and item.mark_decides():
                        item.drop_reply()
                case Answered(error):
                    item.error = error
                case Conflict():  # of a question: the id is another request's, whose answer this is not
                    item.drop_reply()
                # Of a question, UnknownVersion leaves the answer: the first one that is stored stands.
            item.mark = None

    def _may_follow(self, item: Settlement) -> bool:
        """Whether a step may be taken before it is known how the ones before it were answered."""
        return self._one_write and not item.mark_decides()

    def _replies(self, batch: list[Settlement]) -> _Work | None:
        items = [item for item in batch if item.reply and (item.marked or self._may_follow(item))]
        if not items:
            return None
        command = answer_requests(items, broker=self._joined)

        def apply(answers: list[Any]) -> None:
            *found, removed = entries(answers[0], len(items) + 1)
            self._warn_of([*found, removed])
            for item, entry in zip(items, found, strict=True):
                item.reply = isinstance(entry, ServerError)
                if not item.reply and removed == 1:
                    item.ack = False

        return _step(self._databases.results, [command]), apply

    def _moves(self, batch: list[Settlement]) -> _Work | None:
        items = [item for item in batch if (item.marked and not item.reply) or self._may_follow(item)]
        # Usually none: the script that took the reply has removed the message.
        acked = [item for item in items if item.ack and not item.reply]
        moved = [item for item in items if item.move is not None]
        commands = [self._queue.ack([item.job.tag for item in acked])] if acked else []
        commands += [item.move for item in moved if item.move is not None]

        def apply(answers: list[Any]) -> None:
            self._warn_of(answers)
            if acked and not isinstance(answers.pop(0), ServerError):
                for item in acked:
                    item.ack = False
            for item, answer in zip(moved, answers, strict=True):
                if not isinstance(answer, ServerError):
                    item.move = None

        return (_step(self._databases.broker, commands), apply) if commands else None

    def _warn_of(self, results: Iterable[Any]) -> None:
        """Log the first refusal: what refuses one step usually refuses all of a batch."""
        for result in results:
            if isinstance(result, ServerError | StoreError):
                # A refused mark is tried again with whatever else is; for it alone the caller is not kept waiting.
                kind = result.kind if isinstance(result, StoreError) else kind_of(result)
                self._warn_once("Redis refuses a step, it will be tried again", kind)
                break

    def _warn_once(self, event: str, kind: str = "") -> None:
        """Not for each try: a trip without a refusal comes first."""
        self._refused = True
        if event + kind not in self._warned:
            self._warned.add(event + kind)
            logger.warning(event, extra={"kind": kind} if kind else None)


def _step(database: Database, commands: list[Command]) -> Step[list[Any]]:
    return Step(database.connection, database.number, commands, lambda answers: answers)
