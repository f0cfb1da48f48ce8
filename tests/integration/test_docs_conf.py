"""Real programs accept the lines for redis.conf and sentinel.conf in docs/high-availability.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support import doc_pages as pages
from support.process import HOST
from support.redis_server import RedisServer
from support.sentinel_servers import SERVICE, Sentinel

PAGE = "docs/high-availability.md"
CONF = [block for block in pages.blocks(PAGE) if block.language == "conf"]
REDIS, SENTINEL = (block.text.splitlines() for block in CONF)


def test_a_server_accepts_the_lines_for_redis_conf() -> None:
    words = [line.split() for line in REDIS]
    options = tuple(word for name, value in words for word in (f"--{name}", value))
    with RedisServer(options=options) as server, server.client() as client:
        assert {name: client.config_get(name)[name] for name, _ in words} == dict(words)


def test_a_sentinel_accepts_the_lines_for_sentinel_conf() -> None:
    with RedisServer() as primary:
        sentinel = Sentinel(primary, quorum=1, down_after=1)
        file = Path(sentinel.directory) / "sentinel.conf"
        own = [line for line in file.read_text().splitlines() if not line.startswith("sentinel ")]
        lines = [line.replace("PRIMARY 6379", f"{HOST} {primary.port}") for line in SENTINEL]
        file.write_text("\n".join([*own, *lines]) + "\n")
        with sentinel, sentinel.client() as client:
            state: Any = client.sentinel_masters()[SERVICE]
        assert (state["port"], state["quorum"]) == (primary.port, 2)
        for line in lines[1:]:
            _, name, service, value = line.split()
            assert (service, state[name]) == (SERVICE, int(value))
