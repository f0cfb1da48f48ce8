"""Asking: callers wait for replies, through our asyncio client, through our gRPC API, or at a peer."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from bench import peers
from bench.drain import Parts, usage, used
from bench.peers import Peer
from bench.record import Run, why_void
from bench.rig import Rig
from bench.sink import Sink
from demo import processes

_WARM_CALLERS: Final = 64
_WARM_CALLS: Final = 3000  # through our API; a peer says how many it needs
_WARM_SECONDS: Final = 2.0  # of asking with our client
Load = Callable[[int, float, str], Awaitable[dict[str, Any]]]  # callers, seconds, prefix of the addresses


@dataclass
class Asked:
    """A system that answers requests."""

    system: str
    rig: Rig  # its Redis
    parts: Parts
    warm_up: Callable[[], Awaitable[object]]
    load: Load
    stored: Callable[[], Awaitable[Mapping[str, int]]]
    workers: int
    connections: int
    tls: bool = False  # to the relay


async def measure(sink: Sink, asked: Asked, callers: int, seconds: float, *, number: int, scenario: str = "ask") -> Run:
    """One run: so many callers, for so long."""
    await asked.rig.clear()
    base, load = (await sink.count()).mails, os.getloadavg()[0]
    parts = {**asked.parts, "redis": [asked.rig.redis.pid], "sink": [sink.pid]}
    before = usage(parts)
    found = await asked.load(callers, seconds, f"r{number}c{callers}n")
    cpu = used(before, usage(parts))
    successes = found["answers"].get("0", 0)
    mails = (await sink.count()).mails - base
    others = {f"answers {code}": times for code, times in found["answers"].items() if code != "0"}
    return Run(
        scenario,
        asked.system,
        number,
        sink.latency * 1000,
        callers=callers,
        workers=asked.workers,
        connections=asked.connections,
        tls=asked.tls,
        count=found["count"],
        seconds=found["seconds"],
        latencies={name: round(found[name], 3) for name in ("p50", "p90", "p99")},
        cpu=cpu | {"client": found["cpu"]},
        cpu_count=successes,
        figures=others,
        load=load,
        void=why_void(mails, successes=successes, **await asked.stored()),
    )


@asynccontextmanager
async def ours(
    rig: Rig, relay: str, workers: int, connections: int | None = None
) -> AsyncIterator[tuple[Asked, Asked]]:
    """Workers and the API: by the asyncio client, and through the gRPC API.

    `relay`: a URL. `connections`: of one worker; without it as shipped.
    """
    given = {"RELAYS": relay} | ({} if connections is None else {"RELAY_CONNECTIONS": str(connections)})
    environment = rig.environment(**given)
    most, tls = rig.settings(**given).relay_connections, relay.startswith("smtps:")

    async def stored() -> Mapping[str, int]:
        return (await rig.counts())._asdict()

    with rig.workers(workers, **given) as children:
        api = processes.api(rig.directory, environment, usual=False)
        try:
            [place] = await asyncio.to_thread(api.says, r"gRPC API listens on [\d.]+:(\d+)")
            await rig.until_workers(rig.settings().queue, workers)
            client, port = {"worker": [child.pid for child in children]}, int(place)
            parts = client | {"api": [api.pid]}
            load = partial(asyncio_load, rig)
            warm_up = partial(load, _WARM_CALLERS, _WARM_SECONDS, "warm")
            yield (
                Asked("asyncio", rig, client, warm_up, load, stored, workers, most, tls),
                Asked("api", rig, parts, _calls(port, _WARM_CALLS), _grpc(port), stored, workers, most, tls),
            )
        finally:
            await asyncio.to_thread(api.stop)


@asynccontextmanager
async def theirs(
    rig: Rig, sink: Sink, peer: Peer, workers: int, connections: int, *, tls: bool = False
) -> AsyncIterator[Asked]:
    """A peer that answers gRPC."""

    async def stored() -> Mapping[str, int]:
        found = await asyncio.to_thread(peers.counts, rig.url)
        return {"codes": found.codes} | ({} if peer.name == "old" else {"marks": found.marks})  # it makes no marks

    port, trusted = (sink.tls_port, sink.trusted) if tls else (sink.port, None)
    with peers.running(
        peer, redis_url=rig.url, relay_port=port, connections=connections, processes=workers, trusted=trusted
    ) as running:
        parts = {"server": running.pids}
        warm_up = _calls(running.port, peer.warm_after * workers)  # each process has to become so
        yield Asked(peer.name, rig, parts, warm_up, _grpc(running.port), stored, workers, connections, tls)


async def asyncio_load(
    rig: Rig, callers: int, seconds: float, prefix: str, *, least: int = 0, **given: str
) -> dict[str, Any]:
    """What `bench.load` finds, in a process of its own."""
    words = [str(callers), str(seconds), prefix, str(least)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "bench.load", *words),
        env=rig.environment(**given),
        cwd=processes.CHECKOUT,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        printed, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise processes.PartMissing(f"bench.load ended with status {process.returncode}")
    found: dict[str, Any] = json.loads(printed)
    return found


def _calls(port: int, count: int) -> Callable[[], Awaitable[object]]:
    return partial(asyncio.to_thread, peers.load, port, callers=_WARM_CALLERS, count=count, prefix="warm")


def _grpc(port: int) -> Load:
    async def load(callers: int, seconds: float, prefix: str) -> dict[str, Any]:
        return await asyncio.to_thread(peers.load, port, callers=callers, seconds=seconds, prefix=prefix)

    return load
