"""Where Celery's thread and the service's loop meet.

Celery runs its hub in the main thread: control commands, heartbeats, and messages that need its own machinery. The
service runs on one asyncio loop in a thread of its own. What the loop wants of the hub is posted to a deque, and a pipe
wakes the hub; what Celery wants of the service is called on the loop. A plain request never leaves the loop.
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
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from celery.worker import state

from producer.contract import TASK, Reply
from producer.errors import VerifyError
from producer.settings import Settings
from worker.bootstrap import wire
from worker.celery_side.events import Events
from worker.contact import BrokerContact
from worker.fetcher import Fetcher
from worker.job import Finished, Job
from worker.queue.commands import RequestQueue

logger = logging.getLogger(__name__)

FINISH_WITHIN: Final = 11.0  # seconds that a warm shutdown waits for sends in hand, each of VERIFY_SEND_TIMEOUT at most
CUT_WITHIN: Final = 1.5  # seconds in which a cold shutdown puts back what it can; the rest is redelivered
SWITCH_INTERVAL: Final = 0.0002  # seconds
GC_THRESHOLD: Final = 50_000  # new objects until the next collection; the default of 700 is reached by a few requests
_POLL: Final = 0.1  # seconds between two looks at Celery's state during the shutdown

_T = TypeVar("_T")


class HubPort:
    """What the fetcher needs of Celery (`CelerySide`). Called on the service's loop, unless a method says otherwise."""

    def __init__(self, queue: str, events: Events) -> None:
        self._queue = queue
        self._events = events
        self._consumer: Any = None
        self._posted: deque[dict[str, Any]] = deque()  # messages for Celery's consumer
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def received(self, jobs: list[Job]) -> None:
        """Count the requests, and send their events."""
        state.total_count[TASK] += len(jobs)
        state.all_total_count[0] += len(jobs)
        self._events.received(jobs)

    def done(self, finished: Finished) -> None:
        self._events.done(finished)

    def to_celery(self, message: dict[str, Any]) -> None:
        self._posted.append(message)
        # With more than one, the hub is delivering them, or was woken for the first.
        if len(self._posted) == 1:
            with contextlib.suppress(BlockingIOError):
                os.write(self._writer, b"\0")

    def is_revoked(self, request_id: str) -> bool:
        return request_id in state.revoked

    def give_up(self, reason: str) -> None:
        logger.critical(reason)
        state.should_stop = 1

    def attach(self, consumer: Any) -> bool:
        """Called by Celery's thread with each connected consumer. Whether it replaces an earlier one."""
        replaces, self._consumer = self._consumer is not None, consumer
        self._events.attach(consumer.event_dispatcher)
        # Read once the hub runs, not now: only then does the new channel know whose messages these are.
        consumer.hub.add_reader(self._reader, self.deliver_posted)
        # The hub sleeps for up to seconds. Without this, it would not wake for a signal either.
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return replaces

    def deliver_posted(self) -> None:
        """Called by Celery's thread: deliver to its consumer, through its transport."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 65536)
        while self._posted:
            message = self._posted.popleft()
            try:
                connection = self._consumer.connection
                # None while Celery waits for Redis: at the reconnect, the message returns to the queue.
                if connection is not None:
                    connection.transport._deliver(message, self._queue)  # noqa: SLF001 - as transports do
            except Exception as exc:  # noqa: BLE001 - one failed message must not stop the next
                logger.error("unexpected error in Celery's thread", extra={"kind": type(exc).__name__})


class Bridge:
    """Runs the service's loop in a thread beside Celery's hub, and passes Celery's calls to it."""

    _port: HubPort

    def __init__(self, settings: Settings, broker_contact: BrokerContact) -> None:
        """Start the loop and wire the service on it."""
        self.queue = settings.queue
        self._stopped = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="service", daemon=True)
        # While Celery's thread computes, the loop waits for the interpreter: by default 5 ms, at each reply.
        sys.setswitchinterval(SWITCH_INTERVAL)
        # Imported objects stay, and a request leaves no cycles: spare the garbage collector both.
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD, *gc.get_threshold()[1:])
        self._thread.start()
        self._worker = self._call(wire(settings, self._make_port, broker_contact)).result()

    def _make_port(self, events: Events) -> HubPort:
        self._port = HubPort(self.queue, events)
        return self._port

    # Called by Celery, on its own thread.

    def attach(self, consumer: Any) -> None:
        """Use this connected consumer from now on; Celery makes a new one at each reconnect."""
        if self._port.attach(consumer):
            # The new one has forgotten what the old one had scheduled; with stock kombu, all of it would come again.
            self._call(self._fetcher.celery_forgot())

    def close(self) -> None:
        """Finish what is in hand, put back the rest, end the loop. Celery's order to terminate cuts it short."""
        stopping = self._call(self._worker.stop(CUT_WITHIN if state.should_terminate else FINISH_WITHIN))
        cut_at = math.inf
        while not stopping.done() and time.monotonic() < cut_at:
            concurrent.futures.wait([stopping], timeout=_POLL)
            self._port.deliver_posted()
            if state.should_terminate and cut_at == math.inf:
                cut_at = time.monotonic() + CUT_WITHIN
        with contextlib.suppress(TimeoutError):
            self._call(_cancel_all()).result(timeout=1)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=1)
        self._stopped = True

    def held(self) -> list[Job]:
        """The requests that the service holds and Celery does not know of."""
        return [job for job in list(self._fetcher.held.values()) if not (job.through_celery or job.dead_lettered)]

    # Called by Celery, on any thread.

    def consume(self, *, on: bool) -> None:
        """Start or stop taking requests; does nothing once the service has stopped."""
        if not self._stopped:
            self._loop.call_soon_threadsafe(functools.partial(self._fetcher.consume, on=on))

    def serve(self, tag: str) -> Reply | None:
        """Serve the request that Celery runs as a task. None: it was delayed, dead-lettered or put back."""
        return self._call(self._fetcher.serve_for_celery(tag)).result()

    def ack(self, tag: str) -> None:
        self._call(self._fetcher.leave_celery(tag, RequestQueue.ack([tag])))

    def dead_letter(self, tag: str) -> None:
        self._call(self._fetcher.dead_letter_from_celery(tag))

    def release(self, tag: str) -> None:
        """Return the message to the queue."""
        self._call(self._fetcher.leave_celery(tag, self._fetcher.queue.release([tag])))

    def revoke(self, tag: str) -> None:
        """Celery will not run this message."""
        self._loop.call_soon_threadsafe(self._fetcher.revoke, tag)

    @property
    def _fetcher(self) -> Fetcher:
        if self._stopped:
            raise VerifyError("the worker is stopping")
        return self._worker.fetcher

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


async def _cancel_all() -> None:
    """Cancel all tasks of this loop, and those that their cancelling starts."""
    for _ in range(3):
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
