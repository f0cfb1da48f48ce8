"""Pipelined asyncio connections to Redis: many commands leave in one write, and their replies come back in order.

redis-py's own asyncio pipeline costs four times as much for each command, which is most of what a request costs here.
Only the reading of URLs is redis-py's.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import hiredis
from redis.asyncio.connection import SSLConnection, parse_url

from producer.errors import RedisUnavailable, ServerTooOld
from producer.redis.protocol import OnPush, Protocol, auth, kind_of, pack, refused
from producer.redis.scripts import Command, in_full, load_all
from producer.redis.sentinel import Address, PrimaryFinder
from producer.setting_types import SentinelURL, is_sentinel

CONNECT_TIMEOUT = 1.0  # seconds; with the protocol's ANSWER_TIMEOUT it stays within REDIS_TIMEOUT
REDIS_TIMEOUT = 2.6  # seconds until "Redis cannot be reached", which is promised within 3
OLDEST = (6, 2)

# Error replies of a server that is up and cannot work: it loads its files, runs a long script, has become a replica, or
# has no replica where it must not write without one.
UNABLE = ("LOADING", "BUSY", "MASTERDOWN", "READONLY", "NOREPLICAS")
REPLICA = ("MASTERDOWN", "READONLY")  # those of a replica

Batch = Sequence[Command]
Part = tuple[int, Batch]  # a database's number, and the commands for it
ServerError = hiredis.ReplyError
T = TypeVar("T")


class RedisConnections:
    """Makes connections, and closes them all. Those to one service share what they know from its sentinels.

    For one event loop. Make one for each client, worker or API server, and hand it to everything that needs Redis.
    """

    def __init__(self) -> None:
        self._servers: dict[tuple[Any, ...], _Server] = {}
        self._connections: list[RedisConnection] = []

    def connection(self, url: str, *, on_push: OnPush | None = None, on_open: OnOpen | None = None) -> RedisConnection:
        """A connection to the server or service of `url`, opened at its first use.

        `on_push` is called with each message of a subscription. `on_open` is awaited after each opening, before any
        other command; if it fails, the connection counts as not opened.
        """
        service = SentinelURL.parse(url) if is_sentinel(url) else None
        options: dict[str, Any] = dict(parse_url(url if service is None else service.server_url()))
        database = int(options.pop("db", None) or 0)
        if service is not None:
            service = service.with_database(0)
        key = (service, *sorted((name, str(value)) for name, value in options.items()))
        if (server := self._servers.get(key)) is None:
            server = self._servers[key] = _Server(options, service)
        connection = RedisConnection(server, database, on_push, on_open)
        self._connections.append(connection)
        return connection

    async def close(self) -> None:
        """Close all connections, also those to sentinels."""
        for connection in self._connections:
            await connection.close()
        for server in self._servers.values():
            if server.finder is not None:
                await server.finder.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()


class _Server:
    """One server, or the primary of a service, as one user: opens connections to it."""

    def __init__(self, options: dict[str, Any], service: SentinelURL | None) -> None:
        """`options`: redis-py's, of a server's URL."""
        self._options = options
        self._tls: ssl.SSLContext | None = None
        self.finder = None if service is None else PrimaryFinder(service, self._dial)
        self._open: set[Protocol] = set()

    async def open(self, database: int, on_push: OnPush | None) -> Protocol:
        """A connection that is ready for commands. Raises `RedisUnavailable` within CONNECT_TIMEOUT seconds."""

        async def connect(address: Address) -> Protocol:
            protocol = await self._dial(address, on_push)
            try:
                await self._greet(protocol, database)
            except BaseException:
                protocol.transport.abort()
                raise
            return protocol

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                # Read again for each connection, because files change; not for connections to sentinels: it takes some
                # 20 ms, in which the loop stands still.
                self._tls = self._trust()
                if self.finder is not None:
                    protocol = await self.finder.find(connect)
                else:
                    protocol = await connect((self._options.get("host", "localhost"), self._options.get("port", 6379)))
        except RedisUnavailable:
            raise
        except (OSError, UnicodeError) as exc:  # UnicodeError: a host name that IDNA cannot encode
            raise RedisUnavailable(f"Redis could not be reached ({type(exc).__name__})") from None
        self._open.add(protocol)
        protocol.closed.add_done_callback(lambda _: self._open.discard(protocol))
        return protocol

    def leave(self) -> None:
        """Drop all connections: the server has become a replica, and its name may lead to its successor by now.

        One that only listens or waits would not notice.
        """
        for protocol in self._open:
            protocol.transport.abort()

    async def _dial(self, address: Address, on_push: OnPush | None) -> Protocol:
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(lambda: Protocol(on_push), *address, ssl=self._tls)
        return protocol

    def _trust(self) -> ssl.SSLContext | None:
        options = self._options
        if options.get("connection_class") is not SSLConnection:
            return None
        tls = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
        checked = options.get("ssl_cert_reqs") != "none"
        tls.check_hostname = checked and options.get("ssl_check_hostname") is not False
        if not checked:
            tls.verify_mode = ssl.CERT_NONE
        if options.get("ssl_certfile"):
            tls.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
        return tls

    async def _greet(self, protocol: Protocol, database: int) -> None:
        greeting = [*auth(self._options.get("username"), self._options.get("password")), ("SELECT", database)]
        role: Batch = () if self.finder is None else [("ROLE",)]
        # Scripts go first: one found missing would run after the commands that were written behind it.
        replies = await protocol.ask(pack([*greeting, *load_all(), *role]))
        # An error passes: a user may lack the right to ask for the role, and a replica refuses writes anyway.
        if role and isinstance(replies[-1], list) and replies[-1][:1] != [b"master"]:
            raise RedisUnavailable("the server that a sentinel names is no primary")
        for i, reply in enumerate(replies):
            # A user who may not load scripts may still be able to run them.
            if isinstance(reply, ServerError) and (i < len(greeting) or kind_of(reply) in UNABLE):
                raise refused(reply)
            if i < len(greeting) and reply != b"OK":
                raise RedisUnavailable("what answers there is no Redis server")


class RedisConnection:
    """A connection that opens when it is first needed, and again after it was lost.

    `run` raises `RedisUnavailable` within CONNECT_TIMEOUT + ANSWER_TIMEOUT seconds. Error replies to single commands
    are returned in their place as `ServerError` objects. A batch that was cut off may have been executed in part.
    """

    def __init__(self, server: _Server, database: int, on_push: OnPush | None, on_open: OnOpen | None) -> None:
        """Made by `RedisConnections.connection`."""
        self.server = server  # the same for connections to one server as one user
        self.database = database
        self._on_push = on_push
        self._on_open = on_open
        self._protocol: Protocol | None = None
        self._opening: asyncio.Task[Protocol] | None = None
        self._selected = database

    @property
    def connected(self) -> bool:
        """Whether a connection is open now."""
        return self._protocol is not None and self._protocol.open

    async def run(self, batch: Batch, *, database: int | None = None) -> list[Any]:
        """Send all commands of a batch in one write; their replies in order."""
        [replies] = await self.run_all([(self.database if database is None else database, batch)])
        return replies

    async def run_all(self, parts: Sequence[Part]) -> list[list[Any]]:
        """Send batches for several databases in one write, to be executed in their order; the replies to each."""
        protocol = await self.open()
        if not protocol.open:  # lost between its opening and our turn
            raise RedisUnavailable("the connection to Redis was lost")
        before = self._selected
        found = _split(protocol, parts, before, await protocol.ask(self._pack_all(parts)))
        for (database, batch), replies in zip(parts, found, strict=True):
            if unknown := _unknown_scripts(self.server, protocol, batch, replies):
                again = await self.run(list(unknown.values()), database=database)
                for i, reply in zip(unknown, again, strict=True):
                    replies[i] = reply
        return found

    async def run_muted(self, command: Command, then: Command) -> Any:
        """Run `command` without its answer, which the server keeps to itself, and after it `then`; the latter's answer.

        In the connection's own database. An error of `command` is not told either.
        """
        protocol = await self.open()
        # ON is answered by itself, for all three. SKIP is not enough: Redis 6.2 forgets it when a command blocks.
        muted = b"".join(pack([("CLIENT", "REPLY", "OFF"), command, ("CLIENT", "REPLY", "ON")]))
        said, answer = await protocol.ask([muted, *pack([then])])
        if isinstance(said, ServerError):  # so more answers will come than were counted
            protocol.transport.abort()
            raise refused(said)
        if unknown := _unknown_scripts(self.server, protocol, [then], [answer]):
            [answer] = await self.run(list(unknown.values()))
        return answer

    def post(self, batch: Batch, *, database: int | None = None) -> None:
        """Write now and ignore the replies. Later commands on this connection are executed after it.

        Raises `RedisUnavailable` if no connection is open.
        """
        protocol = self._protocol
        if protocol is None or not protocol.open:
            raise RedisUnavailable
        number = self.database if database is None else database
        before = self._selected

        def repair(replies: list[Any]) -> None:
            with suppress(RedisUnavailable):
                [found] = _split(protocol, [(number, batch)], before, replies)
                if unknown := _unknown_scripts(self.server, protocol, batch, found):
                    self.post(list(unknown.values()), database=number)

        protocol.tell(self._pack_all([(number, batch)]), repair)

    def _pack_all(self, parts: Sequence[Part]) -> list[bytes]:
        packed, selected = [], self._selected
        for database, batch in parts:
            if database != selected:
                packed += pack([("SELECT", database)])
                selected = database
            packed += pack(batch)
        self._selected = selected  # only now: if a command cannot be packed, nothing is written
        return packed

    async def open(self) -> Protocol:
        """Open the connection unless it is open. Raises `RedisUnavailable`."""
        if self._protocol is not None and self._protocol.open:
            return self._protocol
        opening = self._opening
        if opening is None or opening.done():
            opening = self._opening = asyncio.create_task(self._connect())
            opening.add_done_callback(retrieve_exception)
        await asyncio.wait([opening])  # a caller that is cancelled does not cancel what others wait for
        if opening.cancelled():
            raise RedisUnavailable("the connection to Redis was closed")
        return opening.result()

    async def _connect(self) -> Protocol:
        protocol = await self.server.open(self.database, self._on_push)
        self._selected = self.database
        self._protocol = protocol
        if self._on_open is not None:
            try:
                await self._on_open(self)
            except BaseException:
                protocol.transport.abort()  # the next batch opens it anew
                raise
        return protocol

    async def close(self) -> None:
        """Drop the connection; batches under way fail. A later batch opens it again."""
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        if self._protocol is not None:
            self._protocol.transport.abort()
            await self._protocol.closed
            self._protocol = None


OnOpen = Callable[[RedisConnection], Awaitable[None]]


@dataclass(slots=True, eq=False)  # hashable, as `asyncio.gather` asks of what it awaits
class Step(Generic[T]):
    """Commands for one database together with what reads their answers. Several can leave in one write.

    Await it to run it alone. Raises `RedisUnavailable`, and whatever `read` raises.
    """

    connection: RedisConnection
    database: int
    commands: Batch
    read: Callable[[list[Any]], T]  # gets one answer for each command, an error answer as a `ServerError`

    async def _run(self) -> T:
        return self.read(await self.connection.run(self.commands, database=self.database))

    def __await__(self) -> Generator[Any, Any, T]:
        return self._run().__await__()


async def run_steps(steps: Sequence[Step[Any]]) -> list[Any]:
    """Run steps that share a connection in one write, in their order; the result of each.

    Raises `RedisUnavailable`; then none is read.
    """
    found = await steps[0].connection.run_all([(step.database, step.commands) for step in steps])
    return [step.read(answers) for step, answers in zip(steps, found, strict=True)]


def _split(protocol: Protocol, parts: Sequence[Part], selected: int, replies: list[Any]) -> list[list[Any]]:
    """The replies to each of `parts`, which were written while `selected` was the connection's database."""
    found, at = [], 0
    for database, batch in parts:
        if database != selected:
            if isinstance(replies[at], ServerError):
                protocol.transport.abort()
                raise RedisUnavailable(f"Redis refused SELECT {database}: {kind_of(replies[at])}")
            selected = database
            at += 1
        found.append(replies[at : at + len(batch)])
        at += len(batch)
    return found


