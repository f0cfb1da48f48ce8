"""What every measurement needs: a Redis of its own, workers, and distinct requests."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import redis
import uvloop

from bench import messages, server
from demo import processes
from demo.processes import Child
from producer.redis.connection import RedisConnections, raise_errors
from producer.redis.scripts import Command
from producer.settings import Settings, load
from producer.store.backlog import Backlog, backlog, read_backlog

PUSH: Final = 500  # messages of one LPUSH
TIMEOUT: Final = 60.0  # seconds until a worker gives a sign of life
TICKS: Final = os.sysconf("SC_CLK_TCK")

# All of a database in one step: SCAN may tell a key twice.
_COUNT: Final = """
local function count(pattern, good)
    local found = 0
    for _, key in ipairs(redis.call('KEYS', pattern)) do
        if good(key) then found = found + 1 end
    end
    return found
end
redis.call('SELECT', ARGV[2])
local replies = count('celery-task-meta-*', function(key)
    return cjson.decode(redis.call('GET', key)).result.error == 0
end)
redis.call('SELECT', ARGV[1])
return {
    count('code_*', function() return true end),
    count('request:*', function(key) return redis.call('HGET', key, 'error') == '0' end),
    replies
}
"""
_COUNTING: Final = 120.0  # seconds that it may take


class Counts(NamedTuple):
    """What a run left in Redis; each as many as the relay took mails, or the run is void."""

    codes: int
    marks: int  # records of requests whose mail was accepted
    replies: int  # of Success


class Rig:
    """One Redis, and the settings that name it."""

    def __init__(self, directory: Path, redis: Child, url: str) -> None:
        self.directory = directory
        self.redis = redis
        self.url = url
        self.variables: dict[str, str] = {}  # of the processes' environment, beside settings
        self.server = RedisConnections().connection(url)

    def settings(self, **given: str) -> Settings:
        """As a worker with this environment has them."""
        return load(self.environment(**given), dotenv=None)

    def environment(self, **given: str) -> dict[str, str]:
        """For a process: ours, with these settings and no others."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("VERIFY_")}
        own = {"REDIS_URL": self.url, "METRICS_BIND": "127.0.0.1:0", **given}
        return inherited | self.variables | {f"VERIFY_{name}": value for name, value in own.items()}

    def start_worker(self, **given: str) -> Child:
        """A worker, which the caller stops."""
        return processes.worker(self.directory, self.environment(**given))

    @contextmanager
    def worker(self, **given: str) -> Iterator[Child]:
        """A worker, from its start to its end."""
        with self.workers(1, **given) as [child]:
            yield child

    @contextmanager
    def workers(self, count: int, **given: str) -> Iterator[list[Child]]:
        """So many workers, from their start to their end."""
        children: list[Child] = []
        try:
            children.extend(self.start_worker(**given) for _ in range(count))
            yield children
        finally:
            stop_all(children)

    async def ask(self, *commands: Command, database: int = 0) -> list[Any]:
        """What Redis answers."""
        return raise_errors(await self.server.run(commands, database=database))

    async def fill(self, queue: str, count: int, *, first: int = 0, foreign: bool = False) -> None:
        """Put requests on the queue, each for an address of its own: as our producers write them, or `foreign`."""
        write = messages.foreign if foreign else messages.ours
        for start in range(first, first + count, PUSH):
            requests = write(start, min(first + count, start + PUSH), queue)
            await self.ask(("LPUSH", queue, *requests), database=1)

    async def backlog(self, queue: str) -> Backlog:
        """How the queue stands."""
        return read_backlog((await self.ask(backlog(queue), database=1))[0])

    async def until_workers(self, queue: str, count: int) -> None:
        """Return when so many workers are alive."""
        async with asyncio.timeout(TIMEOUT):
            while (await self.backlog(queue)).workers < count:  # noqa: ASYNC110 - Redis tells, no event
                await asyncio.sleep(0.1)

    async def info(self, section: str) -> Mapping[str, str]:
        """A section of what Redis tells about itself."""
        [text] = await self.ask(("INFO", section))
        return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)

    async def memory(self) -> int:
        """The bytes that Redis uses for data now."""
        return int((await self.info("memory"))["used_memory"])

    async def clear(self) -> None:
        """Empty Redis, and wait until it is at rest."""
        await self.ask(("FLUSHALL", "ASYNC"))
        await self.at_rest()

    async def at_rest(self) -> None:
        """Wait until Redis neither rewrites its file nor frees memory, which would slow the next run."""

        async def busy() -> bool:
            writing, freeing = await self.info("persistence"), await self.info("memory")
            states = (writing["aof_rewrite_in_progress"], writing["aof_rewrite_scheduled"])
            return "1" in states or freeing["lazyfree_pending_objects"] != "0"

        async with asyncio.timeout(TIMEOUT):
            while await busy():  # noqa: ASYNC110 - Redis tells, no event
                await asyncio.sleep(0.1)

    async def rewrite(self) -> None:
        """Have Redis rewrite its file now, and wait until it has."""
        await self.at_rest()
        await self.ask(("BGREWRITEAOF",))
        await self.at_rest()

    async def counts(self) -> Counts:
        """What was stored for requests that were answered Success. Redis does nothing else meanwhile."""

        def count() -> Counts:
            with redis.Redis.from_url(self.url, socket_timeout=_COUNTING) as client:
                return Counts(*client.eval(_COUNT, 0, "0", "2"))

        return await asyncio.to_thread(count)


@contextmanager
def opened() -> Iterator[Rig]:
    """A rig, of which nothing is left behind."""
    directory = Path(tempfile.mkdtemp(prefix="verify-bench-"))
    try:
        child, url = server.start(directory)
        try:
            yield Rig(directory, child, url)
        finally:
            child.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run(main: Callable[[Rig], Coroutine[Any, Any, None]]) -> None:
    """Run `main` with a rig."""
    with opened() as rig, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(rig))


def stop_all(children: Iterable[Child]) -> None:
    """End them, all at once."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        list(pool.map(Child.stop, children))


def cpu_seconds(pid: int) -> float:
    """What a process has used so far (Linux only)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def say(cells: Sequence[object], widths: Sequence[int]) -> None:
    """One row of a table."""
    sys.stdout.write("  ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True)) + "\n")
    sys.stdout.flush()
