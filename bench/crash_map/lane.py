"""One lane: servers, proxies and processes of its own, on which one cell runs after the other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, Self

import redis
import redis.asyncio
from support.caller import META
from support.process import HOST, free_port
from support.redis_server import RedisServer
from support.rig import DATABASES
from support.smtp_server import ScriptedServer

from bench.crash_map.forks import Child, Forks
from bench.crash_map.network import CALLER, RECEIVED, RELAY, Frame, Network
from bench.crash_map.programs import ASKED_AT, BROKEN
from bench.crash_map.scenarios import SCENARIOS, SETTINGS, Place, Scenario, Servers
from worker.maintenance import RESTORE_AFTER

POLL: Final = 0.05  # seconds between two looks
_START_WITHIN: Final = 60.0  # seconds
_HELPER: Final = "the healthy worker"

# Asks for a code for an address: the reply's error; None: no answer.
Ask = Callable[[str], Coroutine[Any, Any, int | None]]


class Stalled(Exception):
    """The machine was too busy for this run to say anything."""


class Worker:
    """A worker and its connections."""

    def __init__(self, child: Child, network: Network) -> None:
        self.child = child
        self.network = network
        self.waits = asyncio.Event()  # for a message, and is connected to all three databases
        self.waits_first = asyncio.Event()  # the same, and it is the one that a message wakes
        self.holds = True  # whether it held a request at its last round of maintenance
        self.rounds = 0  # since `forget`
        self.longest = 0.0  # seconds between two rounds
        self.began = 0.0  # loop time of its first round
        self.frozen = False
        self._versions = 0  # of how many databases it has asked for the version, the last step of its start
        self._idle_words = 0  # that a round's command has while it holds nothing
        self._last: float | None = None
        network.watchers = [self._watch]

    def _watch(self, frame: Frame) -> None:
        if frame.way == RECEIVED:
            self._versions += frame.name == "INFO"
        elif frame.name in {"BLMOVE", "BLPOP"} and self._versions >= len(DATABASES):
            self.waits.set()
            if frame.name == "BLMOVE":
                self.waits_first.set()
        elif frame.name == "maintain":
            words = int(frame.detail)
            self._idle_words = self._idle_words or words
            self.holds = words > self._idle_words
            self.longest = max(self.longest, frame.at - (self._last or frame.at))
            self._last, self.rounds = frame.at, self.rounds + 1
            self.began = self.began or frame.at

    def forget(self) -> None:
        """What is between the last round and the next one says nothing about the machine."""
        self._last, self.rounds = None, 0

    async def freeze(self) -> None:
        """SIGSTOP."""
        self.frozen = True
        await self.child.freeze()

    def wake(self) -> None:
        """SIGCONT."""
        if self.frozen:
            self.frozen, self.longest = False, 0.0
            self.forget()
            self.child.wake()


class Lane:
    """`async with Lane(forks, folder) as lane:`, then `configure` and what a trial needs."""

    def __init__(self, forks: Forks, folder: Path, *, broken: str = "") -> None:
        """`folder`: for the processes' files. `broken`: how workers are broken on purpose."""
        self._forks, self._folder, self._broken = forks, folder, broken
        self._stack = AsyncExitStack()
        self._servers: list[RedisServer] = []
        self._configured: tuple[Servers, str] | None = None
        self._scenario: Scenario
        self._helper: Worker | None = None
        self._helper_network = Network()
        self._api_port = 0
        self._count = 0
        self.network = Network()  # of the process under the fault
        self.children: list[tuple[str, Child]] = []  # of the trial, with what they are called
        self.heard: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)  # by id: when, and which error
        self.relay = ScriptedServer()
        self.codes: redis.asyncio.Redis
        self.broker: redis.asyncio.Redis
        self.results: redis.asyncio.Redis

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.relay)
        self._api_port = free_port()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end_trial()
        await self._unconfigure()
        await self._stack.aclose()

    async def _listen(self, server: RedisServer) -> None:
        """Hear every reply that is published on this server."""
        client = redis.asyncio.Redis.from_url(server.url())
        pubsub = client.pubsub(ignore_subscribe_messages=True)
        await pubsub.psubscribe(f"{META}*")

        async def hear() -> None:
            async for message in pubsub.listen():
                error = json.loads(message["data"])["result"]["error"]
                now = asyncio.get_running_loop().time()
                self.heard[message["channel"].decode().removeprefix(META)].append((now, error))

        task = asyncio.create_task(hear())

        async def close() -> None:
            task.cancel()
            await asyncio.wait([task])
            await pubsub.aclose()  # type: ignore[no-untyped-call]
            await client.aclose()

        self._stack.push_async_callback(close)

    # Servers and proxies

    async def configure(self, place: Place) -> None:
        """Make everything ready for a cell of this place, and empty. What fits is kept from the cell before."""
        self._scenario = SCENARIOS[place.scenario]
        wanted = (place.servers, json.dumps(dict(self._scenario.settings)))
        if self._configured != wanted:
            await self._unconfigure()
            needed = 1 if place.servers is Servers.ONE else len(DATABASES)
            while len(self._servers) < needed:
                self._servers.append(self._stack.enter_context(RedisServer()))
                await self._listen(self._servers[-1])
            servers = [self._servers[min(i, needed - 1)] for i in range(len(DATABASES))]
            self.network, self._helper_network = Network(), Network()
            for network in (self.network, self._helper_network):
                for which, server in zip(DATABASES, servers, strict=True):
                    if place.servers is Servers.THREE:
                        await network.open(which, server.port)
                    elif "redis" not in network.ports:
                        await network.open("redis", server.port)
                await network.open(RELAY, self.relay.port)
            await self.network.open(CALLER, self._api_port)
            self._urls = {
                which: server.url(i) for i, (which, server) in enumerate(zip(DATABASES, servers, strict=True))
            }
            self.codes, self.broker, self.results = map(redis.asyncio.Redis.from_url, self._urls.values())
            self._configured = wanted
        await self.codes.flushdb()
        await self.results.flushdb()
        for key in await keys_of(self.broker):
            # Which worker waits on the queue goes by itself; without it, a frozen one would wait beside the victim.
            if not key.startswith((b"_kombu.", b"verification.workers", b"verification.waiter")):
                await self.broker.delete(key)
        self.relay.mails.clear()
        self.relay.dotted.clear()
        self.heard.clear()

    async def _unconfigure(self) -> None:
        if self._configured is not None:
            self._configured = None
            await self._end_helper()
            for network in (self.network, self._helper_network):
                await network.close()
            for client in (self.codes, self.broker, self.results):
                await client.aclose()

    def client(self, which: str) -> redis.Redis:
        """A blocking client of one of the three databases."""
        return redis.Redis.from_url(self._urls[which])

    # Processes

    async def helper(self) -> Worker:
        """A worker under no fault that was in contact with Redis for long enough to take over from others."""
        if self._helper is None or not self._helper.child.alive:
            self._helper = await self._start_worker(self._helper_network, _HELPER)
        worker, loop = self._helper, asyncio.get_running_loop()
        worker.longest = 0.0
        await asyncio.sleep(max(0.0, worker.began + RESTORE_AFTER + 0.3 - loop.time()))
        return worker

    async def replaced_helper(self) -> Worker:
        """Another one in place of that which was killed."""
        await self._end_helper()
        return await self.helper()

    async def _end_helper(self) -> None:
        if self._helper is not None:
            await self._helper.child.kill()
            self._helper = None
        self._helper_network.end()
        await self._helper_network.drop()

    async def start_victim(self) -> Worker:
        """The worker under the fault, which waits for messages and gets the next one."""
        worker = await self._start_worker(self.network, "the worker")
        await until(worker.waits_first.wait(), worker.child)
        return worker

    async def _start_worker(self, network: Network, called: str) -> Worker:
        broken = {BROKEN: self._broken} if self._broken else {}
        child = await self._start("worker", called, self._environment(network) | broken)
        worker = Worker(child, network)
        network.idle = {"TIME"}
        try:
            await until(worker.waits.wait(), child)
        except BaseException:
            await child.kill()  # it may serve otherwise, and nobody knows of it
            raise
        return worker

    async def start_client(self) -> tuple[Child, Ask]:
        """A program that uses the client, and how it is asked."""
        place = self._folder / f"{self._count + 1}.socket"
        connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        connected = asyncio.get_running_loop().create_future()
        server = await asyncio.start_unix_server(lambda *both: connected.set_result(both), place)
        self.network.watchers, self.network.idle = [], set()
        environment = self._environment(self.network) | {ASKED_AT: str(place)}
        child = await self._start("client", "the client", environment)
        await until(connected, child)
        server.close()
        reader, writer = connected.result()
        answers: dict[int, asyncio.Future[int | None]] = {}

        async def read() -> None:
            with contextlib.suppress(OSError):
                while line := await reader.readline():
                    number, error = json.loads(line)
                    answers.pop(number).set_result(error)
            for answer in answers.values():
                answer.set_result(None)
            writer.close()

        self._reading = asyncio.create_task(read())
        numbers = itertools.count()

        async def ask(email: str) -> int | None:
            number = next(numbers)
            answer: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
            answers[number] = answer
            writer.write(json.dumps([number, email]).encode() + b"\n")
            return await answer

        return child, ask

    async def start_api(self) -> tuple[Child, Ask]:
        """An API server, and how it is asked over HTTP."""
        looked = asyncio.Event()  # whether Redis and a worker are there: the last that it does by itself
        awaited = ["PING", "PING", "backlog"]

        def watch(frame: Frame) -> None:
            if frame.way == RECEIVED and frame.name in awaited:
                awaited.remove(frame.name)
                if not awaited:
                    looked.set()

        self.network.watchers, self.network.idle = [watch], set()
        bind = {"VERIFY_HTTP_BIND": f"{HOST}:{self._api_port}"}
        child = await self._start("api", "the API", self._environment(self.network) | bind)
        await until(looked.wait(), child)

        async def ask(email: str) -> int | None:
            body = json.dumps({"email": email}).encode()
            head = f"POST /get_varifycode HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            writer = None
            try:
                reader, writer = await asyncio.open_connection(HOST, self.network.ports[CALLER])
                writer.write(head.encode() + body)
                answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(answer.partition(b"content-length:")[2].split(maxsplit=1)[0])
                return int(json.loads(await reader.readexactly(length))["error"])
            except (OSError, EOFError):
                return None
            finally:
                if writer is not None:
                    writer.close()

        return child, ask

    async def _start(self, program: str, called: str, environment: dict[str, str]) -> Child:
        self._count += 1
        folder = self._folder / f"{self._count}"
        folder.mkdir(parents=True)
        child = await self._forks.start(program, environment, folder)
        if called != _HELPER:
            self.children.append((called, child))
        return child

    def _environment(self, network: Network) -> dict[str, str]:
        ports = [network.ports.get(which, network.ports.get("redis")) for which in DATABASES]
        urls = {
            f"VERIFY_{which.upper()}_URL": f"redis://{HOST}:{port}/{number}"
            for number, (which, port) in enumerate(zip(DATABASES, ports, strict=True))
        }
        relays = {"VERIFY_RELAYS": f"smtp://{HOST}:{network.ports[RELAY]}"}
        return {**SETTINGS, **urls, **relays, **self._scenario.settings}

    async def end_trial(self) -> None:
        """End what a trial has started; the healthy worker goes on."""
        self.network.end()
        self._helper_network.end()
        for _, child in self.children:
            await child.kill()
        self.children = []
        await self.network.drop()
        if self._helper is not None:
            self._helper.wake()


async def keys_of(client: redis.asyncio.Redis) -> list[bytes]:
    """All keys of its database."""
    keys = await client.keys()
    return [key if isinstance(key, bytes) else key.encode() for key in keys]


async def until(ready: Awaitable[object], child: Child) -> None:
    """Wait until a process is ready. Raises `RuntimeError` if it ends first, `Stalled` if it takes too long."""
    waiting, ended = asyncio.ensure_future(ready), asyncio.create_task(child.ended())
    try:
        await asyncio.wait([waiting, ended], timeout=_START_WITHIN, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise RuntimeError(f"a process ended before it was ready:\n{child.log[-3000:]}")
        if not waiting.done():
            raise Stalled(f"a process was not ready within {_START_WITHIN:g} s")
    finally:
        waiting.cancel()
        ended.cancel()


class Lateness:
    """How late this process' own loop was."""

    most = 0.0  # seconds


@asynccontextmanager
async def lateness() -> AsyncIterator[Lateness]:
    """Measure it meanwhile."""
    late = Lateness()

    async def watch() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + POLL
            await asyncio.sleep(POLL)
            late.most = max(late.most, loop.time() - due)

    task = asyncio.create_task(watch())
    try:
        yield late
    finally:
        task.cancel()
