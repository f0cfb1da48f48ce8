"""Our kombu transport for Redis: Celery's control and events run on it unchanged, verification requests do not.

Stock kombu takes a message with BRPOP and records it in `unacked` with a second command, so a crash between the two
loses it. Here the fetcher reserves requests, many in one atomic script, on its own connection. A channel that consumes
the request queue only switches the fetcher on, and passes Celery the few messages that need Celery's own machinery.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, ClassVar

from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES, redis, virtual
from redis.exceptions import ConnectionError, RedisError, ResponseError  # noqa: A004 - the one that kombu expects

from producer.setting_types import is_sentinel
from worker.celery_side.bridge import Bridge
from worker.celery_side.connections import Connection, Poller, SSLConnection
from worker.celery_side.redis_urls import sentinel_options


class QoS(redis.QoS):
    """Messages that went to Celery stay in `unacked` until it is done with them, whatever happens to its connection.

    Stock kombu returns all of them to the queue when a connection closes, while their tasks still run; and it does so
    on a half-closed transport, which stops celery 5.7.0 with an AttributeError (tests/faults/test_redis.py).
    """

    restore_at_shutdown = False  # the fetcher returns what is left when the worker stops

    @property
    def _bridge(self) -> Bridge:
        bridge: Bridge | None = self.channel.bridge
        if bridge is None:
            raise RuntimeError("only a worker consumes requests: celery -A worker.app worker")
        return bridge

    def append(self, message: Any, delivery_tag: str) -> None:
        """The message is in `unacked` already: the script that reserved it put it there."""
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Done. This channel's connection may be gone by now; the fetcher has its own."""
        self._bridge.ack(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Not done; without `requeue`, Celery can make nothing of the message."""
        (self._bridge.release if requeue else self._bridge.dead_letter)(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def restore_visible(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing: the worker's maintenance restores from `unacked`, by Redis' clock, and knows which workers live."""


class Channel(redis.Channel):
    """A channel on which kombu does not read the request queue; the fetcher does."""

    QoS = QoS
    connection_class = Connection
    connection_class_ssl = SSLConnection
    bridge: Bridge | None = None  # of a channel that consumes the request queue

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any) -> None:
        super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
        bridge = self.connection.bridge
        if bridge is not None and queue == bridge.queue:
            self._active_queues.remove(queue)
            self._update_queue_cycle()
            self.bridge = bridge  # kept here: a channel outlives its transport
            bridge.consume(on=True)

    def close(self) -> None:
        """As kombu's, which leaves its connections open if Redis refuses to delete what was bound."""
        try:
            super().close()
        except RedisError:
            self.auto_delete_queues.clear()  # the bindings expire
            super().close()

    def basic_cancel(self, consumer_tag: str) -> None:
        """As kombu's. A channel that closes with its connection stops no fetcher, which has its own connection."""
        if self.bridge is None or self._tag_to_queue.get(consumer_tag) != self.bridge.queue:
            super().basic_cancel(consumer_tag)
            return
        if not self.closed:
            self.bridge.consume(on=False)
        # kombu's own method would remove the queue from its polling, where it never was.
        self._consumers.discard(consumer_tag)
        self._tag_to_queue.pop(consumer_tag, None)

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        params: dict[str, Any] = super()._connparams(asynchronous)
        if asynchronous:
            params["connection_class"].polled = True  # kombu has made this class just now
        return params

    def require_primary(self) -> None:
        """Raises `redis.ConnectionError` if the subscription's server is a replica, or does not answer."""
        # Any other refusal is no reason to leave: of memory, of the disk, of the right to do this.
        with suppress(ResponseError), self.conn_or_acquire() as client:
            client.srem(self.keyprefix_queue % ("nothing",), "")  # a write that changes nothing
        # redis-py has tried again, and perhaps on another server.
        if getattr(self.subclient.connection, "outdated", False):
            raise ConnectionError("the subscription's server was left")


class Transport(redis.Transport):
    """kombu's own transport, unless it is given a bridge before the worker consumes from it."""

    # Whatever Redis answers, the connection counts as lost and is made anew. kombu has most error replies among the
    # errors of a channel, after which Celery's worker ends.
    connection_errors = (*redis.Transport.connection_errors, RedisError, OperationalError)
    Channel = Channel
    bridge: Bridge | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()  # type: ignore[assignment]  # kombu's own is no FairCycle either


class SentinelChannel(Channel, redis.SentinelChannel):
    """The same for a Redis that Sentinel manages.

    `sentinel_kwargs` says how sentinels are asked. One value for the whole process: kombu makes channels itself and has
    only its transport options to tell them anything, but `inspect stats` would show the password in those.
    """

    sentinel_kwargs: ClassVar[dict[str, Any]] = {}
    connection_class = redis.SentinelChannel.connection_class  # type: ignore[assignment]  # it leaves a replica, too
    connection_class_ssl = redis.SentinelChannel.connection_class_ssl  # type: ignore[assignment]


class SentinelTransport(Transport):
    default_port = redis.SentinelTransport.default_port  # type: ignore[assignment]  # its base says None
    Channel = SentinelChannel


def register(broker_url: str) -> None:
    """Make `redis://`, `rediss://` and kombu's `sentinel://` mean these transports in this process."""
    plain = f"{__name__}:{Transport.__name__}"
    TRANSPORT_ALIASES.update(redis=plain, rediss=plain, sentinel=f"{__name__}:{SentinelTransport.__name__}")
    if is_sentinel(broker_url):
        SentinelChannel.sentinel_kwargs = sentinel_options(broker_url)
