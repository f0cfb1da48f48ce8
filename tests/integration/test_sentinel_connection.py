"""Finding the primary: sentinels that are dead, silent, late or mistaken, and servers that are none. Their words are
scripted here; real sentinels are in tests/faults/test_sentinel.py and tests/e2e/test_sentinel.py."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import hiredis
import pytest
import trustme
from support.redis_server import RedisServer
from support.tls_front import tls_in_front_of

from producer.errors import RedisUnavailable
from producer.redis.connection import RedisConnection
from worker.celery_side.redis_urls import connect

T = TypeVar("T")
BOUND = 3.0  # seconds within which "Redis is away" is promised


class Says:
    """A sentinel that names a server, in the `epoch`-th failover; silent if told so."""

    def __init__(self, port: int | None, *, epoch: int | str = 1, silent: bool = False, password: str = "") -> None:
        self.names, self.epoch, self.silent, self.password = port, epoch, silent, password
        self.asked = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        commands, known = hiredis.Reader(), not self.password
        self.asked += 1
        while data := await reader.read(65536):
            commands.feed(data)
            while (command := commands.gets()) is not False:
                if command[0] == b"AUTH":
                    known = command[-1] == self.password.encode()
                if not self.silent:
                    writer.write(self.answer(command) if known else b"-NOAUTH no\r\n")
        writer.close()

    def answer(self, command: list[bytes]) -> bytes:
        fields = {"name": "service", "ip": "127.0.0.1", "port": self.names, "flags": "master"}
        fields |= {"num-other-sentinels": 0, "config-epoch": self.epoch}
        state = _array(*(word for pair in fields.items() for word in pair))
        match [word.upper() for word in command[:2]]:
            case [b"AUTH", _]:
                return b"+OK\r\n"
            case [b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME"]:
                return b"*-1\r\n" if self.names is None else _array("127.0.0.1", self.names)
            case [b"SENTINEL", b"MASTER"] if self.names is not None:
                return state
            case [b"HELLO", b"3"]:
                return b"%1\r\n$5\r\nproto\r\n:3\r\n"
            case [b"SENTINEL", b"MASTERS"]:  # in the third version of the protocol, which redis-py speaks
                return b"*1\r\n%%%d" % len(fields) + state[state.index(b"\r\n") :]
        return b"-ERR unknown command\r\n"


def _array(*words: object) -> bytes:
    packed: bytes = hiredis.pack_command(tuple(map(str, words)))  # type: ignore[arg-type]  # its stub says a tuple of one
    return packed


@contextmanager
def speaking(*sentinels: Says) -> Iterator[str]:
    """They listen; the URL."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()

    async def begin(sentinel: Says) -> asyncio.Server:
        server = await asyncio.start_server(sentinel.serve, "127.0.0.1", 0)
        sentinel.port = server.sockets[0].getsockname()[1]
        return server

    async def end() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    try:
        servers = [asyncio.run_coroutine_threadsafe(begin(each), loop).result(5) for each in sentinels]
        yield f"redis+sentinel://{','.join(f'127.0.0.1:{each.port}' for each in sentinels)}/service/3"
        for server in servers:
            loop.call_soon_threadsafe(server.close)
        asyncio.run_coroutine_threadsafe(end(), loop).result(5)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


@pytest.fixture
def servers() -> Iterator[tuple[RedisServer, RedisServer]]:
    """A primary, and another one."""
    with ExitStack() as stack:
        yield stack.enter_context(RedisServer()), stack.enter_context(RedisServer())


def using(url: str, use: Callable[[RedisConnection], Awaitable[T]]) -> T:
    async def main() -> T:
        link = RedisConnection(url)
        try:
            return await use(link)
        finally:
            await link.close()

    return asyncio.run(main())


async def port_of(link: RedisConnection) -> int:
    [[_, port]] = await link.run([("CONFIG", "GET", "port")])
    return int(port)


def why(url: str) -> str:
    """Why no primary is found; said in time."""
    began = time.monotonic()
    with pytest.raises(RedisUnavailable) as caught:
        using(url, port_of)
    assert time.monotonic() - began < BOUND
    return str(caught.value)


def test_the_database_of_the_url_is_used_on_the_server_that_a_sentinel_names(redis_server: RedisServer) -> None:
    with speaking(Says(redis_server.port)) as url:
        using(url, lambda link: link.run([("SET", "where", "here")]))
    with redis_server.client(3) as client:
        assert client.getdel("where") == b"here"


@pytest.mark.parametrize("first", [Says(None), Says(1), Says(0, silent=True), Says(0, password="secret")])
def test_a_sentinel_of_no_help_is_passed_over_and_asked_last_from_then_on(
    redis_server: RedisServer, first: Says
) -> None:
    second, third = Says(redis_server.port), Says(redis_server.port)

    async def twice(link: RedisConnection) -> tuple[int, int]:
        found = await port_of(link)
        assert link._protocol is not None
        link._protocol.transport.abort()
        before = first.asked
        return found, (await port_of(link)) + first.asked - before

    with speaking(first, second, third) as url:
        assert using(url, twice) == (redis_server.port, redis_server.port)
    assert third.asked == 0


class Raves(Says):
    """A sentinel that answers each question with the same nonsense."""

    def __init__(self, nonsense: bytes) -> None:
        super().__init__(0)
        self.nonsense = nonsense

    def answer(self, _command: list[bytes]) -> bytes:
        return self.nonsense


NONSENSE = [
    *(Raves(each) for each in (b":1\r\n", b"*0\r\n", b"*2\r\n*0\r\n*0\r\n", _array("127.0.0.1"))),
    *(Raves(_array(*each)) for each in (("a\0b", 6379), ("127.0.0.1", "port"), ("127.0.0.1", -1))),
    *(Says(each) for each in (0, 65536)),
    Says(1, epoch="none"),
]


