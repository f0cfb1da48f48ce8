"""A Redis as cloud providers manage it: one host name, which leads to another server after a failover.

Two real servers on addresses of this host, and a hosts file of the test's own: whoever looks the name up reads it.
"""

from __future__ import annotations

import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self

import pytest

from support.process import ROOT, START_TIMEOUT, eventually
from support.redis_server import RedisServer

NAME: Final = "redis.managed.test"
ADDRESSES: Final = ("127.0.0.1", "127.0.0.2")  # Linux answers on all of 127.0.0.0/8

# Python imports this at its start. uvloop looks names up without Python, so its connections get the address.
SITE: Final = f"""
import os, socket

def _lead(host):
    if host in ({NAME!r}, {NAME.encode()!r}):
        with open(os.environ["TEST_HOSTS"]) as file:
            return file.read().strip()
    return host

_getaddrinfo = socket.getaddrinfo
socket.getaddrinfo = lambda host, *args, **kwargs: _getaddrinfo(_lead(host), *args, **kwargs)

try:
    import uvloop
except ImportError:
    pass
else:
    class Loop(uvloop.Loop):
        async def create_connection(self, factory, host=None, *args, **kwargs):
            return await super().create_connection(factory, _lead(host), *args, **kwargs)
    uvloop.Loop = Loop
    uvloop.new_event_loop = Loop
"""


class ManagedRedis:
    """A primary, its replica, and the name. `with ManagedRedis() as redis:` starts both."""

    def __init__(self) -> None:
        # A replica that asks is served at once, and not after the usual five seconds.
        own = ("--repl-diskless-sync-delay", "0")
        self.primary = RedisServer(host=ADDRESSES[0], options=own)
        follow = ("--replicaof", ADDRESSES[0], str(self.primary.port))
        self.replica = RedisServer(host=ADDRESSES[1], port=self.primary.port, options=(*own, *follow))
        self._directory = tempfile.TemporaryDirectory(prefix="names-", ignore_cleanup_errors=True)
        self._folder = Path(self._directory.name)
        self._hosts = self._folder / "hosts"
        (self._folder / "sitecustomize.py").write_text(SITE)
        self._stack = ExitStack()

    def url(self) -> str:
        """By the name."""
        return f"redis://{NAME}:{self.primary.port}"

    def environment(self, others: Mapping[str, str] | None = None) -> dict[str, str]:
        """What makes a process look the name up here, with `others`."""
        return {**(others or {}), "PYTHONPATH": f"{self._folder}:{ROOT}", "TEST_HOSTS": str(self._hosts)}

    def resolve_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make this process look the name up here, too."""
        real = socket.getaddrinfo

        def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
            return real(self._hosts.read_text() if host == NAME else host, *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    def lead_to(self, server: RedisServer) -> None:
        """Make the name lead to this server."""
        new = self._folder / "new"
        new.write_text(server.host)
        new.replace(self._hosts)

    def fail_over(self, fault: Callable[[ManagedRedis], object]) -> None:
        """What happens to the primary, the replica's promotion, and the name's new address."""
        if fault is not became_a_replica:
            fault(self)
        with self.replica.client() as client:
            client.replicaof("NO", "ONE")
        if fault is became_a_replica:
            fault(self)
        self.lead_to(self.replica)

    def __enter__(self) -> Self:
        try:
            for server in (self.primary, self.replica):
                self._stack.enter_context(server)
            self.lead_to(self.primary)
            with self.replica.client() as client:
                eventually(lambda: client.info("replication")["master_link_status"] == "up", START_TIMEOUT)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self.primary.resume()
        self._stack.close()
        self._directory.cleanup()


def hangs(redis: ManagedRedis) -> None:
    """The primary answers nothing, and its connections stay."""
    redis.primary.pause()


def dies(redis: ManagedRedis) -> None:
    """The primary ends, and its connections with it."""
    redis.primary.kill()


def became_a_replica(redis: ManagedRedis) -> None:
    """The primary follows the new one: it refuses writes with READONLY, and repeats what the new one publishes."""
    with redis.primary.client() as client:
        client.replicaof(redis.replica.host, redis.replica.port)


def became_stranded(redis: ManagedRedis) -> None:
    """The primary is a replica of nobody it can reach: it refuses writes, answers all else, and hears nothing."""
    with redis.primary.client() as client:
        client.replicaof("127.0.0.3", 1)


FAULTS: Final = (hangs, dies, became_a_replica, became_stranded)
