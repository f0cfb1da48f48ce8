"""Celery's consumer with our service in it: when the service starts and stops."""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from celery.utils.log import get_logger
from celery.utils.sysinfo import load_average
from celery.worker import heartbeat, state
from celery.worker.consumer import consumer, heart
from celery.worker.consumer.tasks import Tasks
from redis.exceptions import AuthenticationError

from producer.setting_types import mask_url
from worker.celery_side.bridge import Bridge

logger = get_logger(__name__)

RETRY_FIRST, RETRY_STEP, RETRY_MOST = 0.2, 0.3, 2.0  # seconds between tries to reach Redis; Celery's own grow to 30


class ServiceStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Starts the service before a request can be taken, and stops it before Celery lets go of the queue."""

    requires = (Tasks,)

    def start(self, consumer: Any) -> None:
        """Start the service once; each reconnect only attaches the new consumer."""
        app = consumer.app
        if app.running_bridge is None:
            app.running_bridge = Bridge(app.settings)
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


class Consumer(consumer.Consumer):  # type: ignore[misc]  # Celery ships no types
    """Celery's consumer with the service, and without gossip and mingle, which cost O(workers^2) messages at start."""

    class Blueprint(consumer.Consumer.Blueprint):  # type: ignore[misc]  # Celery ships no types
        default_steps = (
            *(step for step in consumer.Consumer.Blueprint.default_steps if not str(step).endswith(":Heart")),
            HeartbeatStep,
            ServiceStep,
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "without_gossip": True, "without_mingle": True})

    def ensure_connected(self, conn: Any) -> Any:
        """As Celery's, but reconnects within two seconds of Redis' return, and tells a refused login from an outage."""
        # From our settings: kombu's own text shows a password where none is set, and no sentinels.
        where = mask_url(self.app.settings.broker_url)

        def waiting(exc: Exception, interval: float) -> None:
            why = f"waiting for Redis at {where} ({type(exc).__name__}): check VERIFY_REDIS_URL or VERIFY_BROKER_URL"
            if isinstance(exc, AuthenticationError):
                advice = "check user and password in VERIFY_BROKER_URL or VERIFY_REDIS_URL, and VERIFY_REDIS_PASSWORD"
                why = f"Redis at {where} refused the login ({exc.status_code}): {advice}"
            logger.error("%s, next try in %.1f s", why, interval)

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