def _unknown_scripts(server: _Server, protocol: Protocol, batch: Batch, replies: list[Any]) -> dict[int, Command]:
    """The scripts that the server did not know and so did not run, in full, by their place in the batch.

    Raises `RedisUnavailable` if the server is unable to work.
    """
    unknown = {}
    for i, reply in enumerate(replies):
        if isinstance(reply, ServerError):
            kind = kind_of(reply)
            if kind in UNABLE:
                # The address may lead to a server that works by now; this connection does not.
                protocol.transport.abort()
                if kind in REPLICA:
                    server.leave()
                raise refused(reply)
            if kind == "NOSCRIPT":  # the server was restarted, or its scripts were flushed
                unknown[i] = in_full(batch[i])
    return unknown


def retrieve_exception(task: asyncio.Task[Any]) -> None:
    """As a task's callback: keeps asyncio from logging a failure that nobody waits for any more."""
    if not task.cancelled():
        task.exception()


def raise_errors(replies: list[Any]) -> list[Any]:
    """`replies`, if none of them is an error. Raises `RedisUnavailable`, with the kind of the first error."""
    for reply in replies:
        if isinstance(reply, ServerError):
            raise refused(reply)
    return replies


def entries(answer: Any, count: int) -> list[Any]:
    """The answer of a script that serves `count` requests in one call: a value or an error for each.

    If the script as a whole failed, each gets its error.
    """
    return [answer] * count if isinstance(answer, ServerError) else answer


async def check_version(connection: RedisConnection) -> None:
    """As `on_open`: raises `ServerTooOld`."""
    [info] = await connection.run([("INFO", "server")])
    require_version(info)


def require_version(info: bytes | ServerError) -> None:
    """Raises `ServerTooOld` if INFO names a version older than 6.2 (Valkey names the Redis version that it replaces).

    An error passes: a user who may not ask for INFO can still do all the rest.
    """
    if isinstance(info, ServerError):
        return
    fields = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
    version = fields.get("redis_version", "0")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ServerTooOld(f"the Redis server is version {version}; 6.2 or newer is needed")
