"""Bar i: workers are added, or removed, one by one on a slow relay."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from bench.drain import mark, used
from bench.record import Run, why_void
from bench.rig import Rig, stop_all
from bench.sink import Sink
from demo.processes import Child

CONNECTIONS: Final = 32  # of each worker
_SETTLE: Final = 1.5  # seconds from the last worker's first sign of life to the measurement
_SPARE: Final = 2.0  # times as many requests as the steps take: workers start and stop meanwhile


async def climb(rig: Rig, sink: Sink, steps: Sequence[int], seconds: float, *, number: int) -> list[Run]:
    """Measure with these counts of workers in turn. All runs are void if one is."""
    await rig.clear()
    base = (await sink.count()).mails
    queue = rig.settings().queue
    each = CONNECTIONS / sink.latency
    await rig.fill(queue, round(sum(steps) * each * (seconds + _SETTLE + 1) * _SPARE), foreign=True)
    runs = []
    with ExitStack() as stack:
        children: list[Child] = []
        stack.callback(stop_all, children)
        for count in steps:
            surplus, children[count:] = children[count:], []
            stack.callback(stop_all, surplus)
            await asyncio.to_thread(stop_all, surplus)
            while len(children) < count:
                children.append(rig.start_worker(RELAYS=sink.url, RELAY_CONNECTIONS=str(CONNECTIONS)))
            await rig.until_workers(queue, count)
            await asyncio.sleep(_SETTLE)
            runs.append(await _step(rig, sink, children, seconds, number))
    void = why_void((await sink.count()).mails - base, **(await rig.counts())._asdict())
    return [replace(run, void=void) for run in runs]


async def _step(rig: Rig, sink: Sink, children: Sequence[Child], seconds: float, number: int) -> Run:
    """A measuring time of whole rounds: all connections end their mails at about the same time."""
    rounds = round(seconds / sink.latency)
    parts = {
        "worker": [child.pid for child in children],
        "redis": [rig.redis.pid],
        "sink": [sink.pid],
    }
    load = os.getloadavg()[0]
    await sink.until((await sink.count()).mails + 1)
    begin = await mark(sink, parts)
    await sink.until(begin.mails + rounds * CONNECTIONS * len(children))
    end = await mark(sink, parts)
    return Run(
        "ladder",
        "worker",
        number,
        sink.latency * 1000,
        workers=len(children),
        connections=CONNECTIONS,
        count=end.mails - begin.mails,
        seconds=end.time - begin.time,
        cpu=used(begin.cpu, end.cpu),
        cpu_count=end.mails - begin.mails,
        load=load,
    )
