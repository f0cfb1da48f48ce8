"""The progress of one request: API, queue, worker, relay, reply, each reported as soon as it is known."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from producer.api.demo.task_events import TaskEvents
from producer.api.readiness import Readiness
from producer.contract import ErrorCode

STAGES: Final = ("api", "queue", "worker", "relay", "reply")
# A worker sends both events in one message, right before it turns to the relay.
_STAGE_OF: Final = {"task-received": "worker", "task-started": "relay"}
_RETRIED: Final = "task-retried"  # delayed: until its retry, or until another request's mail is sent
GRACE: Final = 0.3  # seconds after the reply in which events may still come: a worker collects them for 0.05 s
LOOK: Final = 1.0  # seconds between two looks for workers while a request waits
# Replies in which no worker had a part, or so late that its events came long before.
_WITHOUT_EVENTS: Final = frozenset({ErrorCode.REDIS_ERR, ErrorCode.TIMEOUT})

Answer = dict[str, Any]  # `error`, and what else the last line has
Ask = Callable[[], Awaitable[Answer]]


class RequestProgress:
    """Follows one request as its `RequestObserver`. A line has `stage` and `at`, seconds since the request came.

    Each stage is reported once, in order, at times that never go back, whatever clock a worker has. A line with `note`
    says why the request is still where it is: `no worker`, or `again` if an attempt to send it failed for now. The last
    line has `error`.
    """

    def __init__(self, task_events: TaskEvents, readiness: Readiness) -> None:
        self._task_events = task_events
        self._readiness = readiness
        self._began, self._clock = time.perf_counter(), time.time()
        self._lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._request_id = ""
        self._at = self._answered = 0.0
        self._reached = 0  # index in STAGES
        self._at_relay = asyncio.Event()
        self._lines.put_nowait({"stage": STAGES[0], "at": 0.0})

    async def lines(self, ask: Ask) -> AsyncIterator[dict[str, Any]]:
        """Call `ask` and yield what becomes known. Whoever stops reading cancels the request."""
        tasks = [asyncio.create_task(self._ask(ask)), asyncio.create_task(self._watch_workers())]
        try:
            while (line := await self._lines.get()) is not None:
                yield line
        finally:
            self._task_events.forget(self._request_id)
            for task in tasks:
                task.cancel()

    def on_publish(self, request_id: str) -> None:
        self._request_id = request_id
        self._task_events.follow(request_id, self._on_event)

    def on_confirmed(self) -> None:
        self._reach("queue", self._elapsed())

    def answered(self) -> None:
        """The reply is here; what is found out afterwards does not count as its time."""
        self._answered = self._elapsed()

    async def _ask(self, ask: Ask) -> None:
        try:
            await self._task_events.listen()
            answer = await ask()
            if self._request_id and answer["error"] not in _WITHOUT_EVENTS:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GRACE):
                        await self._at_relay.wait()
            self._reach("reply", self._answered, **answer)
        finally:
            self._lines.put_nowait(None)

    async def _watch_workers(self) -> None:
        was_missing = False
        while True:
            await asyncio.sleep(LOOK)
            backlog = (await self._readiness.find()).backlog
            missing = backlog is not None and backlog.workers == 0
            if missing and not was_missing:
                self._note("no worker")
            was_missing = missing

    def _on_event(self, kind: str, timestamp: float) -> None:
        if kind == _RETRIED:
            self._note("again")
        elif kind in _STAGE_OF:
            self._reach(_STAGE_OF[kind], min(timestamp - self._clock, self._elapsed()))
        if self._reached >= STAGES.index("relay"):
            self._at_relay.set()

    def _reach(self, stage: str, at: float, **more: Any) -> None:
        index = STAGES.index(stage)
        if index <= self._reached:
            return
        if stage == "worker" and STAGES[self._reached] == "api":
            self._reach("queue", at)  # a worker took it before Redis' confirmation reached us
        self._reached = index
        self._at = max(self._at, at)
        self._lines.put_nowait({"stage": stage, "at": round(self._at, 6), **more})

    def _note(self, note: str) -> None:
        self._lines.put_nowait({"stage": STAGES[self._reached], "at": round(self._elapsed(), 6), "note": note})

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began
