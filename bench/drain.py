"""Draining: requests lie on the queue, workers start, and the relay tells how fast mails come."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from bench import peers
from bench.peers import Peer
from bench.record import Run, why_void
from bench.rig import Rig, cpu_seconds
from bench.sink import Sink
from demo.processes import Child

TIMEOUT: Final = 120.0  # seconds for one drain
_LAST_REPLIES: Final = 10.0  # seconds that the last replies may come after their mails

Parts = Mapping[str, Sequence[int]]  # process ids, by what the processes are


class Drained(Protocol):
    """A system that takes what lies on its queue."""

    @property
    def system(self) -> str:
        """Its name."""

    @property
    def workers(self) -> int:
        """How many processes it has."""

    @property
    def connections(self) -> int:
        """How many connections each may have to the relay."""

    async def fill(self, count: int) -> None:
        """Empty its Redis, and put so many requests on its queue."""

    def running(self, sink: Sink, count: int) -> AbstractContextManager[Parts]:
        """It runs while the block does, with `sink` as its relay. `count` mails are to come."""

    async def stored(self) -> Mapping[str, int]:
        """What it stored for requests answered Success, by kind: each is to be as many as the mails."""


@dataclass
class Workers:
    """Ours: worker processes on a queue of single messages, as foreign programs push them."""

    rig: Rig
    workers: int
    connections: int
    system: str = "worker"

    async def fill(self, count: int) -> None:
        """See `Drained`."""
        await self.rig.clear()
        await self.rig.fill(self.rig.settings().queue, count, foreign=True)

    @contextmanager
    def running(self, sink: Sink, count: int) -> Iterator[Parts]:  # noqa: ARG002 - `Drained`'s
        """See `Drained`."""
        with self.rig.workers(self.workers, RELAYS=sink.url, RELAY_CONNECTIONS=str(self.connections)) as children:
            yield {"worker": [child.pid for child in children], "redis": [self.rig.redis.pid]}

    async def stored(self) -> Mapping[str, int]:
        """See `Drained`."""
        return (await self.rig.counts())._asdict()


@dataclass
class Pool:
    """The bare SMTP pool in one process, which has no queue."""

    rig: Rig
    connections: int
    workers: int = 1
    system: str = "pool"

    async def fill(self, count: int) -> None:
        """See `Drained`."""

    @contextmanager
    def running(self, sink: Sink, count: int) -> Iterator[Parts]:
        """See `Drained`."""
        command = [sys.executable, "-m", "bench.pool", sink.url, str(self.connections), str(count)]
        child = Child("pool", command, self.rig.directory, self.rig.environment())
        try:
            yield {"pool": [child.pid]}
        finally:
            child.stop()

    async def stored(self) -> Mapping[str, int]:
        """See `Drained`."""
        return {}


@dataclass
class PeerDrain:
    """A peer that drains a queue."""

    rig: Rig
    peer: Peer
    workers: int
    connections: int

    @property
    def system(self) -> str:
        """Its name."""
        return self.peer.name

    async def fill(self, count: int) -> None:
        """See `Drained`."""
        await self.rig.clear()
        await asyncio.to_thread(peers.fill, self.peer, redis_url=self.rig.url, count=count)

    @contextmanager
    def running(self, sink: Sink, count: int) -> Iterator[Parts]:  # noqa: ARG002 - `Drained`'s
        """See `Drained`."""
        with peers.running(
            self.peer,
            redis_url=self.rig.url,
            relay_port=sink.port,
            connections=self.connections,
            processes=self.workers,
        ) as running:
            yield {"peer": running.pids, "redis": [self.rig.redis.pid]}

    async def stored(self) -> Mapping[str, int]:
        """See `Drained`."""
        return (await asyncio.to_thread(peers.counts, self.rig.url))._asdict()


class Mark(NamedTuple):
    """How things stood at one moment."""

    time: float  # monotonic
    mails: int
    cpu: dict[str, float]  # seconds so far, by part


async def mark(sink: Sink, parts: Parts) -> Mark:
    """How things stand now."""
    mails = (await sink.count()).mails
    return Mark(time.monotonic(), mails, usage(parts))


def usage(parts: Parts) -> dict[str, float]:
    """The CPU seconds that each part has used so far."""
    return {part: sum(map(cpu_seconds, pids)) for part, pids in parts.items()}


def used(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """CPU seconds from one look to the next."""
    return {part: round(after[part] - seconds, 3) for part, seconds in before.items()}


class Share(NamedTuple):
    """How many mails of a drain are measured: those after the first ones, in which the system becomes warm."""

    warm: int
    measured: int

    @property
    def all(self) -> int:
        """How many there are: some more, in which workers run dry."""
        return self.warm + self.measured + max(200, self.measured // 10)


async def measure(sink: Sink, drained: Drained, share: Share, *, scenario: str, number: int) -> Run:
    """One drain."""
    await drained.fill(share.all)
    base = (await sink.count()).mails
    load = os.getloadavg()[0]
    with drained.running(sink, share.all) as parts:
        everything = {**parts, "sink": [sink.pid]}
        async with asyncio.timeout(TIMEOUT):
            await sink.until(base + share.warm)
            begin = await mark(sink, everything)
            await sink.until(begin.mails + share.measured)
            end = await mark(sink, everything)
            await sink.until(base + share.all)
        void = await _why_void(sink, base, drained)
    return Run(
        scenario,
        drained.system,
        number,
        sink.latency * 1000,
        workers=drained.workers,
        connections=drained.connections,
        backlog=share.all,
        count=end.mails - begin.mails,
        seconds=end.time - begin.time,
        cpu=used(begin.cpu, end.cpu),
        cpu_count=end.mails - begin.mails,
        load=load,
        void=void,
    )


async def _why_void(sink: Sink, base: int, drained: Drained) -> str:
    """The last replies come a moment after their mails."""
    until = time.monotonic() + _LAST_REPLIES
    while True:
        stored = await drained.stored()
        why = why_void((await sink.count()).mails - base, **stored)
        if not why or time.monotonic() > until:
            return why
        await asyncio.sleep(0.2)
