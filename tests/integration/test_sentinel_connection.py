"""Finding a service's primary through sentinels that fail in every way, and following it when it is replaced.

The sentinels are fakes here; real ones are in tests/faults/test_sentinel.py and tests/e2e/test_sentinel.py.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import hiredis
import pytest
import trustme
from support.redis_server import RedisServer
from support.tls_front import tls_in_front_of

from producer.errors import RedisLoginRefused, RedisUnavailable
from producer.redis import sentinel as sentinel_module
from producer.redis.connection import RedisConnection, RedisConnections
from worker.celery_side.redis_urls import connect

Servers = tuple[RedisServer, RedisServer]


class FakeSentinel:
    """Names a server as the primary of "service", made so by failover number `epoch`."""

    def __init__(
        self,
        primary: int | None,
        *,
        epoch: int | str = 1,
        silent: bool = False,
        password: str = "",
        refuses: bytes = b"",
        nonsense: bytes = b"",
    ) -> None:
        """`primary`: a port; None if it watches no such service. `refuses`: a command. `nonsense`: its only answer."""
        self.primary, self.epoch = primary, epoch
        self.silent, self.password, self.refuses, self.nonsense = silent, password, refuses, nonsense
        self.port = 0
        self.connections = self.questions = 0  # so far
        self.open: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        commands, known = hiredis.Reader(), not self.password
        self.connections += 1
        self.open.append(writer)
        while data := await reader.read(65536):
            commands.feed(data)
            while (command := commands.gets()) is not False:
                if command[0] == b"AUTH":
                    known = command[-1] == self.password.encode()
                if not self.silent:
                    writer.write(self.answer(command) if known else b"-NOAUTH no\r\n")
        self.open.remove(writer)
        writer.close()

    def answer(self, command: list[bytes]) -> bytes:
        state = {"name": "service", "ip": "127.0.0.1", "port": self.primary, "flags": "master"}
        state |= {"num-other-sentinels": 0, "config-epoch": self.epoch}
        flat = _array(*(word for pair in state.items() for word in pair))
        as_map = b"%%%d" % len(state) + flat[flat.index(b"\r\n") :]  # as in version 3 of the protocol
        if self.nonsense:
            return self.nonsense
        match [word.upper() for word in command[:2]]:
            case [word, *_] if word == self.refuses:
                return b"-NOPERM no\r\n"
            case [b"AUTH", _]:
                return b"+OK\r\n"
            case [b"HELLO", b"3"]:
                return b"%1\r\n$5\r\nproto\r\n:3\r\n"
            case [b"SUBSCRIBE", _]:
                return b">3\r\n" + _array("subscribe", "+switch-master")[4:] + b":1\r\n"
            case [b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME"]:
                self.questions += 1
                return b"*-1\r\n" if self.primary is None else _array("127.0.0.1", self.primary)
            case [b"SENTINEL", b"MASTER"] if self.primary is not None:
                return flat if self.refuses == b"HELLO" else as_map
            case [b"SENTINEL", b"MASTERS"]:  # redis-py's question
                return b"*1\r\n" + as_map
        return b"-ERR unknown command\r\n"

    def fail_over(self, primary: int, *, announce: bool) -> None:
        self.primary, self.epoch = primary, int(self.epoch) + 1
        for writer in self.open if announce else ():
            writer.write(b">3\r\n" + _array("message", "+switch-master", "service 127.0.0.1 1 127.0.0.1 2")[4:])


def _array(*words: object) -> bytes:
    packed: bytes = hiredis.pack_command(tuple(map(str, words)))  # type: ignore[arg-type]  # its stub says a tuple of one
    return packed


@asynccontextmanager
async def serving(*sentinels: FakeSentinel) -> AsyncIterator[str]:
    """The sentinels listen; the URL of their service's database 3."""
    async with AsyncExitStack() as stack:
        for each in sentinels:
            server = await stack.enter_async_context(await asyncio.start_server(each.serve, "127.0.0.1", 0))
            each.port = server.sockets[0].getsockname()[1]
        yield f"redis+sentinel://{','.join(f'127.0.0.1:{each.port}' for each in sentinels)}/service/3"


@asynccontextmanager
async def connected(*sentinels: FakeSentinel, query: str = "") -> AsyncIterator[RedisConnection]:
    """A connection to the sentinels' service."""
    async with asyncio.timeout(60), serving(*sentinels) as url, RedisConnections() as redis:
        yield redis.connection(url + query)


