"""One pipelined asyncio connection to a Redis server: many commands leave in one write, replies come back in order.

redis-py's own asyncio pipeline costs four times as much for each command, which is most of what a request costs here.
Everything but the pipeline (URL, TLS options) is redis-py's.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import hiredis
from redis.asyncio.connection import SSLConnection, parse_url

from producer.errors import RedisUnavailable, ServerTooOld
from producer.script import Command, in_full, load_all

CONNECT_TIMEOUT = 1.0  # seconds; with ANSWER_TIMEOUT it keeps "Redis is down" within the promised 3 s
ANSWER_TIMEOUT = 1.5  # seconds a batch waits for its replies before the connection counts as dead
OLDEST = (6, 2)

# Replies of a server that is there and cannot work: it reads its files, is in a long script, has become a replica.
_AWAY = ("LOADING", "BUSY", "MASTERDOWN", "READONLY")
_PUSHED = ([b"message"], [b"pmessage"])

Batch = Sequence[Command]
ServerError = hiredis.ReplyError


class _Protocol(asyncio.Protocol):
    """The wire: matches replies with the batches that wait for them."""

    def __init__(self, on_push: Callable[[Any], None] | None) -> None:
        self.reader = hiredis.Reader()
        self.waiting: deque[tuple[asyncio.Future[list[Any]], int, list[Any]]] = deque()
        self.closed = asyncio.get_running_loop().create_future()
        self.on_push = on_push
        self.transport: asyncio.Transport

    @property
    def open(self) -> bool:
        """Whether a batch may be written: no more once the transport is given up, even before it says it is lost."""
        return not self.closed.done() and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # TCP and TLS both are like it; uvloop's are none

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        try:
            while (reply := self.reader.gets()) is not False:
                self._take(reply)
        except hiredis.ProtocolError:
            self.transport.abort()

    def _take(self, reply: Any) -> None:
        if self.on_push is not None and isinstance(reply, list) and reply[:1] in _PUSHED:
            self.on_push(reply)
            return
        if not self.waiting:
            return
        future, size, replies = self.waiting[0]
        replies.append(reply)
        if len(replies) == size:
            self.waiting.popleft()
            if not future.done():
                future.set_result(replies)

    def connection_lost(self, _exc: Exception | None) -> None:
        for future, _, _ in self.waiting:
            if not future.done():
                future.set_exception(RedisUnavailable("the connection to Redis was lost"))
        self.waiting.clear()
        if not self.closed.done():
            self.closed.set_result(None)

    def write(self, packed: bytes, size: int) -> asyncio.Future[list[Any]]:
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self.waiting.append((future, size, []))
        self.transport.write(packed)
        return future


class Link:
    """A connection that is opened when first needed and again after it was lost.

    `run` raises `RedisUnavailable` within CONNECT_TIMEOUT + ANSWER_TIMEOUT seconds. Error replies to single commands
    are returned in their place as `ServerError` objects. A batch that was cut may have been executed, whole or in part.
    """

    def __init__(
        self,
        url: str,
        *,
        on_push: Callable[[Any], None] | None = None,
        on_open: Callable[[Link], Awaitable[None]] | None = None,
    ) -> None:
        self._options: dict[str, Any] = dict(parse_url(url))
        self._on_push = on_push
        self._on_open = on_open
        self._protocol: _Protocol | None = None
        self._opening: asyncio.Task[_Protocol] | None = None
        self._posted: set[asyncio.Future[list[Any]]] = set()
        self.database = int(self._options.get("db") or 0)
        self._selected = self.database

    @property
    def server(self) -> tuple[Any, ...]:
        """What tells whether two URLs mean one server and one user, so that one connection serves both."""
        options = {name: value for name, value in self._options.items() if name != "db"}
        return tuple(sorted((name, str(value)) for name, value in options.items()))

    @property
    def connected(self) -> bool:
        """Whether a connection is open now."""
        return self._protocol is not None and self._protocol.open

    async def run(self, batch: Batch, *, database: int | None = None) -> list[Any]:
        """Send all commands of a batch in one write; their replies in order."""
        return await self.start(batch, database=database, protocol=await self._open())

    def start(
        self, batch: Batch, *, database: int | None = None, protocol: _Protocol | None = None
    ) -> Awaitable[list[Any]]:
        """Write now, without waiting: what follows on this connection comes after it, even if we are killed.

        Raises `RedisUnavailable` if no connection is open.
        """
        protocol = protocol or self._protocol
        if protocol is None or not protocol.open:
            raise RedisUnavailable
        wanted = self.database if database is None else database
        commands = [_pack(command) for command in batch]
        switch = wanted != self._selected
        if switch:
            commands.insert(0, _pack(("SELECT", wanted)))
            self._selected = wanted
        future = protocol.write(b"".join(commands), len(commands))
        return self._answer(protocol, future, batch, wanted, skip=int(switch))

    def post(self, batch: Batch, *, database: int | None = None) -> None:
        """Write now, and do not care about the replies. Raises `RedisUnavailable` if no connection is open."""
        task = asyncio.ensure_future(self.start(batch, database=database))
        self._posted.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Future[list[Any]]) -> None:
        self._posted.discard(task)
        if not task.cancelled():
            task.exception()

    async def _answer(
        self, protocol: _Protocol, future: asyncio.Future[list[Any]], batch: Batch, database: int, *, skip: int
    ) -> list[Any]:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                replies = await future
        except TimeoutError:
            # Replies come in order: after a lost one, nothing on this connection can be matched.
            protocol.transport.abort()
            raise RedisUnavailable("Redis did not answer in time") from None
        if skip and isinstance(replies[0], ServerError):
            protocol.transport.abort()
            raise RedisUnavailable(f"Redis refused SELECT {database}: {_kind(replies[0])}")
        del replies[:skip]
        for reply in replies:
            if isinstance(reply, ServerError) and _kind(reply) in _AWAY:
                # The address may lead to a server that works by now; this connection does not.
                protocol.transport.abort()
                raise RedisUnavailable(f"Redis does not work at the moment ({_kind(reply)})")
        unknown = [
            i for i, reply in enumerate(replies) if isinstance(reply, ServerError) and _kind(reply) == "NOSCRIPT"
        ]
        if unknown:
            # Nothing of these was executed: the server was restarted or its scripts were flushed.
            again = await self.run([in_full(batch[i]) for i in unknown], database=database)
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        return replies

    async def _open(self) -> _Protocol:
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

    def _opened(self, task: asyncio.Task[_Protocol]) -> None:
        if self._opening is task:
            self._opening = None
        if not task.cancelled():
            task.exception()  # seen, even if nobody waits any more

    async def _connect(self) -> _Protocol:
        protocol: _Protocol | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                protocol = await self._dial()
                await self._greet(protocol)
        except BaseException as exc:
            if protocol is not None:
                protocol.transport.abort()
            # UnicodeError: a host name that IDNA cannot take.
            if isinstance(exc, OSError | UnicodeError) and not isinstance(exc, RedisUnavailable):
                raise RedisUnavailable(f"Redis could not be reached ({type(exc).__name__})") from None
            raise
        self._protocol = protocol
        if self._on_open is not None:
            try:
                await self._on_open(self)
            except BaseException:
                protocol.transport.abort()  # half open it would serve nobody: the next batch begins anew
                raise
        return protocol

    async def _dial(self) -> _Protocol:
        options = self._options
        tls: ssl.SSLContext | None = None
        if options.get("connection_class") is SSLConnection:
            tls = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
            if options.get("ssl_check_hostname") is False or options.get("ssl_cert_reqs") == "none":
                tls.check_hostname = False
            if options.get("ssl_cert_reqs") == "none":
                tls.verify_mode = ssl.CERT_NONE
            if options.get("ssl_certfile"):
                tls.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
        _, protocol = await asyncio.get_running_loop().create_connection(
            lambda: _Protocol(self._on_push), options.get("host", "localhost"), options.get("port", 6379), ssl=tls
        )
        return protocol

    async def _greet(self, protocol: _Protocol) -> None:
        greeting: list[Command] = []
        if self._options.get("password"):
            user = self._options.get("username")
            greeting.append(("AUTH", *([user] if user else []), self._options["password"]))
        greeting.append(("SELECT", self.database))
        self._selected = self.database
        # Scripts go first: one found missing would run after the commands that were written behind it.
        packed = [_pack(command) for command in (*greeting, *load_all())]
        replies = await protocol.write(b"".join(packed), len(packed))
        for i, reply in enumerate(replies):
            # A user without the right to load may still have that to run.
            if isinstance(reply, ServerError) and (i < len(greeting) or _kind(reply) in _AWAY):
                raise RedisUnavailable(f"Redis refused the connection ({_kind(reply)})")

    async def close(self) -> None:
        """Drop the connection; batches under way fail."""
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        if self._protocol is not None:
            self._protocol.transport.abort()
            await self._protocol.closed
            self._protocol = None


def _pack(command: Command) -> bytes:
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its stub says a tuple of one
    return packed


def _kind(error: Exception) -> str:
    """The first word of an error reply: the rest may quote keys."""
    return str(error).partition(" ")[0]


def raise_errors(replies: list[Any]) -> list[Any]:
    """`replies`, if none is an error. Raises `RedisUnavailable` with the kind of the first that is."""
    for reply in replies:
        if isinstance(reply, ServerError):
            raise RedisUnavailable(f"Redis answered an error ({_kind(reply)})")
    return replies


def require_version(info: bytes | str) -> None:
    """Raises `ServerTooOld` if INFO tells of a server older than 6.2 (Valkey tells the Redis version it stands for)."""
    text = info.decode() if isinstance(info, bytes) else info
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    version = fields.get("redis_version", "0")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ServerTooOld(f"the Redis server is version {version}; 6.2 or newer is needed")
