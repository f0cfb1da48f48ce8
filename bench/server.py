"""Redis as it ships: with an append-only file that is synced every second."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from demo import embedded_redis
from demo.processes import Child

# Those of docker-compose.yml. Its bound of 512 MB is left out, since a million waiting requests need more.
FLAGS: Final = ("--save", "", "--appendonly", "yes", "--appendfsync", "everysec")


def program() -> str:
    """The machine's `redis-server`, or the embedded one."""
    return shutil.which("redis-server") or embedded_redis.embedded()


def start(directory: Path) -> tuple[Child, str]:
    """Start a server that keeps its files in `directory`; its URL. Raises `PartMissing`."""
    return embedded_redis.start(directory, program(), FLAGS)