async def port_of(connection: RedisConnection) -> int:
    [[_, port]] = await connection.run([("CONFIG", "GET", "port")])
    return int(port)


async def find(*sentinels: FakeSentinel, query: str = "") -> int:
    """The port of the primary that a new connection finds."""
    async with connected(*sentinels, query=query) as connection:
        return await port_of(connection)


async def failure(*sentinels: FakeSentinel, query: str = "") -> RedisUnavailable:
    with pytest.raises(RedisUnavailable) as caught:
        await find(*sentinels, query=query)
    return caught.value


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 - the caller limits the time
        await asyncio.sleep(0.02)


@pytest.fixture
def servers() -> Iterator[Servers]:
    """A primary, and another server."""
    with ExitStack() as stack:
        yield stack.enter_context(RedisServer()), stack.enter_context(RedisServer())


async def test_the_database_of_the_url_is_used_on_the_primary(redis_server: RedisServer) -> None:
    async with connected(FakeSentinel(redis_server.port)) as connection:
        await connection.run([("SET", "key", "a")])
    with redis_server.client(3) as client:
        assert client.getdel("key") == b"a"


UNHELPFUL: dict[str, dict[str, Any]] = {
    "watches no such service": {"primary": None},
    "names a dead server": {"primary": 1},
    "is silent": {"primary": 1, "silent": True},
    "wants a password": {"primary": 1, "password": "secret"},
}


@pytest.mark.parametrize("unhelpful", UNHELPFUL.values(), ids=UNHELPFUL)
async def test_an_unhelpful_sentinel_is_passed_over(redis_server: RedisServer, unhelpful: dict[str, Any]) -> None:
    sentinels = [*(FakeSentinel(**unhelpful) for _ in range(7)), FakeSentinel(redis_server.port)]
    async with connected(*sentinels) as connection:
        for _ in range(3):
            assert await port_of(connection) == redis_server.port
            await connection.close()


NONSENSE = [
    *(FakeSentinel(1, nonsense=each) for each in (b":1\r\n", b"*0\r\n", b"*2\r\n*0\r\n*0\r\n", _array("127.0.0.1"))),
    *(FakeSentinel(1, nonsense=_array(*each)) for each in (("a\0b", 6379), ("127.0.0.1", "port"), ("127.0.0.1", -1))),
    *(FakeSentinel(each) for each in (0, 65536)),
    FakeSentinel(1, epoch="none"),
]


@pytest.mark.parametrize("first", NONSENSE, ids=range(len(NONSENSE)))
async def test_a_sentinel_that_answers_nonsense_is_passed_over(redis_server: RedisServer, first: FakeSentinel) -> None:
    assert await find(first, FakeSentinel(redis_server.port)) == redis_server.port
    assert str(await failure(first)) == "a sentinel gave an invalid answer"


async def test_a_replica_is_never_taken_for_the_primary(servers: Servers) -> None:
    primary, replica = servers
    with replica.client() as client:
        client.replicaof("127.0.0.1", str(primary.port))
    assert await find(FakeSentinel(replica.port, epoch=2), FakeSentinel(primary.port)) == primary.port
    assert "no primary" in str(await failure(FakeSentinel(replica.port)))


async def test_the_error_says_why_no_primary_was_found() -> None:
    assert "watch no 'service'" in str(await failure(FakeSentinel(None)))
    assert str(await failure(*(FakeSentinel(1, silent=True) for _ in range(3)))) == "no sentinel answers"
    assert "could not be reached" in str(await failure(FakeSentinel(1)))


async def test_a_sentinel_gets_its_own_password(redis_server: RedisServer) -> None:
    sentinel = FakeSentinel(redis_server.port, password="secret")
    assert await find(sentinel, query="?sentinel_password=secret") == redis_server.port
    refused = await failure(sentinel, query="?sentinel_password=wrong")
    assert isinstance(refused, RedisLoginRefused)
    assert str(refused).startswith("a sentinel refused the login (NOAUTH): check sentinel_username and")


