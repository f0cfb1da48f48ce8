"""A managed Redis fails over behind one host name: all programs follow the name by themselves, within seconds.

docs/high-availability.md has the times.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

import pytest
from support.api_process import ApiProcess
from support.caller import META, QUEUE, address
from support.flower_process import FlowerProcess
from support.managed_redis import FAULTS, ManagedRedis
from support.process import eventually
from support.redis_server import RedisServer
from support.smtp_server import ScriptedServer, running
from support.worker_process import WorkerProcess

from producer.client import VerificationClient
from producer.errors import RedisUnavailable
from producer.settings import Settings

SOON = 90.0  # seconds; it takes a few, Flower up to 20, and a loaded machine longer


@dataclass
class Everything:
    """All programs, by the name."""

    redis: ManagedRedis
    workers: list[WorkerProcess]
    api: ApiProcess
    flower: FlowerProcess

    def pids(self) -> list[int]:
        return [each.pid for each in (*self.workers, self.api, self.flower)]

    def seen_by_flower(self) -> bool:
        """Whether Flower reaches all workers now, and the queue that they serve."""
        asked = time.time()
        found = self.flower.api("/api/workers?refresh=1")
        if any(found.get(worker.name, {}).get("timestamp", 0) < asked for worker in self.workers):
            return False
        queues = self.flower.api("/api/queues/length")["active_queues"]
        return [each["name"] for each in queues] == [QUEUE]


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> Iterator[Everything]:
    with ExitStack() as stack:
        redis = stack.enter_context(ManagedRedis())
        redis.resolve_here(monkeypatch)
        relay = stack.enter_context(running(ScriptedServer()))
        settings = {
            "VERIFY_REDIS_URL": redis.url(),
            "VERIFY_RELAYS": f"smtp://127.0.0.1:{relay.port}",
            "VERIFY_METRICS_BIND": "127.0.0.1:0",
        }
        workers = [WorkerProcess(settings, log_level="INFO") for _ in range(2)]
        everything = Everything(redis, workers, ApiProcess(settings), FlowerProcess(workers[0].environment))
        processes = (*workers, everything.api, everything.flower)
        for each in processes:
            stack.callback(each.close)
            each.environment |= redis.environment()
            each.start(wait=False)
        for each in processes:
            each.wait_until_ready()
        yield everything


@dataclass
class Load:
    """Puts requests on the queue, one after the other, until the end of `with`."""

    client: VerificationClient
    acknowledged: list[tuple[float, str]] = field(default_factory=list)  # when it was asked, and the id
    _end: threading.Event = field(default_factory=threading.Event)

    def _ask(self) -> None:
        while not self._end.wait(0.05):
            asked = time.monotonic()
            with contextlib.suppress(RedisUnavailable):
                self.acknowledged.append((asked, self.client.enqueue(address())))

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end.set()
        self._thread.join()


def errors_of(server: RedisServer, ids: list[str]) -> set[int | None]:
    """The stored replies to these requests; None: there is none yet."""
    with server.client(2) as results:
        stored = results.mget([META + each for each in ids])
    return {each and json.loads(each)["result"]["error"] for each in stored}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_all_programs_follow_the_name(everything: Everything, fault: Callable[[ManagedRedis], object]) -> None:
    api, redis, flower = everything.api, everything.redis, everything.flower
    eventually(everything.seen_by_flower, SOON)
    before = everything.pids()
    with VerificationClient(Settings(redis_url=redis.url(), reply_timeout=60)) as client, Load(client) as load:
        assert client.request(address()).error == 0
        assert api.get_code(address())["error"] == 0
        redis.fail_over(fault)
        led = time.monotonic()
        eventually(lambda: api.get_code(address())["error"] == 0, SOON)
        eventually(lambda: api.call(address()).error == 0, SOON)
        eventually(lambda: client.request(address()).error == 0, SOON)
        for _ in range(10):
            assert (api.get_code(address())["error"], client.request(address()).error) == (0, 0)
        eventually(lambda: api.http.get("/readyz").status_code == 200, SOON)
        eventually(everything.seen_by_flower, SOON)
        known = set(flower.api("/api/tasks"))
        eventually(lambda: set(flower.api("/api/tasks")) - known, SOON)
    assert everything.pids() == before
    ids = [each for asked, each in load.acknowledged if asked > led]
    assert len(ids) > 20
    eventually(lambda: errors_of(redis.replica, ids) == {0}, SOON)
