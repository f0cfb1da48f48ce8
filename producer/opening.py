"""How a connection to a Redis server is opened: where the server is, TLS, who we are, which scripts we bring.

Where the URL names sentinels, each opening asks them for the primary, in turn, the last that answered first. What they
name counts only once it says itself that it is one; it says so in the greeting, which costs no trip.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any

import hiredis
from redis.asyncio.connection import SSLConnection, parse_url

from producer.errors import RedisUnavailable
from producer.script import Command, load_all
from producer.sentinel import SentinelURL, is_sentinel
from producer.wire import Protocol

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 1.0  # seconds; with the wire's ANSWER_TIMEOUT it keeps "Redis is down" within the promised 3 s
ASK_TIMEOUT = 0.2  # seconds for one sentinel, its connection included: two that are silent leave time for the third

# Replies of a server that is there and cannot work: it reads its files, is in a long script, has become a replica.
AWAY = ("LOADING", "BUSY", "MASTERDOWN", "READONLY")

OnPush = Callable[[Any], None]
Address = tuple[str, int]


class Opener:
    """Opens connections to one server, or to whatever is a service's primary at the moment."""

    def __init__(self, url: str) -> None:
        self._service = SentinelURL.parse(url) if is_sentinel(url) else None
        self._options: dict[str, Any] = dict(parse_url(url if self._service is None else self._service.server_url()))
        self._sentinels = list(self._service.sentinels) if self._service is not None else []
        self._primary: Address | None = None
        self.database = int(self._options.get("db") or 0)

    @property
    def server(self) -> tuple[Any, ...]:
        """What tells whether two URLs mean one server and one user, so that one connection serves both."""
        options = {name: value for name, value in self._options.items() if name != "db"}
        service = self._service.with_database(0) if self._service is not None else None
        return (service, *sorted((name, str(value)) for name, value in options.items()))

    async def open(self, on_push: OnPush | None) -> Protocol:
        """A connection that is ready for commands. Raises `RedisUnavailable` within CONNECT_TIMEOUT seconds."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                if self._service is not None:
                    return await self._open_primary(self._service, on_push)
                address = (self._options.get("host", "localhost"), self._options.get("port", 6379))
                return await self._open_server(address, on_push)
        except RedisUnavailable:
            raise
        except (OSError, UnicodeError) as exc:  # UnicodeError: a host name that IDNA cannot take
            raise RedisUnavailable(f"Redis could not be reached ({type(exc).__name__})") from None

    async def _open_primary(self, service: SentinelURL, on_push: OnPush | None) -> Protocol:
        why = "no sentinel answers"
        tried: set[Address] = set()
        for sentinel in list(self._sentinels):
            try:
                async with asyncio.timeout(ASK_TIMEOUT):
                    address = await self._ask(sentinel, service)
            except RedisUnavailable as exc:
                why = str(exc)
                continue
            except (OSError, UnicodeError):
                continue
            if address in tried:
                continue
            tried.add(address)
            # It is asked last, unless what it says proves right: if our time ends meanwhile, others are asked next.
            self._sentinels.remove(sentinel)
            self._sentinels.append(sentinel)
            try:
                protocol = await self._open_server(address, on_push)
            except (OSError, UnicodeError) as exc:
                why = f"the primary of {service.service!r} could not be reached ({type(exc).__name__})"
                if isinstance(exc, RedisUnavailable):
                    why = str(exc)
                continue
            self._sentinels.insert(0, self._sentinels.pop())
            if self._primary not in {None, address}:
                logger.info("the primary of %s is now %s port %d", service.service, *address)
            self._primary = address
            return protocol
        raise RedisUnavailable(why)

    async def _ask(self, sentinel: Address, service: SentinelURL) -> Address:
        protocol = await self._dial(sentinel, None)
        try:
            greeting = _auth(service.sentinel_user, service.sentinel_password)
            question: Command = ("SENTINEL", "get-master-addr-by-name", service.service)
            *_, answer = await protocol.ask(*_packed([*greeting, question]))
        finally:
            protocol.transport.abort()
        if isinstance(answer, hiredis.ReplyError):
            raise RedisUnavailable(f"a sentinel refused to answer ({kind_of(answer)})")
        if answer is None:
            raise RedisUnavailable(f"the sentinels watch no {service.service!r}")
        host, port = answer
        return host.decode(), int(port)

    async def _open_server(self, address: Address, on_push: OnPush | None) -> Protocol:
        protocol = await self._dial(address, on_push)
        try:
            await self._greet(protocol)
        except BaseException:
            protocol.transport.abort()
            raise
        return protocol

    async def _dial(self, address: Address, on_push: OnPush | None) -> Protocol:
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
        _, protocol = await asyncio.get_running_loop().create_connection(lambda: Protocol(on_push), *address, ssl=tls)
        return protocol

    async def _greet(self, protocol: Protocol) -> None:
        greeting = _auth(self._options.get("username"), self._options.get("password"))
        greeting.append(("SELECT", self.database))
        if self._service is not None:
            greeting.append(("ROLE",))
        # Scripts go first: one found missing would run after the commands that were written behind it.
        replies = await protocol.ask(*_packed([*greeting, *load_all()]))
        for i, reply in enumerate(replies):
            if i == len(greeting) - 1 and self._service is not None:
                _require_primary(reply)
            # A user without the right to load may still have that to run.
            elif isinstance(reply, hiredis.ReplyError) and (i < len(greeting) or kind_of(reply) in AWAY):
                raise RedisUnavailable(f"Redis refused the connection ({kind_of(reply)})")


def _require_primary(role: Any) -> None:
    """A user without the right to ask is no reason not to work: a replica takes no writes anyway."""
    if isinstance(role, hiredis.ReplyError):
        if kind_of(role) in AWAY:
            raise RedisUnavailable(f"Redis refused the connection ({kind_of(role)})")
    elif role[0] != b"master":
        raise RedisUnavailable("the server that a sentinel names is no primary")


def _auth(user: str | None, password: str | None) -> list[Command]:
    if not password:
        return []
    return [("AUTH", user, password) if user else ("AUTH", password)]


def _packed(commands: list[Command]) -> tuple[bytes, int]:
    return b"".join(map(pack, commands)), len(commands)


def pack(command: Command) -> bytes:
    """The command as it travels."""
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its stub says a tuple of one
    return packed


def kind_of(error: Exception) -> str:
    """The first word of an error reply: the rest may quote keys."""
    return str(error).partition(" ")[0]