async def test_connections_to_one_service_share_one_connection_to_each_sentinel(redis_server: RedisServer) -> None:
    sentinels = [FakeSentinel(redis_server.port) for _ in range(3)]
    async with asyncio.timeout(60), serving(*sentinels) as url:
        async with RedisConnections() as redis:
            connections = [redis.connection(f"{url[:-1]}{database}") for database in range(10)]
            for _ in range(3):
                await asyncio.gather(*map(port_of, connections))
                await asyncio.gather(*(each.close() for each in connections))
            assert [len(each.open) for each in sentinels] == [1, 1, 1]
        await until(lambda: not any(each.open for each in sentinels))
    assert [each.connections for each in sentinels] == [1, 1, 1]
    assert max(each.questions for each in sentinels) < 5


async def test_an_announced_failover_moves_all_connections(servers: Servers) -> None:
    old, new = servers
    late, early = FakeSentinel(old.port), FakeSentinel(old.port)
    async with asyncio.timeout(60), serving(late, early) as url, RedisConnections() as redis:
        connections = [redis.connection(f"{url[:-1]}{database}") for database in range(5)]
        assert {await port_of(each) for each in connections} == {old.port}
        early.fail_over(new.port, announce=True)  # the other one has not heard of it, and the old primary is healthy
        await until(lambda: not any(each.connected for each in connections))  # though nobody uses them
        for _ in range(20):
            assert {await port_of(each) for each in connections} == {new.port}
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("refuses", "interval"), [(b"", "POLL_EVERY"), (b"HELLO", "LOOK_EVERY"), (b"SUBSCRIBE", "LOOK_EVERY")]
)
async def test_a_failover_that_is_not_announced_is_noticed_by_asking(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, refuses: bytes, interval: str
) -> None:
    monkeypatch.setattr(sentinel_module, interval, 0.1)
    old, new = servers
    sentinel = FakeSentinel(old.port, refuses=refuses)
    async with connected(sentinel) as connection:
        assert await port_of(connection) == old.port
        sentinel.fail_over(new.port, announce=False)
        await until(lambda: not connection.connected)
        assert await port_of(connection) == new.port


async def test_a_lost_connection_to_a_sentinel_is_opened_again(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentinel_module, "LOOK_EVERY", 0.1)
    old, new = servers
    sentinel = FakeSentinel(old.port)
    async with connected(sentinel) as connection:
        assert await port_of(connection) == old.port
        [lost] = sentinel.open
        lost.transport.abort()
        await until(lambda: sentinel.connections == 2)
        assert connection.connected
        sentinel.fail_over(new.port, announce=True)
        await until(lambda: not connection.connected)
        assert await port_of(connection) == new.port


async def test_sentinels_that_were_set_up_anew_are_believed(redis_server: RedisServer) -> None:
    sentinel = FakeSentinel(redis_server.port, epoch=7)
    async with connected(sentinel) as connection:
        await port_of(connection)
        sentinel.epoch = 0
        sentinel.open[0].transport.abort()
        await connection.close()
        assert await port_of(connection) == redis_server.port


async def test_a_plain_url_asks_no_sentinel(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.config_resetstat()
        async with RedisConnections() as redis:
            await redis.connection(redis_server.url()).run([("PING",)])
        stats: dict[str, Any] = client.info("commandstats")
    assert not stats.keys() & {"cmdstat_role", "cmdstat_sentinel"}


async def test_tls_is_spoken_with_sentinel_and_server_and_both_are_checked(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    trusted, doubtful = (ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) for _ in range(2))
    authority.issue_cert("127.0.0.1").configure_cert(trusted)
    stranger.issue_cert("127.0.0.1").configure_cert(doubtful)

    async def use(before_sentinel: ssl.SSLContext, before_server: ssl.SSLContext) -> None:
        sentinel = FakeSentinel(0)
        async with (
            serving(sentinel),
            tls_in_front_of(sentinel.port, before_sentinel) as port,
            tls_in_front_of(redis_server.port, before_server) as sentinel.primary,
            RedisConnections() as redis,
        ):
            url = f"rediss+sentinel://127.0.0.1:{port}/service/3?ssl_ca_certs={tmp_path}/ca.pem"
            assert await redis.connection(url).run([("PING",)]) == [b"PONG"]
            with connect(url, timeout=2) as client:
                assert await asyncio.to_thread(client.ping)

    await use(trusted, trusted)
    for contexts in ((doubtful, trusted), (trusted, doubtful)):
        with pytest.raises(RedisUnavailable):
            await use(*contexts)
