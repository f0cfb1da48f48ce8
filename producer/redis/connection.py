"""One pipelined asyncio connection to a Redis server: many commands leave in one write, replies come back in order.

redis-py's own asyncio pipeline costs four times as much for each command, which is most of what a request costs here.
Everything but the pipeline (URL, TLS options) is redis-py's.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import SSLConnection, parse_url

from producer.errors import RedisUnavailable, ServerTooOld
from producer.redis.protocol import Protocol, auth, kind_of, pack, packed, refused
from producer.redis.scripts import Command, in_full, load_all
from producer.redis.sentinel import Address, PrimaryFinder
from producer.setting_types import SentinelURL, is_sentinel

CONNECT_TIMEOUT = 1.0  # seconds; with the wire's ANSWER_TIMEOUT it keeps "Redis is down" within the promised 3 s

# Replies of a server that is there and cannot work: it reads its files, is in a long script, has become a replica, or
# has none where it must not write without.
AWAY = ("LOADING", "BUSY", "MASTERDOWN", "READONLY", "NOREPLICAS")

OnPush = Callable[[Any], None]


class Connector:
    """Opens connections to one server, or to whatever is a service's primary at the moment."""

    def __init__(self, url: str) -> None:
        self._service = SentinelURL.parse(url) if is_sentinel(url) else None
        self._options: dict[str, Any] = dict(parse_url(url if self._service is None else self._service.server_url()))
        self.finder = None if self._service is None else PrimaryFinder(self._service, self._dial)
        self.database = int(self._options.get("db") or 0)
        self._tls: ssl.SSLContext | None = None

    @property
    def server(self) -> tuple[Any, ...]:
        """What tells whether two URLs mean one server and one user, so that one connection serves both."""
        options = {name: value for name, value in self._options.items() if name != "db"}
        service = self._service.with_database(0) if self._service is not None else None
        return (service, *sorted((name, str(value)) for name, value in options.items()))

    async def open(self, on_push: OnPush | None) -> Protocol:
        """A connection that is ready for commands. Raises `RedisUnavailable` within CONNECT_TIMEOUT seconds."""

        async def connect(address: Address) -> Protocol:
            protocol = await self._dial(address, on_push)
            try:
                await self._greet(protocol)
            except BaseException:
                protocol.transport.abort()
                raise
            return protocol

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                # Anew for each connection, for files change; not for each sentinel that is asked: to read what a host
                # trusts takes some 20 ms, in which the loop stands still, and they are asked every second.
                self._tls = self._trust()
                if self.finder is not None:
                    return await self.finder.find(connect)
                return await connect((self._options.get("host", "localhost"), self._options.get("port", 6379)))
        except RedisUnavailable:
            raise
        except (OSError, UnicodeError) as exc:  # UnicodeError: a host name that IDNA cannot take
            raise RedisUnavailable(f"Redis could not be reached ({type(exc).__name__})") from None

    async def _dial(self, address: Address, on_push: OnPush | None = None) -> Protocol:
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(lambda: Protocol(on_push), *address, ssl=self._tls)
        return protocol

    def _trust(self) -> ssl.SSLContext | None:
        options = self._options
        if options.get("connection_class") is not SSLConnection:
            return None
        tls = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
        if options.get("ssl_check_hostname") is False or options.get("ssl_cert_reqs") == "none":
            tls.check_hostname = False
        if options.get("ssl_cert_reqs") == "none":
            tls.verify_mode = ssl.CERT_NONE
        if options.get("ssl_certfile"):
            tls.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
        return tls

    async def _greet(self, protocol: Protocol) -> None:
        greeting = auth(self._options.get("username"), self._options.get("password"))
        greeting.append(("SELECT", self.database))
        if self.finder is not None:
            greeting.append(("ROLE",))
        # Scripts go first: one found missing would run after the commands that were written behind it.
        replies = await protocol.ask(*packed([*greeting, *load_all()]))
        if self.finder is not None:
            _require_primary(replies.pop(len(greeting) - 1))
            greeting.pop()
        for i, reply in enumerate(replies):
            # A user without the right to load may still have that to run.
            if isinstance(reply, hiredis.ReplyError) and (i < len(greeting) or kind_of(reply) in AWAY):
                raise refused(reply)


def _require_primary(role: Any) -> None:
    # A user without the right to ask is no reason not to work: a replica takes no writes anyway.
    if isinstance(role, list) and role[:1] != [b"master"]:
        raise RedisUnavailable("the server that a sentinel names is no primary")


REDIS_TIMEOUT = 2.6  # seconds until "Redis cannot be reached", which is promised within 3
TOO_LATE = "Redis did not answer in time"


async def check_version(link: RedisConnection) -> None:
    """For a connection that was just opened. Raises `ServerTooOld`."""
    [info] = await link.run([("INFO", "server")])
    require_version(info)


OLDEST = (6, 2)

Batch = Sequence[Command]
Part = tuple[int, Batch]  # a database's number, and what is for it
ServerError = hiredis.ReplyError


