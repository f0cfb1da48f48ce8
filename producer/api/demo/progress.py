"""One request on its way: door, queue, worker, relay, reply. What is known of it is told as it becomes known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from producer.api.demo.task_events import TaskEvents
from producer.api.readiness import Readiness
from producer.contract import ErrorCode

STATIONS: Final = ("door", "queue", "worker", "relay", "reply")
# A worker tells that it took a request and that it began to serve it in one breath; what follows is the relay's time.
_MEANING: Final = {"task-received": "worker", "task-started": "relay"}
_AGAIN: Final = "task-retried"  # parked: for its next try, or until another request's mail is out
GRACE: Final = 0.3  # seconds after the reply in which events may still come: a worker gathers them for 0.05 s
LOOK: Final = 1.0  # seconds between two looks for workers while a request waits
# Answers without a worker's part in them, or so late that its events came long before.
_UNHEARD: Final = frozenset({ErrorCode.REDIS_ERR, ErrorCode.TIMEOUT})

Answer = dict[str, Any]  # `error`, and what else the last line shall have
Ask = Callable[["RequestProgress"], Awaitable[Answer]]


class RequestProgress:
    """Follows one request (a `RequestObserver`). Its lines have `station` and `at`, seconds since the request came.

    Stations are told once each, in their order, at times that never go back, whatever clock a worker has. A line with a
    `note` tells why the request is still where it is: `no worker`, or `again` when a try to send it failed for now. The
    last line has the `error`.
    """

    def __init__(self, task_events: TaskEvents, readiness: Readiness) -> None:
        self._task_events = task_events
        self._probe = readiness
        self._began, self._clock = time.perf_counter(), time.time()
        self._lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._request_id = ""
        self._at = self._answered = 0.0
        self._reached = 0  # index in STATIONS
        self._heard = asyncio.Event()  # the relay's part is known
        self._lines.put_nowait({"station": STATIONS[0], "at": 0.0})

    async def lines(self, ask: Ask) -> AsyncIterator[dict[str, Any]]:
        """Ask, and tell. Who stops reading takes the question back."""
        tasks = [asyncio.create_task(self._ask(ask)), asyncio.create_task(self._look())]
        try:
            while (line := await self._lines.get()) is not None:
                yield line
        finally:
            self._task_events.forget(self._request_id)
            for task in tasks:
                task.cancel()

    def on_publish(self, request_id: str) -> None:
        """It is about to be pushed, under this id."""
        self._request_id = request_id
        self._task_events.follow(request_id, self._hear)

    def answered(self) -> None:
        """The reply is here; what is still to be found out about it takes none of its time."""
        self._answered = self._elapsed()

    def on_confirmed(self) -> None:
        """Redis has it."""
        self._reach("queue", self._elapsed())

    async def _ask(self, ask: Ask) -> None:
        try:
            await self._task_events.listen()
            answer = await ask(self)
            if self._request_id and answer["error"] not in _UNHEARD:
                await self._rest()
            self._reach("reply", self._answered, **answer)
        finally:
            self._lines.put_nowait(None)

    async def _rest(self) -> None:
        """Events leave a worker later than its reply."""
        try:
            async with asyncio.timeout(GRACE):
                await self._heard.wait()
        except TimeoutError:
            pass

    async def _look(self) -> None:
        """While it waits, see whether anyone is there to serve it."""
        told = False
        while True:
            await asyncio.sleep(LOOK)
            backlog = (await self._probe.find()).backlog
            missing = backlog is not None and backlog.workers == 0
            if missing and not told:
                self._note("no worker")
            told = missing

    def _hear(self, kind: str, stamp: float) -> None:
        if kind == _AGAIN:
            self._note("again")
        elif kind in _MEANING:
            self._reach(_MEANING[kind], min(stamp - self._clock, self._elapsed()))
        if self._reached >= STATIONS.index("relay"):
            self._heard.set()

    def _reach(self, station: str, at: float, **more: Any) -> None:
        index = STATIONS.index(station)
        if index <= self._reached:
            return
        if station == "worker" and STATIONS[self._reached] == "door":
            self._reach("queue", at)  # taken before Redis' word that it was there reached us
        self._reached = index
        self._at = max(self._at, at)
        self._lines.put_nowait({"station": station, "at": round(self._at, 6), **more})

    def _note(self, note: str) -> None:
        line = {"station": STATIONS[self._reached], "at": round(self._elapsed(), 6), "note": note}
        self._lines.put_nowait(line)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began
