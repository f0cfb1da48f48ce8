"""Where Celery's thread and the service's loop meet.

Celery runs its hub in the main thread: control commands, heartbeats, and messages that need its own machinery. The
service runs on one asyncio loop in a thread of its own. Whatever crosses from the loop to the hub lies in one deque,
and a pipe wakes the hub; whatever crosses the other way is called on the loop. No plain request crosses at all.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import logging
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from celery.worker import state

from producer.contract import TASK, Reply
from producer.errors import VerifyError
from producer.settings import Settings
from worker.bootstrap import Worker, wire
from worker.fetcher import CelerySide, Fetcher
from worker.job import Finished, Job
from worker.queue.commands import RequestQueue

logger = logging.getLogger(__name__)

FINISH_WITHIN = 11.0  # seconds a warm shutdown waits for sends in hand; one send takes VERIFY_SEND_TIMEOUT at most
SWITCH_INTERVAL = 0.0002  # seconds
YOUNGEST = 50_000  # objects more than at the last collection bring on the next; usually 700, which a few requests make
CUT_WITHIN = 1.5  # seconds in which a cold one puts back what it can; what is left is redelivered
_BEAT = 0.1  # seconds between two looks at Celery's state while waiting

_T = TypeVar("_T")


class Bridge(CelerySide):
    """Runs the service's loop beside Celery's hub."""

    def __init__(self, settings: Settings) -> None:
        self.queue = settings.queue
        self._settings = settings
        self._worker: Worker | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="service", daemon=True)
        self._inbox: deque[Callable[[], None]] = deque()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._consumer: Any = None

    # Called by Celery, on its own thread.

    def open(self) -> None:
        """Start the loop and wire the service on it."""
        # While Celery's thread computes, the service's loop waits for the interpreter: 5 ms by default, at each reply.
        sys.setswitchinterval(SWITCH_INTERVAL)
        # What is imported stays, and a request leaves no cycles: the collector need not look through both all the time.
        gc.freeze()
        gc.set_threshold(YOUNGEST, *gc.get_threshold()[1:])
        # The hub sleeps until it has something to do, a second and more: without this, in spite of a signal to stop.
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread.start()
        self._worker = self._call(wire(self._settings, self)).result()

    def attach(self, consumer: Any) -> None:
        """A consumer is connected: it gets what lies in the inbox. Called anew at each reconnect."""
        if self._consumer is not None:
            # Celery has forgotten what it had scheduled: with stock kombu, all of it comes again.
            self._call(self._fetcher.celery_forgot())
        self._consumer = consumer
        if self._worker is not None:
            self._worker.events.attach(consumer.event_dispatcher)
        # Read when the hub runs, not now: only then does the new channel know whose messages these are.
        consumer.hub.add_reader(self._reader, self._empty_inbox)

    def close(self) -> None:
        """Finish what is in hand, put back the rest, end the loop. An order to terminate cuts it short."""
        if self._worker is None:
            return
        stopping = self._call(self._worker.stop(CUT_WITHIN if state.should_terminate else FINISH_WITHIN))
        cut_at = math.inf
        while not stopping.done() and time.monotonic() < cut_at:
            concurrent.futures.wait([stopping], timeout=_BEAT)
            self._empty_inbox()
            if state.should_terminate and cut_at == math.inf:
                cut_at = time.monotonic() + CUT_WITHIN
        with contextlib.suppress(TimeoutError):
            self._call(_call_off_all()).result(timeout=1)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=1)
        self._worker = None

    def held(self) -> list[Job]:
        """The requests that the service holds and Celery does not know of."""
        return [job for job in list(self._fetcher.held.values()) if not job.through_celery]

    def _empty_inbox(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 65536)
        while self._inbox:
            try:
                self._inbox.popleft()()
            except Exception as exc:  # noqa: BLE001 - the next one is not this one's
                logger.error("unforeseen error in the inbox", extra={"kind": type(exc).__name__})

    # Called by Celery, on any thread.

    def consume(self, *, on: bool) -> None:
        """Start or stop taking requests; nothing once the service is stopped."""
        if self._worker is not None:
            self._loop.call_soon_threadsafe(functools.partial(self._fetcher.consume, on=on))

    def serve(self, tag: str) -> Reply | None:
        """Serve the request that Celery runs as a task; None: it was parked, buried or put back."""
        reply: Reply | None = self._call(self._fetcher.serve_for_celery(tag)).result()
        return reply

    def ack(self, tag: str) -> None:
        """A message that went to Celery is done."""
        self._call(self._fetcher.leave_celery(tag, lambda tag: [RequestQueue.ack([tag])]))

    def dead_letter(self, tag: str) -> None:
        """A message that Celery rejects becomes a dead letter."""
        self._call(self._fetcher.dead_letter_from_celery(tag))

    def release(self, tag: str) -> None:
        """A message that went to Celery goes back to the queue."""
        queue = self._fetcher.queue
        self._call(self._fetcher.leave_celery(tag, lambda tag: [queue.release([tag])]))

    def revoke(self, tag: str) -> None:
        """Celery will not run this message."""
        self._loop.call_soon_threadsafe(self._fetcher.revoke, tag)

    @property
    def _fetcher(self) -> Fetcher:
        if self._worker is None:
            raise VerifyError("the worker is stopping")
        return self._worker.fetcher

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    # Called by the intake, on the service's loop.

    def received(self, jobs: list[Job]) -> None:
        """Count the requests, and send their events."""
        state.total_count[TASK] += len(jobs)
        state.all_total_count[0] += len(jobs)
        if self._worker is not None:
            self._worker.events.received(jobs)

    def done(self, finished: Finished) -> None:
        """Send the events of requests that are off this worker's hands."""
        if self._worker is not None:
            self._worker.events.done(finished)

    def to_celery(self, message: dict[str, Any]) -> None:
        """Deliver to Celery's consumer, through its transport."""

        def deliver() -> None:
            if self._consumer.connection is None:
                return  # Celery waits for Redis: what it had not begun goes back to the queue then
            self._consumer.connection.transport._deliver(message, self.queue)  # noqa: SLF001 - a transport's own way

        self._post(deliver)

    def is_revoked(self, request_id: str) -> bool:
        """Whether `celery control revoke` named the request."""
        return request_id in state.revoked

    def give_up(self, reason: str) -> None:
        """End the process, with one line."""
        logger.critical(reason)
        state.should_stop = 1

    def _post(self, call: Callable[[], None]) -> None:
        self._inbox.append(call)
        # With more in it, the hub is emptying it, or has been woken for what came before.
        if len(self._inbox) == 1:
            with contextlib.suppress(BlockingIOError):
                os.write(self._writer, b"\0")


async def _call_off_all() -> None:
    """Cancel whatever still runs on this loop, and what comes of that."""
    for _ in range(3):
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
