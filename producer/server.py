"""What both clients hold of every Redis server: how long it may take, and how old it may be."""

from __future__ import annotations

from typing import Any

from producer.link import Link, require_version

REDIS_PATIENCE = 2.6  # seconds until "Redis cannot be reached", which is promised within 3
TOO_LATE = "Redis did not answer in time"


async def check_version(link: Link) -> None:
    """For a connection that was just opened. Raises `ServerTooOld`."""
    [info] = await link.run([("INFO", "server")])
    judge_version(info)


def judge_version(info: Any) -> None:
    """Raises `ServerTooOld`. A user without the right to ask is no reason not to work."""
    if isinstance(info, bytes):
        require_version(info)
