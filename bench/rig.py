"""What every script here needs: a Redis of its own, workers, and distinct requests."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import uvloop

from demo import processes, redis
from demo.processes import Child
from producer.contract import VerifyRequest
from producer.depth import Depth, depth, read_depth
from producer.link import Link, raise_errors
from producer.script import Command
from producer.settings import Settings, load

PUSH: Final = 500  # messages of one LPUSH
PATIENCE: Final = 60.0  # seconds until a worker gives a sign of life
TICKS: Final = os.sysconf("SC_CLK_TCK")


class Rig:
    """One Redis, and the settings that name it."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.url = url
        self.server = Link(url)

    def settings(self, **given: str) -> Settings:
        """As a worker with this environment has them."""
        return load(self.environment(**given), dotenv=None)

    def environment(self, **given: str) -> dict[str, str]:
        """For a process: ours, with these settings and no others."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("VERIFY_")}
        own = {"REDIS_URL": self.url, "METRICS_BIND": "127.0.0.1:0", **given}
        return inherited | {f"VERIFY_{name}": value for name, value in own.items()}

    @contextmanager
    def worker(self, **given: str) -> Iterator[Child]:
        """A worker, from its start to its end."""
        child = processes.worker(self.directory, self.environment(**given))
        try:
            yield child
        finally:
            child.stop()

    async def ask(self, *commands: Command, database: int = 0) -> list[Any]:
        """What Redis answers."""
        return raise_errors(await self.server.run(commands, database=database))

    async def fill(self, queue: str, count: int) -> None:
        """Put requests on the queue, each for an address of its own, as our producers write them."""
        for start in range(0, count, PUSH):
            requests = (
                VerifyRequest(f"user{number:07}@example.com") for number in range(start, min(count, start + PUSH))
            )
            messages = [each.message(str(uuid.uuid4()), queue=queue, enqueued_at=time.time()) for each in requests]
            await self.ask(("LPUSH", queue, *messages), database=1)

    async def depth(self, queue: str) -> Depth:
        """How the queue stands."""
        return read_depth((await self.ask(depth(queue), database=1))[0])

    async def until_workers(self, queue: str, count: int) -> None:
        """Return when so many workers are alive."""
        async with asyncio.timeout(PATIENCE):
            while (await self.depth(queue)).workers < count:  # noqa: ASYNC110 - Redis tells, no event
                await asyncio.sleep(0.1)


def run(main: Callable[[Rig], Coroutine[Any, Any, None]]) -> None:
    """Run `main` with a rig, and leave nothing behind."""
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="verify-bench-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        server, url = redis.start(directory)
        stack.callback(server.stop)
        stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop)).run(main(Rig(directory, url)))


def cpu_seconds(pid: int) -> float:
    """What a process has used so far (Linux only)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def say(cells: Sequence[object], widths: Sequence[int]) -> None:
    """One row of a table."""
    sys.stdout.write("  ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True)) + "\n")
    sys.stdout.flush()
