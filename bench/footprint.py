"""What requests take in Redis, and how many connections there are: `python -m bench.footprint [--count 100000]`.

Bytes are the growth of Redis' `used_memory`, divided by the requests. Connections are counted by CLIENT LIST.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Final

import httpx

from bench import rig
from bench.rig import Rig, say
from bench.sink import Sink
from demo import processes
from producer.aio import AsyncVerificationClient
from producer.store.backlog import DELAYED
from worker.queue.commands import RequestQueue

TIMEOUT: Final = 600.0  # seconds for the longest part
BATCH: Final = 1000  # messages of one reservation
SAMPLES: Final = (  # database, pattern: one key of each kind is looked at
    (0, "code_*"),
    (0, "attempts:*"),
    (0, "cooldown:*"),
    (0, "bucket:*"),
    (0, "request:*"),
    (2, "celery-task-meta-*"),
)


async def queued_and_delayed(rig: Rig, count: int) -> None:
    """Requests that wait for a worker, and requests that wait for their next try."""
    queue = rig.settings().queue
    before = await rig.memory()
    await rig.fill(queue, count)
    say(("queued", f"{(await rig.memory() - before) / count:.0f}"), (30, 8))
    commands = RequestQueue(queue, visibility_timeout=15)
    for start in range(0, count, BATCH):
        [answer] = await rig.ask(commands.reserve(min(BATCH, count - start), held=0), database=1)
        taken = commands.read_reserve(answer).taken
        delayed = [commands.delay_request(each.tag, f"{start + i:036}", 600.0, 1.0) for i, each in enumerate(taken)]
        await rig.ask(*delayed, database=1)
    [held] = await rig.ask(("HLEN", queue + DELAYED), database=1)
    assert held == count, held  # noqa: S101 - else the figure means nothing
    say(("delayed, its queue part", f"{(await rig.memory() - before) / count:.0f}"), (30, 8))
    await rig.ask(("FLUSHALL",))


async def answered(rig: Rig, count: int) -> None:
    """Requests that were answered Success."""
    async with Sink(0) as sink:
        given = {"RELAYS": sink.url, "GIVE_UP_AFTER": "3600", "RESEND_COOLDOWN": "60"}
        with rig.worker(**given):
            await rig.until_workers(rig.settings().queue, 1)
            before = await rig.memory()
            await rig.fill(rig.settings().queue, count)
            async with asyncio.timeout(TIMEOUT):
                await sink.until(count)
            await asyncio.sleep(1)
            say(("answered, all its keys", f"{(await rig.memory() - before) / count:.0f}"), (30, 8))
        sizes = await rig.ask(("DBSIZE",), database=0) + await rig.ask(("DBSIZE",), database=2)
        say(("keys in codes, results", f"{sizes[0]}, {sizes[1]}"), (30, 18))
        for database, pattern in SAMPLES:
            _, keys = (await rig.ask(("SCAN", 0, "MATCH", pattern, "COUNT", 20_000), database=database))[0]
            if keys:
                asked = (("MEMORY", "USAGE", keys[0]), ("PTTL", keys[0]))
                size, life = await rig.ask(*asked, database=database)
                say((pattern, size, f"{life / 1000:.0f} s left"), (30, 8, 12))
    await rig.ask(("FLUSHALL",))


async def connections(rig: Rig) -> None:
    """Who is connected to Redis: nobody else, then one worker, an API server beside it, a client beside them."""

    async def count() -> int:
        [clients] = await rig.ask(("CLIENT", "LIST"))
        return len(clients.splitlines())

    nobody = await count()
    async with Sink(0.05) as sink:
        settings = rig.settings(RELAYS=sink.url)
        with rig.worker(RELAYS=sink.url):
            await rig.until_workers(settings.queue, 1)
            await asyncio.sleep(2)
            say(("a worker, idle", await count() - nobody), (30, 8))
            await rig.fill(settings.queue, 2000)
            await sink.until(1900)
            busy = await count() - nobody
            say(("a worker, busy", busy), (30, 8))
            say(("its connections to the relay", (await sink.count()).most), (30, 8))
            await asyncio.sleep(2)
            before = await count()
            binds = {"HTTP_BIND": "127.0.0.1:0", "GRPC_BIND": "127.0.0.1:0"}
            api = processes.api(rig.directory, rig.environment(**binds), usual=False)
            try:
                where = (await asyncio.to_thread(api.says, r"HTTP API listens on ([\d.:]+)"))[0]
                async with httpx.AsyncClient(base_url=f"http://{where}", trust_env=False, timeout=30) as client:
                    await client.post("/get_varifycode", json={"email": "api@example.com"})
                    await client.post("/check_varifycode", json={"email": "api@example.com", "varifycode": "1"})
                    await client.get("/readyz")
                say(("the API", await count() - before), (30, 8))
            finally:
                await asyncio.to_thread(api.stop)
            before = await count()
            async with AsyncVerificationClient(settings) as asker:
                await asker.request("client@example.com")
                await asker.check("client@example.com", "1")
                say(("a Python client", await count() - before), (30, 8))


def main() -> None:
    """Measure and print the memory of each part."""
    parser = argparse.ArgumentParser(prog="python -m bench.footprint", description="What requests take in Redis.")
    parser.add_argument("--count", type=int, default=100_000, help="of requests")
    count = parser.parse_args().count

    async def all_of_it(rig: Rig) -> None:
        await connections(rig)
        say((f"bytes for each of {count}", ""), (30, 8))
        await queued_and_delayed(rig, count)
        await answered(rig, count)

    rig.run(all_of_it)


if __name__ == "__main__":
    main()
