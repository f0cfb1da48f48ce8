"""How many requests workers carry, by relay latency: `python -m bench.capacity [--help]`.

Each run drains a backlog of single messages, each for an address of its own, through real workers into a relay that
takes every mail. It counts only if mails, codes and replies are as many as the messages.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from contextlib import ExitStack
from typing import Final

from bench import rig
from bench.rig import Rig, cpu_seconds, say
from bench.sink import Sink

TIMEOUT: Final = 300.0  # seconds for one run
HEADS: Final = ("latency ms", "connections", "workers", "mails/s", "limit", "of limit", "worker CPU us/mail", "load")
WIDTHS: Final = [len(head) for head in HEADS]


async def drain(rig: Rig, *, latency: float, connections: int, workers: int, count: int) -> None:
    """One run, one row."""
    await rig.ask(("FLUSHALL",))
    async with Sink(latency) as sink:
        given = {"RELAYS": sink.url, "RELAY_CONNECTIONS": str(connections), "GIVE_UP_AFTER": "3600"}
        queue = rig.settings(**given).queue
        await rig.fill(queue, count)
        with ExitStack() as stack:
            children = [stack.enter_context(rig.worker(**given)) for _ in range(workers)]
            async with asyncio.timeout(TIMEOUT):
                # The first tenth is for connecting and warming up, the last for the workers to run dry.
                began = await sink.until(count // 10)
                used = -sum(cpu_seconds(child.pid) for child in children)
                ended = await sink.until(count - count // 10)
                used += sum(cpu_seconds(child.pid) for child in children)
                await sink.until(count)
                await asyncio.sleep(0.5)  # the last replies are on their way
            [codes] = await rig.ask(("KEYS", "code_*"), database=0)
            [replies] = await rig.ask(("DBSIZE",), database=2)
        mails = (await sink.count()).mails
        assert mails == len(codes) == replies == count, (mails, len(codes), replies)  # noqa: S101 - the point
    measured = count - 2 * (count // 10)
    rate = measured / (ended - began)
    limit = workers * connections / latency if latency else 0
    share = f"{rate / limit:.0%}" if limit else "-"
    cells = (f"{latency * 1000:g}", connections, workers, f"{rate:.0f}", f"{limit:.0f}" if limit else "-", share)
    say([*cells, f"{used / measured * 1e6:.0f}", f"{os.getloadavg()[0]:.1f}"], WIDTHS)


def main() -> None:
    """Run every combination, interleaved."""
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description="Requests a worker carries.")
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 50, 200], help="of the relay, in ms")
    parser.add_argument("--connections", type=int, nargs="+", default=[32], help="of one worker to the relay")
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="worker processes")
    parser.add_argument("--runs", type=int, default=3, help="of each combination")
    parser.add_argument("--seconds", type=float, default=8, help="that a run with latency takes, about")
    parser.add_argument("--count", type=int, default=30_000, help="of messages in a run, at most")
    given = parser.parse_args()

    async def runs(rig: Rig) -> None:
        say(HEADS, WIDTHS)
        for _ in range(given.runs):
            for milliseconds in given.latency:
                for connections in given.connections:
                    for workers in given.workers:
                        latency = milliseconds / 1000
                        expected = workers * connections / latency * given.seconds if latency else given.count
                        count = min(given.count, round(expected))
                        await drain(rig, latency=latency, connections=connections, workers=workers, count=count)

    rig.run(runs)


if __name__ == "__main__":
    main()
