"""Celery's connections to a Redis that hangs or has become a replica: its name may lead to another server by now.

redis-py keeps a connection on which each write is refused, and one that only publishes or listens never finds out.
"""

from __future__ import annotations

from collections import Counter
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Final

import redis
from kombu.transport.redis import MultiChannelPoller

CHECK_EVERY: Final = 5.0  # seconds between two looks at a subscription; celeryconfig's `health_check_interval`

if TYPE_CHECKING:
    _Base = redis.Connection
else:
    _Base = object


class BecameReplica(redis.ConnectionError):
    """The server refused a write, and the connection is closed."""

    def __init__(self) -> None:
        super().__init__("the Redis server has become a replica")
        self.status_code = "READONLY"  # where redis-py keeps the first word of an error reply


class _Leaving(_Base):
    """Is dropped when the server says that it is a replica, or says nothing in time.

    The other connections to that name are then made anew before their next use.
    """

    # Times that a name's server was left. One value for the whole process: kombu and Celery make pools themselves.
    _left: ClassVar[Counter[tuple[str, int]]] = Counter()
    _left_before = 0  # when this connection was made
    polled = False  # whether kombu's poller waits for it, and would not notice that it was made anew

    @property
    def outdated(self) -> bool:
        """Whether the name's server was left since this connection was made."""
        return self._left_before != self._left[self.host, self.port]

    def connect(self) -> None:
        """Connect, if it is not connected; a pool does so before each use."""
        if self.outdated and not self.polled:
            self.disconnect()  # type: ignore[no-untyped-call]
        if self._sock is None:
            self._left_before = self._left[self.host, self.port]
        super().connect()  # type: ignore[no-untyped-call]

    def on_connect_check_health(self, check_health: bool = True) -> None:
        try:
            super().on_connect_check_health(check_health)
        except (AttributeError, TypeError, LookupError, ValueError):
            # redis-py expects the answers of a Redis server. Celery's worker would end.
            raise redis.ConnectionError("what answers there is no Redis server") from None

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except redis.ReadOnlyError:
            self._leave()
            raise BecameReplica from None
        except redis.TimeoutError:
            self._leave()
            raise

    def _leave(self) -> None:
        self.disconnect()  # type: ignore[no-untyped-call]
        self._left[self.host, self.port] += 1


class Connection(_Leaving, redis.Connection):
    pass


class SSLConnection(_Leaving, redis.SSLConnection):
    pass


class Poller(MultiChannelPoller):
    """kombu's, which also asks whether a subscription's server is still the primary.

    What a former primary hears from nobody, a subscriber there never learns: it waits for ever.
    """

    _checked_at = 0.0

    def maybe_check_subclient_health(self) -> None:
        """Raises `redis.ConnectionError` or `TimeoutError`, so that all connections are made anew."""
        super().maybe_check_subclient_health()  # type: ignore[no-untyped-call]
        for channel in self._channels:
            if "subclient" in channel.__dict__:  # made when it subscribes
                channel.require_primary()

    def get(self, callback: Any, timeout: float | None = None) -> None:
        """As kombu's, for those without an event loop and its timers, as Flower."""
        if (now := monotonic()) - self._checked_at > CHECK_EVERY:
            self._checked_at = now
            self.maybe_check_subclient_health()
        super().get(callback, timeout)  # type: ignore[no-untyped-call]
