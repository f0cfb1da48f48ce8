"""What the log says while the broker database cannot be used: one line a reason, and one when it can be used again.

The service and Celery have connections of their own, and both find out; so both report here.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from producer.redis.protocol import LOGIN_REFUSED
from producer.setting_types import mask_url

logger = logging.getLogger(__name__)

SERVICE, CELERY = "service", "celery"  # whose connections

# By the first word of an error reply: what it means, and what to check.
MEANINGS: Final = {
    "OOM": "its memory is full; raise maxmemory, or look for what fills it",
    "MISCONF": "it could not save its data; look at its log and its disk",
    "READONLY": "it is a replica; does the URL lead to the primary?",
    "NOREPLICAS": "it has fewer replicas than min-replicas-to-write asks for; look at them",
    "MASTERDOWN": "it is a replica that has lost its primary; look at both",
    "LOADING": "it is loading its data",
    "BUSY": "a script keeps it busy; SCRIPT KILL ends one",
    "NOPERM": "its user may not do what a worker does; check the ACL",
    "WRONGTYPE": "a key has another type than it should; does another program use this database?",
    "CLUSTERDOWN": "its cluster is down; Redis Cluster is not supported",
    "MOVED": "Redis Cluster is not supported",
    "ERR": "perhaps it has reached its maxclients, or lacks a command; look at its log",
}
_SETTINGS: Final = "VERIFY_BROKER_URL or VERIFY_REDIS_URL"


class BrokerContact:
    """Whether the service and Celery can use the broker database. May be called on any thread."""

    def __init__(self, url: str) -> None:
        self._where = mask_url(url)
        self._lock = threading.Lock()
        self._waiting = {SERVICE, CELERY}
        self._said: set[str] = set()  # reasons, since it could be used last
        self._before = False  # whether it could be used before

    def lost(self, who: str, kind: str, exc: Exception | None = None) -> None:
        """`kind`: the first word of the error reply, "" if there was none; then `exc` says what happened."""
        with self._lock:
            self._waiting.add(who)
            if kind in self._said:
                return
            self._said.add(kind)
        if kind in LOGIN_REFUSED:
            advice = f"check user and password in {_SETTINGS}, and VERIFY_REDIS_PASSWORD"
            logger.error("Redis at %s refused the login (%s): %s", self._where, kind, advice)
        elif kind:
            meaning = MEANINGS.get(kind, "look at its log")
            logger.error("waiting for Redis at %s, which refuses (%s): %s", self._where, kind, meaning)
        else:
            logger.error("waiting for Redis at %s (%s): check %s", self._where, type(exc).__name__, _SETTINGS)

    def found(self, who: str) -> None:
        """`who` can use it."""
        if who not in self._waiting:
            return
        with self._lock:
            self._waiting.discard(who)
            if self._waiting:
                return
            self._said.clear()
            before, self._before = self._before, True
        logger.info("Redis at %s can be used again, going on" if before else "connected to Redis at %s", self._where)
