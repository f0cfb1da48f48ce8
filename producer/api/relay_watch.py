"""Answers early while no worker has a healthy relay: the mail cannot go out now, so waiting for it is pointless.

A caller such as GateServer blocks until it has its answer. The request stays on the queue and the mail goes out later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final

from producer.api.readiness import Readiness
from producer.contract import ErrorCode, Reply
from producer.core.requests import RequestObserver

LOOK_AFTER: Final = 0.1  # seconds that a request waits before anyone looks; most are answered by then
LOOK_EVERY: Final = 0.5  # seconds between two looks while requests wait
ANSWER_AFTER: Final = 0.3  # seconds on the queue, in which a worker can still answer without a mail: 0, 3, 4 or 5


class RelayWatch:
    """Knows, while requests wait, whether every living worker says that none of its relays is healthy."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness
        self.no_relay = False
        self._waits: set[RelayWait] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None

    def wait(self, observer: RequestObserver | None = None) -> RelayWait:
        """The wait of one request, which is also its observer; what it observes goes on to `observer`."""
        return RelayWait(self, observer)

    def add(self, wait: RelayWait) -> None:
        self._waits.add(wait)
        if self._timer is None and self._looking is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_AFTER, self._start_looking)

    def discard(self, wait: RelayWait) -> None:
        self._waits.discard(wait)

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._looking is not None:
            self._looking.cancel()

    def _start_looking(self) -> None:
        self._timer = None
        if self._waits:
            self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        try:
            while self._waits:
                backlog = (await self._readiness.find()).backlog
                self.no_relay = backlog is not None and 0 < backlog.workers <= backlog.unhealthy_workers
                if self.no_relay:
                    for wait in self._waits:
                        wait.shorten()
                await asyncio.sleep(LOOK_EVERY)
        finally:
            self.no_relay = False
            self._looking = None


class RelayWait:
    """One request while it waits for its reply.

    Not `asyncio.timeout`, whose 3 us every request would pay for a case that is rare.
    """

    __slots__ = ("_expired", "_observer", "_queued_at", "_task", "_timer", "_watch")

    def __init__(self, watch: RelayWatch, observer: RequestObserver | None) -> None:
        self._watch = watch
        self._observer = observer
        self._queued_at: float | None = None  # loop time
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False

    async def reply(self, outcome: Awaitable[Reply]) -> Reply:
        """The reply, or `TIMEOUT` soon after the request was queued if no worker has a healthy relay."""
        self._task = asyncio.current_task()
        self._watch.add(self)
        try:
            return await outcome
        except asyncio.CancelledError:
            if self._task is None or not self._expired or self._task.uncancel():
                raise  # the caller has cancelled it
            return Reply(None, ErrorCode.TIMEOUT)
        finally:
            self._watch.discard(self)
            self._task = None
            if self._timer is not None:
                self._timer.cancel()

    def on_publish(self, request_id: str) -> None:
        """Part of `RequestObserver`."""
        if self._observer is not None:
            self._observer.on_publish(request_id)

    def on_confirmed(self) -> None:
        """Part of `RequestObserver`: Redis has the request."""
        self._queued_at = asyncio.get_running_loop().time()
        if self._watch.no_relay:
            self.shorten()
        if self._observer is not None:
            self._observer.on_confirmed()

    def shorten(self) -> None:
        """Answer `ANSWER_AFTER` the request was queued; one that is not queued yet waits on."""
        if self._queued_at is not None and self._task is not None and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._queued_at + ANSWER_AFTER, self._expire)

    def _expire(self) -> None:
        if self._task is not None:
            self._expired = True
            self._task.cancel()
