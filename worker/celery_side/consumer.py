"""Celery's consumer with our service in it: when what opens and closes."""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from celery.utils.log import get_logger
from celery.utils.sysinfo import load_average
from celery.worker import heartbeat, state
from celery.worker.consumer import consumer, heart
from celery.worker.consumer.tasks import Tasks

from producer.setting_types import mask_url
from producer.settings import load_or_exit
from worker.celery_side import bridge
from worker.celery_side.bridge import Bridge
from worker.celery_side.transport import Transport

logger = get_logger(__name__)

RETRY_FIRST, RETRY_STEP, RETRY_MOST = 0.2, 0.3, 2.0  # seconds between tries to reach Redis; Celery's own grow to 30


class ServiceStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Opens the service before the first request can be taken, and closes it before Celery lets go of the queue."""

    requires = (Tasks,)

    def __init__(self, _consumer: Any, **_: Any) -> None:
        self._bridge: Bridge | None = None

    def start(self, consumer: Any) -> None:
        """Open once; each reconnect only attaches the new consumer."""
        if self._bridge is None:
            self._bridge = Bridge(load_or_exit())
            self._bridge.open()
            Transport.tap = self._bridge
        self._bridge.attach(consumer)

    def stop(self, consumer: Any) -> None:
        """Close, if the worker stops, by signal or by remote control; at a reconnect, the service goes on."""
        if consumer.blueprint.state in {bootsteps.CLOSE, bootsteps.TERMINATE}:
            self.shutdown(consumer)

    def shutdown(self, _consumer: Any) -> None:
        """Close. Celery stops no step of a consumer that waits for Redis, but shuts all down."""
        if self._bridge is not None:
            Transport.tap = None
            self._bridge.close()


class Pulse(heartbeat.Heart):  # type: ignore[misc]  # Celery ships no types
    """Celery's heartbeats, in which the requests that the service holds are active too."""

    def _send(self, event: str, retry: bool = True) -> Any:
        return self.eventer.send(
            event,
            freq=self.interval,
            active=len(state.active_requests) + bridge.held_by_service(),
            processed=state.all_total_count[0],
            loadavg=load_average(),
            retry=retry,
            **state.SOFTWARE_INFO,
        )


class Heart(heart.Heart):  # type: ignore[misc]  # Celery ships no types
    """Celery's step, with our heartbeats."""

    def start(self, consumer: Any) -> None:
        """Begin to beat."""
        consumer.heart = Pulse(consumer.timer, consumer.event_dispatcher, self.heartbeat_interval)
        consumer.heart.start()


class Consumer(consumer.Consumer):  # type: ignore[misc]  # Celery ships no types
    """Celery's consumer, with the service, and without what costs O(workers^2) messages and a second at start."""

    class Blueprint(consumer.Consumer.Blueprint):  # type: ignore[misc]  # Celery ships no types
        """Celery's steps, and ours."""

        default_steps = (
            *(step for step in consumer.Consumer.Blueprint.default_steps if not str(step).endswith(":Heart")),
            Heart,
            ServiceStep,
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "without_gossip": True, "without_mingle": True})

    def ensure_connected(self, conn: Any) -> Any:
        """As Celery's, but back within two seconds of Redis' return."""
        where = mask_url(load_or_exit().broker_url)  # kombu shows a password where none is set, and no sentinels

        def waiting(exc: Exception, interval: float) -> None:
            logger.error("waiting for Redis at %s (%s), next try in %.1f s", where, type(exc).__name__, interval)

        connected = conn.ensure_connection(
            waiting,
            None,
            interval_start=RETRY_FIRST,
            interval_step=RETRY_STEP,
            interval_max=RETRY_MOST,
            callback=state.maybe_shutdown,
        )
        self.first_connection_attempt = False
        return connected
