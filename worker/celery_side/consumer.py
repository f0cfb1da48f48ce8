"""Celery's consumer with our service in it: when the service starts and stops, and what happens when Redis refuses."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from typing import Any

from celery import bootsteps
from celery.utils.log import get_logger
from celery.utils.sysinfo import load_average
from celery.worker import heartbeat, pidbox, state
from celery.worker.consumer import consumer, control, heart
from celery.worker.consumer.tasks import Tasks
from redis.exceptions import ResponseError

from worker.celery_side.bridge import Bridge
from worker.contact import CELERY

logger = get_logger(__name__)
# It tells of every try to connect; we tell whether Redis can be used.
get_logger("celery.worker.consumer.connection").setLevel(logging.WARNING)

RETRY_FIRST, RETRY_STEP, RETRY_MOST = 0.2, 0.3, 2.0  # seconds between tries to reach Redis; Celery's own grow to 30
PROVEN = 1.0  # seconds without an error after which a new connection counts as working
_POLL = 0.1  # seconds between two looks for an order to stop
# redis-py keeps the first word of some error replies as `status_code`, and puts words of its own before others.
_KIND = re.compile(r"(?:^|caused error: |errors: )([A-Z]{2,})\b")


class ServiceStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Starts the service before a request can be taken, and stops it before Celery lets go of the queue."""

    requires = (Tasks,)

    def start(self, consumer: Any) -> None:
        """Start the service once; each reconnect only attaches the new consumer."""
        app = consumer.app
        if app.running_bridge is None:
            app.running_bridge = Bridge(app.settings, app.broker_contact)
        consumer.connection.transport.bridge = app.bridge
        app.bridge.attach(consumer)

    def stop(self, consumer: Any) -> None:
        """Stop the service if the worker stops, by signal or remote control; at a reconnect it carries on."""
        if consumer.blueprint.state in {bootsteps.CLOSE, bootsteps.TERMINATE}:
            self.shutdown(consumer)

    def shutdown(self, consumer: Any) -> None:
        """Stop the service. Celery calls this, and not `stop`, on a consumer that waits for Redis."""
        if consumer.app.running_bridge is not None:
            consumer.app.bridge.close()
            consumer.app.running_bridge = None


class Heartbeat(heartbeat.Heart):  # type: ignore[misc]  # Celery ships no types
    """Celery's heartbeat, except that requests held by the service count as active too."""

    def _send(self, event: str, retry: bool = True) -> Any:
        bridge = self.eventer.app.running_bridge
        return self.eventer.send(
            event,
            freq=self.interval,
            active=len(state.active_requests) + (0 if bridge is None else len(bridge.held())),
            processed=state.all_total_count[0],
            loadavg=load_average(),
            retry=retry,
            **state.SOFTWARE_INFO,
        )


class HeartbeatStep(heart.Heart):  # type: ignore[misc]  # Celery ships no types
    def start(self, consumer: Any) -> None:
        consumer.heart = Heartbeat(consumer.timer, consumer.event_dispatcher, self.heartbeat_interval)
        consumer.heart.start()


class Pidbox(pidbox.Pidbox):  # type: ignore[misc]  # Celery ships no types
    """Celery's receiver of control commands, except that an answer which Redis refuses is a lost connection."""

    def on_message(self, body: Any, message: Any) -> None:
        """Run a command, and answer it."""
        self._forward_clock()
        try:
            self.node.handle_message(body, message)
        except KeyError as exc:  # one of kombu's errors of a connection, too
            logger.error("No such control command: %s", exc)
        except self.c.connection_errors:
            raise
        except Exception:  # no command stops the worker
            logger.exception("Control command error")
            self.reset()


class ControlStep(control.Control):  # type: ignore[misc]  # Celery ships no types
    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self.box = Pidbox(consumer)
        self.start, self.stop, self.shutdown = self.box.start, self.box.stop, self.box.shutdown


_REPLACED = (":Heart", ":Control")


class Consumer(consumer.Consumer):  # type: ignore[misc]  # Celery ships no types
    """Celery's consumer with the service, and without gossip and mingle, which cost O(workers^2) messages at start.

    Whatever Redis answers, it waits, says so once, and goes on.
    """

    class Blueprint(consumer.Consumer.Blueprint):  # type: ignore[misc]  # Celery ships no types
        default_steps = (
            *(step for step in consumer.Consumer.Blueprint.default_steps if not str(step).endswith(_REPLACED)),
            HeartbeatStep,
            ControlStep,
            ServiceStep,
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "without_gossip": True, "without_mingle": True})
        self._pause = 0.0  # seconds until the next try
        self._proof: Any = None  # the timer's entry

    def ensure_connected(self, conn: Any) -> Any:
        """As Celery's, but reconnects within two seconds of Redis' return."""
        connected = conn.ensure_connection(
            lambda exc, _interval: self._lost(exc),
            None,
            interval_start=RETRY_FIRST,
            interval_step=RETRY_STEP,
            interval_max=RETRY_MOST,
            callback=state.maybe_shutdown,
        )
        self.first_connection_attempt = False
        return connected

    def on_ready(self) -> None:
        """Consumes from now on. Only time tells whether Redis lets it: it may refuse the subscription yet."""
        super().on_ready()
        self._proof = self.timer.call_after(PROVEN, self._proven)

    def _proven(self) -> None:
        self._pause, self._proof = 0.0, None
        self.app.broker_contact.found(CELERY)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Wait, and return for the next try."""
        self._wait(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """As Celery's, without its lines in the log; waits if the last try failed as well."""
        connection: Any = self.connection
        self.connection: Any = None
        with contextlib.suppress(Exception):
            connection.collect(socket_timeout=RETRY_MOST)
        with contextlib.suppress(*self.connection_errors):
            connection.close()
        if self.hub is not None:
            self.hub.on_tick.clear()  # all of them are this connection's, and Celery would keep them
        self._wait(exc)

    def _wait(self, exc: Exception) -> None:
        """Stands between two tries; Celery itself repeats at once. Raises `SystemExit` if the worker is to stop."""
        self._lost(exc)
        until = time.monotonic() + self._pause
        self._pause = min(self._pause + RETRY_STEP, RETRY_MOST) if self._pause else RETRY_FIRST
        while time.monotonic() < until:
            state.maybe_shutdown()
            time.sleep(_POLL)

    def _lost(self, exc: Exception) -> None:
        if self._proof is not None:
            self.timer.cancel(self._proof)
            self._proof = None
        self.app.broker_contact.lost(CELERY, _kind(exc), exc)


def _kind(exc: Exception) -> str:
    """The first word of an error reply, "" if it was none."""
    for each in (exc, exc.__cause__):  # kombu wraps some
        if status := getattr(each, "status_code", None):
            return str(status)
    found = _KIND.search(str(exc)) if isinstance(exc, ResponseError) else None
    return "" if found is None else found[1]
