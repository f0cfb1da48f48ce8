"""Sentinels, a primary and its replicas, all real: to be killed, frozen, cut off and told to change places.

The same programs as in redis_server.py; a sentinel is that server in another mode.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Final, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from support.process import HOST, START_TIMEOUT, eventually
from support.redis_server import RedisServer

SERVICE: Final = "verify"
DOWN_AFTER: Final = 1.0  # seconds of silence after which a sentinel takes a server for dead


class Sentinel(RedisServer):
    """One sentinel, which watches `primary` as SERVICE."""

    def __init__(self, primary: RedisServer, *, quorum: int, down_after: float, password: str = "") -> None:
        """`password`: what the sentinel itself asks for."""
        super().__init__()
        lines = [
            f"bind {HOST}",
            f"port {self.port}",
            f"dir {self.directory}",
            f"sentinel monitor {SERVICE} {HOST} {primary.port} {quorum}",
            f"sentinel down-after-milliseconds {SERVICE} {down_after * 1000:.0f}",
            f"sentinel failover-timeout {SERVICE} 5000",
            f"sentinel parallel-syncs {SERVICE} 1",
        ]
        if primary.password:
            lines.append(f"sentinel auth-pass {SERVICE} {primary.password}")
        if password:
            lines += [f"requirepass {password}", f"sentinel sentinel-pass {password}"]
        self.password = password
        file = self.directory / "sentinel.conf"
        file.write_text("\n".join(lines) + "\n")
        self.command = [self.command[0], str(file), "--sentinel"]


class SentinelServers:
    """Three sentinels, a primary and `replicas`. `with SentinelServers() as redis:` starts all."""

    def __init__(
        self,
        *,
        replicas: int = 1,
        quorum: int = 2,
        down_after: float = DOWN_AFTER,
        password: str = "",
        sentinel_password: str = "",
        options: tuple[str, ...] = (),
    ) -> None:
        """`options` are further words for each server's command line. All keep an append-only file."""
        self._stack = ExitStack()
        # A replica that asks is served at once, and not after the usual five seconds.
        own = ("--repl-diskless-sync-delay", "0", *(("--masterauth", password) if password else ()), *options)
        self.servers = [RedisServer(aof=True, password=password, options=own) for _ in range(replicas + 1)]
        for server in self.servers[1:]:
            server.command += ["--replicaof", HOST, str(self.servers[0].port)]
        self.sentinels = [
            Sentinel(self.servers[0], quorum=quorum, down_after=down_after, password=sentinel_password)
            for _ in range(3)
        ]
        self.password, self.sentinel_password = password, sentinel_password

    def url(self, database: int | None = None) -> str:
        """The service's URL, with a database if one is named."""
        hosts = ",".join(f"{HOST}:{sentinel.port}" for sentinel in self.sentinels)
        who = f":{quote(self.password, safe='')}@" if self.password else ""
        query = f"?sentinel_password={quote(self.sentinel_password, safe='')}" if self.sentinel_password else ""
        return f"redis+sentinel://{who}{hosts}/{SERVICE}" + ("" if database is None else f"/{database}") + query

    @property
    def primary(self) -> RedisServer:
        """Whom the first sentinel that answers names. Raises `LookupError` if none does."""
        for sentinel in self.sentinels:
            if not sentinel.pid:
                continue
            try:
                with sentinel.client(socket_timeout=5) as client:
                    answer: Any = client.execute_command("SENTINEL", "get-master-addr-by-name", SERVICE)
            except redis.RedisError:
                continue
            return next(server for server in self.servers if server.port == int(answer[1]))
        raise LookupError("no sentinel answers")

    @property
    def others(self) -> list[RedisServer]:
        """All servers but the primary."""
        primary = self.primary
        return [server for server in self.servers if server is not primary]

    def client(self, database: int = 0) -> redis.Redis:
        """A client that follows the primary, as any caller in Python has it; never retries."""
        never = Retry(NoBackoff(), 0)
        how = {"password": self.sentinel_password or None, "socket_timeout": 2, "retry": never}
        addresses = [(HOST, sentinel.port) for sentinel in self.sentinels]
        watch = redis.Sentinel(addresses, sentinel_kwargs=how)  # type: ignore[no-untyped-call]
        limits = {"socket_timeout": 5, "socket_connect_timeout": 5, "retry": never}
        client: redis.Redis = watch.master_for(  # type: ignore[no-untyped-call]
            SERVICE, db=database, password=self.password or None, **limits
        )
        return client

    def fail_over(self, *how: str) -> None:
        """A planned one: a sentinel is told to, and has done so."""
        before = self.primary
        with self.sentinels[0].client() as client:
            client.execute_command("SENTINEL", "FAILOVER", SERVICE, *how)
        self.wait_for_another(before)

    def wait_for_another(self, before: RedisServer, within: float = START_TIMEOUT) -> None:
        """Wait until the sentinels name another server than `before`, and it says that it is the primary."""

        def changed() -> bool:
            primary = self.primary
            return primary is not before and role(primary) == "master"

        eventually(changed, within)

    def __enter__(self) -> Self:
        try:
            for server in self.servers:
                self._stack.enter_context(server)
            eventually(lambda: self._in_step(self.servers[0]), START_TIMEOUT)
            for sentinel in self.sentinels:
                self._stack.enter_context(sentinel)
            eventually(self._settled, START_TIMEOUT)
        except BaseException:
            self._stack.close()
            raise
        return self

    def _in_step(self, primary: RedisServer) -> bool:
        with primary.client() as client:
            info = client.info("replication")
        states = [info[f"slave{i}"]["state"] for i in range(9) if f"slave{i}" in info]
        return states == ["online"] * (len(self.servers) - 1)

    def _settled(self) -> bool:
        """Whether each sentinel knows the others and all replicas."""
        for sentinel in self.sentinels:
            with sentinel.client() as client:
                state: Any = client.sentinel_masters()[SERVICE]
            if state["num-other-sentinels"] < 2 or state["num-slaves"] < len(self.servers) - 1:
                return False
        return True

    def __exit__(self, *_exc: object) -> None:
        for server in (*self.servers, *self.sentinels):
            server.resume()
        self._stack.close()


def role(server: RedisServer) -> str:
    """What the server says it is; nothing if it is silent."""
    try:
        with server.client(socket_timeout=5) as client:
            answer: Any = client.execute_command("ROLE")
    except redis.RedisError:
        return ""
    return str(answer[0].decode() if isinstance(answer[0], bytes) else answer[0])
