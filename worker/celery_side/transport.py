"""Our kombu transport for Redis: Celery's control and events run on it unchanged; requests do not.

Stock kombu takes a request with BRPOP and writes it to `unacked` with a second command; what dies in between loses it.
Here the intake reserves requests, many in one atomic script, on its own connection; a channel that consumes the request
queue only switches that intake on, and hands to Celery the few messages that need Celery's own machinery.
"""

from __future__ import annotations

from typing import Any, Protocol

from kombu.transport import TRANSPORT_ALIASES, redis, virtual

from producer.settings import load_or_exit
from worker.celery_side.redis_urls import sentinel_options


class Tap(Protocol):
    """What the transport needs of the intake. All methods may be called from any thread."""

    queue: str

    def consume(self, *, on: bool) -> None:
        """Take requests, or stop taking."""

    def ack(self, tag: str) -> None:
        """A message that went through Celery is done."""

    def dead_letter(self, tag: str) -> None:
        """A message that Celery rejects becomes a dead letter."""

    def release(self, tag: str) -> None:
        """A message that went to Celery goes back to the queue."""


class QoS(redis.QoS):
    """Messages that went to Celery stay in `unacked` until it is done with them, whatever becomes of its connection.

    Stock kombu puts all of them back when a connection closes, while their tasks still run; and it does so on a
    transport that is half torn down, which ends celery 5.7.0 with an AttributeError (tests/faults/test_redis.py).
    """

    def append(self, message: Any, delivery_tag: str) -> None:
        """The message is in `unacked` already: the script that took it put it there."""
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Done. Through the intake: this channel's connection may be gone by now."""
        self.channel.tap.ack(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Not done. Without `requeue`, Celery cannot make anything of it."""
        (self.channel.tap.release if requeue else self.channel.tap.dead_letter)(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def restore_unacked(self, client: Any = None) -> None:
        """Nothing: the intake puts back what is left when the worker stops."""
        del client
        self._delivered.clear()

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Nothing; see `restore_unacked`."""
        del stderr
        self._on_collect.cancel()
        self._delivered.clear()

    def restore_visible(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing: the intake tends `unacked`, by Redis' clock, and knows who lives."""


class Channel(redis.Channel):
    """A channel on which the request queue is the intake's to read."""

    QoS = QoS

    @property
    def tap(self) -> Tap:
        """The intake of this process."""
        tap = Transport.tap
        if tap is None:
            raise RuntimeError("only a worker consumes requests: celery -A worker.app worker")
        return tap

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any) -> None:
        """As kombu's, but kombu does not poll the request queue."""
        super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
        if Transport.tap is not None and queue == Transport.tap.queue:
            self._active_queues.remove(queue)
            self._update_queue_cycle()
            self.tap.consume(on=True)

    def basic_cancel(self, consumer_tag: str) -> None:
        """As kombu's. A channel that closes with its connection cancels nothing: the intake has its own."""
        queue = self._tag_to_queue.get(consumer_tag)
        if Transport.tap is None or queue != Transport.tap.queue:
            super().basic_cancel(consumer_tag)
            return
        if not self.closed:
            self.tap.consume(on=False)
        # kombu's own would take the queue out of its polling, where it never was.
        self._consumers.discard(consumer_tag)
        self._tag_to_queue.pop(consumer_tag, None)


class Transport(redis.Transport):
    """Set `Transport.tap` before connecting; without it (in Flower, say) this is kombu's own transport."""

    Channel = Channel
    tap: Tap | None = None


class SentinelChannel(Channel, redis.SentinelChannel):
    """The same over a server that sentinels name."""

    @property
    def sentinel_kwargs(self) -> dict[str, Any]:
        """How these are asked; kombu would take it from its options."""
        return sentinel_options(load_or_exit().broker_url)


class SentinelTransport(Transport):
    """The same for such a server. Has the same tap."""

    default_port = redis.SentinelTransport.default_port  # type: ignore[assignment]  # its base says None
    Channel = SentinelChannel


def register() -> None:
    """Let `redis://`, `rediss://` and kombu's `sentinel://` mean these transports in this process."""
    plain = f"{__name__}:{Transport.__name__}"
    TRANSPORT_ALIASES.update(redis=plain, rediss=plain, sentinel=f"{__name__}:{SentinelTransport.__name__}")
