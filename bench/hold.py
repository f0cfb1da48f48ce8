"""A backlog that is kept at one length while workers drain it, and their rate meanwhile."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from bench import messages
from bench.ask import asyncio_load
from bench.drain import Parts, mark, used
from bench.record import Run, why_void
from bench.rig import PUSH, Rig
from bench.sink import Sink

_WARM: Final = 4.0  # seconds of draining before it measures: worker and Redis speed up during them
_SETTLE: Final = 1.0  # seconds from a full backlog to the measurement
_LOOK: Final = 0.02  # seconds between two checks of its length
_SAMPLE: Final = 30_000  # requests whose size is measured
_REPLY_TIMEOUT: Final = "60"  # seconds that a caller behind a backlog waits at most


class Backlog:
    """Requests that wait, each for an address of its own, as foreign programs push them.

    What is added to it comes last, or, with `older`, first: as if it had waited longest.
    """

    def __init__(self, rig: Rig, *, older: bool = False) -> None:
        self._rig = rig
        self._push = "RPUSH" if older else "LPUSH"
        self._queue = rig.settings().queue
        self._next = 0

    async def set(self, length: int) -> None:
        """Bring it to this length; the oldest stay."""
        await self._rig.ask(("LTRIM", self._queue, -length, -1), database=1)
        await self._fill(length)

    @asynccontextmanager
    async def kept(self, length: int) -> AsyncIterator[None]:
        """Keep it at this length, but for what was taken in some milliseconds, while the block runs."""

        async def keep() -> None:
            while True:
                await self._fill(length)
                await asyncio.sleep(_LOOK)

        task = asyncio.create_task(keep())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _fill(self, length: int) -> None:
        while missing := max(0, length - await self._length()):
            for start in range(0, missing, PUSH):
                count = min(PUSH, missing - start)
                requests = messages.foreign(self._next, self._next + count, self._queue)
                self._next += count  # first: nobody knows whether a cancelled push was done
                await self._rig.ask((self._push, self._queue, *requests), database=1)

    async def _length(self) -> int:
        [length] = await self._rig.ask(("LLEN", self._queue), database=1)
        return int(length)


async def drained(rig: Rig, sink: Sink, backlogs: Sequence[int], seconds: float, *, number: int) -> list[Run]:
    """One worker drains at each of these backlogs, in this order. All runs are void if one is.

    Redis rewrites its file before each, and not meanwhile: what it would rewrite is our filling, not the draining.
    """
    await rig.clear()
    await rig.ask(("CONFIG", "SET", "auto-aof-rewrite-percentage", "0"))
    base = (await sink.count()).mails
    backlog = Backlog(rig)
    await backlog.set(backlogs[0])
    runs = []
    with rig.workers(1, RELAYS=sink.url) as [worker]:
        await rig.until_workers(rig.settings().queue, 1)
        parts = {"worker": [worker.pid], "redis": [rig.redis.pid], "sink": [sink.pid]}
        async with backlog.kept(backlogs[0]):
            await asyncio.sleep(_WARM)
        for length in backlogs:
            await backlog.set(length)
            async with backlog.kept(length):
                await rig.rewrite()
                await asyncio.sleep(_SETTLE)
                runs.append(await _held(rig, sink, parts, length, seconds, number))
    void = why_void((await sink.count()).mails - base, **(await rig.counts())._asdict())
    return [replace(run, void=void) for run in runs]


async def _held(rig: Rig, sink: Sink, parts: Parts, length: int, seconds: float, number: int) -> Run:
    load = os.getloadavg()[0]
    begin = await mark(sink, parts)
    await asyncio.sleep(seconds)
    end = await mark(sink, parts)
    [worker] = parts["worker"]
    return Run(
        "backlog",
        "worker",
        number,
        sink.latency * 1000,
        workers=1,
        connections=rig.settings().relay_connections,
        backlog=length,
        count=end.mails - begin.mails,
        seconds=end.time - begin.time,
        cpu=used(begin.cpu, end.cpu),
        cpu_count=end.mails - begin.mails,
        figures=memory(worker),
        load=load,
    )


async def lone(
    rig: Rig, sink: Sink, length: int, seconds: float, least: int, *, number: int, wave: bool = False
) -> Run:
    """One caller asks one request after the other, `least` of them, while a backlog of other addresses waits.

    All of these were there before; with `wave`, others come as fast as they are drained.
    """
    await rig.clear()
    base, load = (await sink.count()).mails, os.getloadavg()[0]
    backlog = Backlog(rig, older=not wave)
    await backlog.set(length)
    with rig.workers(1, RELAYS=sink.url):
        await rig.until_workers(rig.settings().queue, 1)
        async with backlog.kept(length):
            found = await asyncio_load(rig, 1, seconds, "lone", least=least, REPLY_TIMEOUT=_REPLY_TIMEOUT)
    void = why_void((await sink.count()).mails - base, **(await rig.counts())._asdict())
    return Run(
        "wave" if wave else "lone",
        "asyncio",
        number,
        callers=1,
        workers=1,
        connections=rig.settings().relay_connections,
        backlog=length,
        count=found["answers"].get("0", 0),
        seconds=found["seconds"],
        latencies={name: round(found[name], 3) for name in ("p50", "p90", "p99")},
        load=load,
        void=void or ("" if set(found["answers"]) == {"0"} else f"answers {found['answers']}"),
    )


async def weighed(rig: Rig) -> Run:
    """Bytes of a waiting request in Redis: the smallest message, and one that our producers write."""
    figures = {}
    queue = rig.settings().queue
    for name, foreign in (("bytes_foreign", True), ("bytes_ours", False)):
        await rig.clear()
        before = await rig.memory()
        await rig.fill(queue, _SAMPLE, foreign=foreign)
        figures[name] = (await rig.memory() - before) / _SAMPLE
    await rig.clear()
    return Run("weigh", "worker", 1, backlog=_SAMPLE, count=_SAMPLE, figures=figures, load=os.getloadavg()[0])


def memory(pid: int) -> dict[str, float]:
    """Memory of a process in MB: resident (RSS), and with shared pages divided (PSS). Linux only."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return {"rss_mb": kilobytes["Rss"] / 1024, "pss_mb": kilobytes["Pss"] / 1024}
