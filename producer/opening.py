"""How a connection to a Redis server is opened: where the server is, TLS, who we are, which scripts we bring."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import hiredis
from redis.asyncio.connection import SSLConnection, parse_url

from producer.errors import RedisUnavailable
from producer.primary import Address, Finder
from producer.script import load_all
from producer.sentinel import SentinelURL, is_sentinel
from producer.wire import Protocol, auth, kind_of, packed

CONNECT_TIMEOUT = 1.0  # seconds; with the wire's ANSWER_TIMEOUT it keeps "Redis is down" within the promised 3 s

# Replies of a server that is there and cannot work: it reads its files, is in a long script, has become a replica, or
# has none where it must not write without.
AWAY = ("LOADING", "BUSY", "MASTERDOWN", "READONLY", "NOREPLICAS")

OnPush = Callable[[Any], None]


class Opener:
    """Opens connections to one server, or to whatever is a service's primary at the moment."""

    def __init__(self, url: str) -> None:
        self._service = SentinelURL.parse(url) if is_sentinel(url) else None
        self._options: dict[str, Any] = dict(parse_url(url if self._service is None else self._service.server_url()))
        self.finder = None if self._service is None else Finder(self._service, self._dial)
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
                raise RedisUnavailable(f"Redis refused the connection ({kind_of(reply)})")


def _require_primary(role: Any) -> None:
    # A user without the right to ask is no reason not to work: a replica takes no writes anyway.
    if isinstance(role, list) and role[:1] != [b"master"]:
        raise RedisUnavailable("the server that a sentinel names is no primary")