@pytest.mark.parametrize("first", NONSENSE, ids=range(len(NONSENSE)))
def test_a_sentinel_that_talks_nonsense_is_passed_over(redis_server: RedisServer, first: Says) -> None:
    with speaking(first, Says(redis_server.port)) as url:
        assert using(url, port_of) == redis_server.port
    with speaking(first) as url:
        assert why(url) == "a sentinel answered something else"


def test_a_replica_is_no_primary_whatever_a_sentinel_says(servers: tuple[RedisServer, RedisServer]) -> None:
    primary, replica = servers
    with replica.client() as client:
        client.replicaof("127.0.0.1", str(primary.port))
    with speaking(Says(replica.port), Says(primary.port)) as url:
        assert using(url, port_of) == primary.port
    with speaking(Says(replica.port)) as url:
        assert "no primary" in why(url)


def test_why_there_is_no_primary_is_said_in_time() -> None:
    with speaking(Says(None)) as url:
        assert "watch no 'service'" in why(url)
    with speaking(Says(0, silent=True), Says(0, silent=True), Says(0, silent=True)) as url:
        assert why(url) == "no sentinel answers"
    with speaking(Says(1)) as url:
        assert "could not be reached" in why(url)
    with speaking(Says(1, password="secret")) as url:
        assert "NOAUTH" in why(url)


def test_one_sentinel_behind_many_silent_ones_is_found_at_the_next_try(redis_server: RedisServer) -> None:
    silent = [Says(0, silent=True) for _ in range(7)]

    async def twice(link: RedisConnection) -> int:
        with pytest.raises(RedisUnavailable):
            await port_of(link)
        return await port_of(link)

    with speaking(*silent, Says(redis_server.port)) as url:
        assert using(url, twice) == redis_server.port


def test_a_sentinel_gets_its_own_password(redis_server: RedisServer) -> None:
    with speaking(Says(redis_server.port, password="secret")) as url:
        assert using(f"{url}?sentinel_password=secret", port_of) == redis_server.port
        assert "NOAUTH" in why(f"{url}?sentinel_password=wrong")


def test_a_primary_that_was_replaced_while_it_was_well_is_left_within_seconds(
    servers: tuple[RedisServer, RedisServer],
) -> None:
    old, new = servers
    late, early = Says(old.port), Says(old.port)

    async def follow(link: RedisConnection) -> float:
        assert await port_of(link) == old.port
        early.names, early.epoch = new.port, 2  # the other one has not heard of it, and the old one says it is one
        began = time.monotonic()
        while True:
            try:
                if await port_of(link) == new.port:
                    break
            except RedisUnavailable:
                pass  # it was dropped just now
            assert time.monotonic() - began < 10
            await asyncio.sleep(0.02)
        for _ in range(100):  # ... and it stays there
            assert await port_of(link) == new.port
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    with speaking(late, early) as url:
        using(url, follow)


def test_a_connection_that_nobody_uses_leaves_it_too(servers: tuple[RedisServer, RedisServer]) -> None:
    old, new = servers
    sentinel = Says(old.port)

    async def idle(link: RedisConnection) -> int:
        assert await port_of(link) == old.port
        sentinel.names, sentinel.epoch = new.port, 2
        async with asyncio.timeout(10):
            while link.connected:  # noqa: ASYNC110 - a connection has no event to wait for
                await asyncio.sleep(0.02)
        return await port_of(link)

    with speaking(sentinel) as url:
        assert using(url, idle) == new.port


def test_sentinels_that_were_set_up_anew_are_believed(redis_server: RedisServer) -> None:
    sentinel = Says(redis_server.port, epoch=7)

    async def follow(link: RedisConnection) -> int:
        await port_of(link)
        sentinel.epoch = 0
        assert link._protocol is not None
        link._protocol.transport.abort()
        return await port_of(link)

    with speaking(sentinel) as url:
        assert using(url, follow) == redis_server.port


def test_a_plain_url_asks_nobody(redis_server: RedisServer) -> None:
    async def commands(link: RedisConnection) -> int:
        await link.run([("PING",)])
        with redis_server.client() as client:
            stats: dict[str, Any] = client.info("commandstats")
        return sum(each["calls"] for name, each in stats.items() if name in {"cmdstat_role", "cmdstat_sentinel"})

    with redis_server.client() as client:
        client.config_resetstat()
    assert using(redis_server.url(), commands) == 0


def test_tls_is_spoken_with_sentinel_and_server_and_both_are_checked(redis_server: RedisServer, tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    trusted, doubtful = (ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) for _ in range(2))
    authority.issue_cert("127.0.0.1").configure_cert(trusted)
    stranger.issue_cert("127.0.0.1").configure_cert(doubtful)

    async def main(sentinel: Says, before_sentinel: ssl.SSLContext, before_server: ssl.SSLContext) -> None:
        async with (
            tls_in_front_of(sentinel.port, before_sentinel) as asked,
            tls_in_front_of(redis_server.port, before_server) as sentinel.names,
        ):
            url = f"rediss+sentinel://127.0.0.1:{asked}/service/3?ssl_ca_certs={tmp_path}/ca.pem"
            link = RedisConnection(url)
            try:
                assert await link.run([("PING",)]) == [b"PONG"]
                with connect(url, timeout=2) as client:
                    assert await asyncio.to_thread(client.ping)
            finally:
                await link.close()

    sentinel = Says(0)
    with speaking(sentinel):
        asyncio.run(main(sentinel, trusted, trusted))
        for contexts in ((doubtful, trusted), (trusted, doubtful)):
            with pytest.raises(RedisUnavailable):
                asyncio.run(main(sentinel, *contexts))
