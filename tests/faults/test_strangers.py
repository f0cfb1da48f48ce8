"""Many strangers attack the HTTP API: its memory stays within bounds, and it serves everybody else."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from typing import Self

import pytest
from support.api_process import ApiProcess, request_bytes
from support.attacks import Attacker, forget_peak, memory, peak_memory
from support.http_attacks import ATTACKS
from support.process import HOST, ROOM
from support.redis_server import RedisServer

CONNECTIONS = 600
MEGABYTES = 200.0
SECONDS = 8.0
GROWTH = 40.0  # MB
RATE = 50.0  # honest requests a second
P99 = 1.0  # seconds
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process' peak of memory"),
]


class HonestCallers(threading.Thread):
    """So many requests a second, each on a connection of its own, until the end of the block."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._ended = threading.Event()
        self.durations: list[float] = []
        self.failures = 0

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        began, asked = time.monotonic(), []
        while not self._ended.is_set():
            asked.append(asyncio.create_task(self._ask()))
            await asyncio.sleep(max(0.0, began + len(asked) / RATE - time.monotonic()))
        await asyncio.gather(*asked)

    async def _ask(self) -> None:
        began = time.monotonic()
        body = b'{"email": "nobody", "varifycode": "1"}'
        try:
            async with asyncio.timeout(P99 + ROOM):
                reader, writer = await asyncio.open_connection(HOST, self._port)
                writer.write(request_bytes("/check_varifycode", body, "Connection: close"))
                answer = await reader.read()
                writer.close()
            self.failures += b'"error": 1003' not in answer
        except OSError:  # TimeoutError, too
            self.failures += 1
        self.durations.append(time.monotonic() - began)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join(120)

    @property
    def p99(self) -> float:
        return sorted(self.durations)[len(self.durations) * 99 // 100]


@pytest.fixture(scope="module")
def api(redis_server: RedisServer) -> Iterator[ApiProcess]:
    with ApiProcess({"VERIFY_REDIS_URL": redis_server.url()}) as api:
        for path in ("/openapi.json", "/metrics", "/nothing"):
            api.http.get(path)
        with HonestCallers(api.http_port):
            time.sleep(2)
        yield api


@pytest.fixture(scope="module")
def idle(api: ApiProcess) -> float:
    return memory(api.pid)


@pytest.mark.parametrize("name", ATTACKS)
def test_memory_is_bounded_and_others_are_served(api: ApiProcess, idle: float, name: str) -> None:
    forget_peak(api.pid)
    attack = ATTACKS[name]
    with HonestCallers(api.http_port) as honest:
        with Attacker(api.http_port, attack, connections=CONNECTIONS, megabytes=MEGABYTES, seconds=SECONDS) as attacker:
            attacker.process.wait(SECONDS + ROOM)
        growth = peak_memory(api.pid) - idle
    sys.stdout.write(f"{name}: {idle:.0f} MB idle, {growth:+.0f} MB, p99 {honest.p99 * 1000:.0f} ms\n")
    assert growth < GROWTH
    assert honest.failures == 0
    assert honest.p99 < P99 + ROOM