class RedisConnection:
    """A connection that is opened when first needed and again after it was lost.

    `run` raises `RedisUnavailable` within CONNECT_TIMEOUT + ANSWER_TIMEOUT seconds. Error replies to single commands
    are returned in their place as `ServerError` objects. A batch that was cut may have been executed, whole or in part.
    """

    def __init__(
        self,
        url: str,
        *,
        on_push: Callable[[Any], None] | None = None,
        on_open: Callable[[RedisConnection], Awaitable[None]] | None = None,
    ) -> None:
        self._opener = Connector(url)
        self._on_push = on_push
        self._on_open = on_open
        self._protocol: Protocol | None = None
        self._opening: asyncio.Task[Protocol] | None = None
        self._unheard: set[asyncio.Future[list[list[Any]]]] = set()  # posts whose replies want a second look
        self.database = self._opener.database
        self._selected = self.database

    @property
    def server(self) -> tuple[Any, ...]:
        """What tells whether two URLs mean one server and one user, so that one connection serves both."""
        return self._opener.server

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
        protocol = await self._open()
        if not protocol.open:  # lost in the moment between its opening and our turn
            raise RedisUnavailable("the connection to Redis was lost")
        before = self._selected
        return await self._read(protocol, parts, before, await protocol.ask(*self._pack_all(parts)))

    def post(self, batch: Batch, *, database: int | None = None) -> None:
        """Write now, and do not care about the replies: what follows on this connection comes after it.

        Raises `RedisUnavailable` if no connection is open.
        """
        protocol = self._protocol
        if protocol is None or not protocol.open:
            raise RedisUnavailable
        parts = [(self.database if database is None else database, batch)]
        before = self._selected

        def then(replies: list[Any]) -> None:
            if _has_error(replies):
                task = asyncio.ensure_future(self._read(protocol, parts, before, replies))
                self._unheard.add(task)
                task.add_done_callback(self._forget)

        protocol.tell(*self._pack_all(parts), then)

    def _forget(self, task: asyncio.Future[list[list[Any]]]) -> None:
        self._unheard.discard(task)
        if not task.cancelled():
            task.exception()

    def _pack_all(self, parts: Sequence[Part]) -> tuple[bytes, int]:
        """The bytes to write, and how many replies they will get."""
        packed, selected = [], self._selected
        for database, batch in parts:
            if database != selected:
                packed.append(pack(("SELECT", database)))
                selected = database
            packed += map(pack, batch)
        self._selected = selected  # only now: what cannot be packed is not written
        return b"".join(packed), len(packed)

    async def _read(
        self, protocol: Protocol, parts: Sequence[Part], selected: int, replies: list[Any]
    ) -> list[list[Any]]:
        """The replies to each of `parts`, which were written where `selected` was. What was unknown is run in full."""
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
        if _has_error(replies):
            for (database, batch), answers in zip(parts, found, strict=True):
                await self._mend(protocol, database, batch, answers)
        return found

    async def _mend(self, protocol: Protocol, database: int, batch: Batch, replies: list[Any]) -> None:
        errors = {i: kind_of(reply) for i, reply in enumerate(replies) if isinstance(reply, ServerError)}
        for kind in errors.values():
            if kind in AWAY:
                # The address may lead to a server that works by now; this connection does not.
                protocol.transport.abort()
                raise RedisUnavailable(f"Redis does not work at the moment ({kind})")
        unknown = [i for i, kind in errors.items() if kind == "NOSCRIPT"]
        if unknown:
            # Nothing of these was executed: the server was restarted or its scripts were flushed.
            again = await self.run([in_full(batch[i]) for i in unknown], database=database)
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply

    async def _open(self) -> Protocol:
        if self._protocol is not None and self._protocol.open:
            return self._protocol
        opening = self._opening
        if opening is None:
            opening = self._opening = asyncio.create_task(self._connect())
            opening.add_done_callback(self._opened)
        await asyncio.wait([opening])  # a caller that is cancelled does not cancel what others wait for
        if opening.cancelled():
            raise RedisUnavailable("the connection to Redis was closed")
        return opening.result()

    def _opened(self, task: asyncio.Task[Protocol]) -> None:
        if self._opening is task:
            self._opening = None
        if not task.cancelled():
            task.exception()  # seen, even if nobody waits any more

    async def _connect(self) -> Protocol:
        protocol = await self._opener.open(self._on_push)
        self._selected = self.database
        self._protocol = protocol
        if self._on_open is not None:
            try:
                await self._on_open(self)
            except BaseException:
                protocol.transport.abort()  # half open it would serve nobody: the next batch begins anew
                raise
        return protocol

    async def close(self) -> None:
        """Drop the connection; batches under way fail."""
        if self._opener.finder is not None:
            await self._opener.finder.close()
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        if self._protocol is not None:
            self._protocol.transport.abort()
            await self._protocol.closed
            self._protocol = None


def _has_error(replies: list[Any]) -> bool:
    return any(isinstance(reply, ServerError) for reply in replies)


def raise_errors(replies: list[Any]) -> list[Any]:
    """`replies`, if none of them is an error. Raises `RedisUnavailable`, with the kind of the first error."""
    for reply in replies:
        if isinstance(reply, ServerError):
            raise refused(reply)
    return replies


def entries(answer: Any, count: int) -> list[Any]:
    """What a script answered that serves `count` requests in one call: an entry, or an error, for each.

    An error instead of that list is everyone's.
    """
    return [answer] * count if isinstance(answer, ServerError) else answer


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
