"""The pipelined connection: replies in order, errors in their place, limited waiting, recovery by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from support.redis_server import RedisServer
from support.tls_front import context_for, tls_in_front_of

from producer.errors import RedisLoginRefused, RedisUnavailable, ServerTooOld
from producer.redis import protocol
from producer.redis.connection import (
    RedisConnection,
    RedisConnections,
    ServerError,
    raise_errors,
    require_version,
)
from producer.redis.protocol import LOGIN_SETTINGS
from producer.redis.scripts import Script

pytestmark = pytest.mark.usefixtures("redis")  # each test begins with empty databases

NewServer = Callable[..., RedisServer]


@pytest.fixture
def incr(tmp_path: Path) -> Script:
    """A script that no server knows yet."""
    path = tmp_path / "incr.lua"
    path.write_text(f"-- {tmp_path}\nreturn redis.call('INCRBY', KEYS[1], ARGV[1])")
    return Script(path)


@pytest.fixture
async def connections() -> AsyncIterator[RedisConnections]:
    async with RedisConnections() as connections:
        yield connections


@pytest.fixture
def connection(redis_server: RedisServer, connections: RedisConnections) -> RedisConnection:
    """To the server that all tests share."""
    return connections.connection(redis_server.url())


@pytest.fixture
def server(new_redis_server: NewServer) -> RedisServer:
    """The test's own, to be stopped and frozen."""
    return new_redis_server()


@pytest.fixture
def own(server: RedisServer, connections: RedisConnections) -> RedisConnection:
    """A connection to `server`."""
    return connections.connection(server.url())


async def failure(running: Awaitable[Any]) -> str:
    """The text of the `RedisUnavailable` that it raises."""
    with pytest.raises(RedisUnavailable) as caught:
        await running
    return str(caught.value)


async def test_the_replies_of_a_batch_come_in_order(connection: RedisConnection) -> None:
    batch = [("SET", "a", 1), ("INCR", "a"), ("GET", "a"), ("GET", "absent"), ("LRANGE", "absent", 0, -1), ("PING",)]
    assert await connection.run(batch) == [b"OK", 2, b"2", None, [], b"PONG"]


async def test_an_error_reply_does_not_disturb_the_others(connection: RedisConnection) -> None:
    one, two, three, four = await connection.run([("SET", "a", "x"), ("INCR", "a"), ("SECRET-WORD",), ("GET", "a")])
    assert raise_errors([one, four, 1, None]) == [b"OK", b"x", 1, None]
    assert isinstance(two, ServerError)
    with pytest.raises(RedisUnavailable, match="ERR") as caught:
        raise_errors([one, three])
    assert "SECRET" not in str(caught.value)


async def test_a_thousand_concurrent_batches_share_one_connection(
    redis: redis_py.Redis, connection: RedisConnection
) -> None:
    before = redis.info("stats")["total_connections_received"]
    replies = await asyncio.gather(*(connection.run([("ECHO", i), ("ECHO", -i)]) for i in range(1000)))
    assert replies == [[b"%d" % i, b"%d" % -i] for i in range(1000)]
    assert redis.info("stats")["total_connections_received"] == before + 1


async def test_concurrent_batches_reach_their_own_databases(
    redis_server: RedisServer, connections: RedisConnections
) -> None:
    connection = connections.connection(redis_server.url(2))
    await asyncio.gather(
        *(connection.run([("SET", f"key-{i}", i % 3), ("INCR", "count")], database=i % 3) for i in range(300))
    )
    await connection.run([("SET", "own", 1)])
    for database in range(3):
        with redis_server.client(database) as client:
            assert client.get("count") == b"100"
            assert {client.get(f"key-{i}") for i in range(database, 300, 3)} == {b"%d" % database}
            assert client.exists("own") == (database == 2)


async def test_a_missing_database_is_an_error(
    redis_server: RedisServer, connection: RedisConnection, connections: RedisConnections
) -> None:
    assert "SELECT" in await failure(connection.run([("PING",)], database=9999))
    assert await connection.run([("PING",)]) == [b"PONG"]
    await failure(connections.connection(redis_server.url(9999)).run([("PING",)]))


async def test_an_unknown_script_is_loaded(redis: redis_py.Redis, incr: Script, connection: RedisConnection) -> None:
    batch = [("ECHO", "one"), incr(["n"], [1]), ("ECHO", "two"), incr(["n"], [10])]
    assert await connection.run(batch) == [b"one", 1, b"two", 11]
    assert await connection.run(batch) == [b"one", 12, b"two", 22]
    await connection.run([("SCRIPT", "FLUSH")])
    assert await connection.run(batch) == [b"one", 23, b"two", 33]
    redis.flushall()
    await connection.run([("SCRIPT", "FLUSH")])
    await asyncio.gather(*(connection.run([incr(["n"], [1])], database=i % 2) for i in range(100)))
    assert await connection.run_all([(0, [("GET", "n")]), (1, [("GET", "n")])]) == [[b"50"], [b"50"]]


async def test_it_reconnects_after_a_restart_of_the_server(
    server: RedisServer, own: RedisConnection, incr: Script
) -> None:
    assert await own.run([incr(["n"], [1])]) == [1]
    server.kill()
    await failure(own.run([incr(["n"], [1])]))
    assert not own.connected
    server.start()
    assert await own.run([incr(["n"], [1])]) == [1]
    assert own.connected


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "redis://host.invalid:6379"])
async def test_an_unreachable_server_is_an_error(url: str, connections: RedisConnections) -> None:
    assert "could not be reached" in await failure(connections.connection(url).run([("PING",)]))


async def test_a_frozen_server_is_an_error_and_no_late_reply_answers_another_command(
    server: RedisServer, own: RedisConnection
) -> None:
    server.pause()
    assert await failure(own.run([("PING",)]))
    server.resume()
    await own.run([("PING",)])
    server.pause()
    said = await asyncio.gather(*(failure(own.run([("ECHO", "old")])) for _ in range(100)))
    assert set(said) == {protocol.TOO_LATE}
    server.resume()
    assert await own.run([("ECHO", "new")]) == [b"new"]


async def test_a_cancelled_caller_does_not_disturb_the_others(connection: RedisConnection) -> None:
    tasks = [asyncio.create_task(connection.run([("ECHO", i)])) for i in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()  # while the connection opens
    assert await asyncio.gather(*tasks[1::2]) == [[b"%d" % i] for i in range(1, 20, 2)]
    tasks = [asyncio.create_task(connection.run([("ECHO", i)])) for i in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()  # while the reply is on its way
    assert await asyncio.gather(*tasks[1::2]) == [[b"%d" % i] for i in range(1, 20, 2)]


async def test_closing_fails_what_is_under_way_and_a_later_batch_reconnects(
    server: RedisServer, own: RedisConnection
) -> None:
    await own.run([("PING",)])
    server.pause()
    running = asyncio.create_task(own.run([("PING",)]))
    await asyncio.sleep(0)
    await own.close()
    assert await failure(running) == "the connection to Redis was lost"
    opening = asyncio.create_task(own.run([("PING",)]))
    await asyncio.sleep(0.01)
    await own.close()
    assert await failure(opening) == "the connection to Redis was closed"
    server.resume()
    assert await own.run([("PING",)]) == [b"PONG"]


async def test_batches_for_several_databases_run_in_their_order(incr: Script, connection: RedisConnection) -> None:
    one, two, empty, three = await connection.run_all(
        [
            (1, [incr(["n"], [1]), ("GET", "n")]),
            (2, [("INCR", "n"), ("NO-SUCH-COMMAND",)]),
            (2, []),
            (0, [("INCR", "n")]),
        ]
    )
    assert one == [1, b"1"]
    assert two[0] == 1
    assert isinstance(two[1], ServerError)
    assert empty == []
    assert three == [1]
    assert await connection.run([("INCR", "n")], database=2) == [2]
    assert "SELECT" in await failure(connection.run_all([(0, [("PING",)]), (9999, [("PING",)])]))


async def test_posted_commands_are_executed_in_order(connection: RedisConnection) -> None:
    with pytest.raises(RedisUnavailable):
        connection.post([("PING",)])
    await connection.run([("PING",)])
    connection.post([("RPUSH", "list", 1)])
    connection.post([("RPUSH", "list", 2), ("NO-SUCH-COMMAND",)])
    connection.post([("RPUSH", "list", 3)], database=1)
    assert await connection.run([("LRANGE", "list", 0, -1)]) == [[b"1", b"2"]]
    assert await connection.run([("LRANGE", "list", 0, -1)], database=1) == [[b"3"]]


async def test_an_unknown_script_that_is_posted_is_loaded(incr: Script, connection: RedisConnection) -> None:
    await connection.run([("SCRIPT", "FLUSH")])
    connection.post([incr(["n"], [1])], database=1)
    await connection.run([("PING",)])  # the post's answer came before this one's
    await asyncio.sleep(0)
    assert await connection.run([("GET", "n")], database=1) == [b"1"]


async def test_an_unanswered_post_ends_the_connection(
    server: RedisServer, own: RedisConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "ANSWER_TIMEOUT", 0.1)
    await own.run([("PING",)])
    server.pause()
    own.post([("PING",)])
    while own.connected:  # noqa: ASYNC110 - pytest limits the time
        await asyncio.sleep(0.02)
    server.resume()
    assert await own.run([("PING",)]) == [b"PONG"]


async def test_each_write_has_its_own_timeout(
    server: RedisServer, own: RedisConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "ANSWER_TIMEOUT", 2.0)
    await own.run([("PING",)])  # sets the timer that all share
    await asyncio.sleep(1.5)
    server.pause()
    running = asyncio.create_task(own.run([("PING",)]))
    await asyncio.sleep(0.7)
    assert own.connected
    server.resume()
    assert await running == [b"PONG"]


@pytest.mark.parametrize("password", ["secret", "p:a/s@s w%rd#?"])
async def test_it_logs_in_with_the_url_s_password(
    password: str, new_redis_server: NewServer, connections: RedisConnections
) -> None:
    assert await connections.connection(new_redis_server(password=password).url()).run([("PING",)]) == [b"PONG"]


async def test_a_command_that_the_url_s_user_may_not_run_is_an_error(
    redis: redis_py.Redis, redis_server: RedisServer, connections: RedisConnections
) -> None:
    redis.acl_setuser("anna", enabled=True, passwords=["+secret"], commands=["+ping", "+select"])
    connection = connections.connection(f"redis://anna:secret@127.0.0.1:{redis_server.port}")
    pong, denied = await connection.run([("PING",), ("GET", "a")])
    redis.acl_deluser("anna")
    assert pong == b"PONG"
    with pytest.raises(RedisLoginRefused, match="NOPERM"):
        raise_errors([denied])


@pytest.mark.parametrize(
    ("user", "kind"), [("", "NOAUTH"), (":wrong-secret@", "WRONGPASS"), ("nobody:wrong-secret@", "WRONGPASS")]
)
async def test_a_refused_login_is_an_error_of_its_own_without_the_password(
    user: str, kind: str, new_redis_server: NewServer, connections: RedisConnections
) -> None:
    server = new_redis_server(password="right-secret")
    with pytest.raises(RedisLoginRefused) as caught:
        await connections.connection(f"redis://{user}127.0.0.1:{server.port}").run([("PING",)])
    assert str(caught.value) == f"Redis refused the login ({kind}): check {LOGIN_SETTINGS}"


async def test_messages_go_to_on_push_and_list_replies_do_not(
    redis: redis_py.Redis, redis_server: RedisServer, connections: RedisConnections
) -> None:
    pushed: list[Any] = []
    connection = connections.connection(redis_server.url(), on_push=pushed.append)
    assert await connection.run([("LRANGE", "absent", 0, -1), ("EVAL", "return {{1}}", 0)]) == [[], [[1]]]
    assert await connection.run([("PSUBSCRIBE", "news:*")]) == [[b"psubscribe", b"news:*", 1]]
    redis.publish("news:1", "hello")
    assert await connection.run([("PING",)]) == [[b"pong", b""]]
    assert pushed == [[b"pmessage", b"news:*", b"news:1", b"hello"]]


async def test_on_open_runs_before_all_other_commands(
    redis: redis_py.Redis, redis_server: RedisServer, connections: RedisConnections
) -> None:
    async def on_open(connection: RedisConnection) -> None:
        await connection.run([("RPUSH", "log", "opened")])

    connection = connections.connection(redis_server.url(), on_open=on_open)
    await asyncio.gather(*(connection.run([("RPUSH", "log", "used")]) for _ in range(3)))
    await connection.close()
    await connection.run([("RPUSH", "log", "used again")])
    assert redis.lrange("log", 0, -1) == [b"opened", b"used", b"used", b"used", b"opened", b"used again"]


async def test_a_connection_whose_on_open_failed_is_not_used(
    redis_server: RedisServer, connections: RedisConnections
) -> None:
    openings = 0

    async def on_open(_: RedisConnection) -> None:
        nonlocal openings
        openings += 1
        if openings == 1:
            raise RedisUnavailable

    connection = connections.connection(redis_server.url(), on_open=on_open)
    await failure(connection.run([("PING",)]))
    assert await connection.run([("PING",)]) == [b"PONG"]
    assert openings == 2


async def test_a_connection_lost_right_after_its_opening_fails_what_waited_for_it(
    redis_server: RedisServer, connections: RedisConnections
) -> None:
    async def lose(connection: RedisConnection) -> None:
        assert connection._protocol is not None
        connection._protocol.transport.abort()
        await connection._protocol.closed

    connection = connections.connection(redis_server.url(), on_open=lose)
    assert await failure(connection.run([("PING",)])) == "the connection to Redis was lost"


async def test_a_command_that_cannot_be_packed_changes_no_database(connection: RedisConnection) -> None:
    with pytest.raises(UnicodeEncodeError):
        await connection.run([("SET", "a", "\ud800")], database=1)
    await connection.run([("SET", "a", "one")], database=1)
    assert await connection.run([("GET", "a")], database=1) == [b"one"]
    assert await connection.run([("GET", "a")], database=0) == [None]


async def test_garbage_from_the_server_ends_the_connection(connections: RedisConnections) -> None:
    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with await asyncio.start_server(garbage, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await failure(connections.connection(f"redis://127.0.0.1:{port}").run([("PING",)]))


async def test_tls_is_used_and_the_certificate_checked(
    redis_server: RedisServer, tmp_path: Path, connections: RedisConnections
) -> None:
    async with tls_in_front_of(redis_server.port, context_for("localhost", tmp_path / "ca.pem")) as port:
        for query in (f"ssl_ca_certs={tmp_path}/ca.pem", "ssl_cert_reqs=none"):
            connection = connections.connection(f"rediss://localhost:{port}?{query}")
            assert await connection.run([("PING",)]) == [b"PONG"]
        # An unknown authority, and a wrong name.
        for host in (f"localhost:{port}", f"127.0.0.1:{port}?ssl_ca_certs={tmp_path}/ca.pem"):
            await failure(connections.connection(f"rediss://{host}").run([("PING",)]))
        await connections.close()


def test_urls_of_one_server_and_user_are_recognized() -> None:
    redis = RedisConnections()
    one = redis.connection("redis://user:a@host:1/0")
    assert one.server == redis.connection("redis://user:a@host:1/5").server
    for other in ("redis://user:a@host:2/0", "redis://other:a@host:1/0", "rediss://user:a@host:1/0"):
        assert one.server != redis.connection(other).server


@pytest.mark.parametrize("version", ["6.2.0", "6.10", "7.2.4", "255.255.255"])
def test_a_server_of_this_version_is_accepted(version: str) -> None:
    require_version(f"# Server\r\nredis_version:{version}\r\nserver_name:valkey\r\n".encode())


@pytest.mark.parametrize("version", ["2.8.0", "5.0.14", "6.0.16", "6.1.240"])
def test_an_older_server_is_refused(version: str) -> None:
    with pytest.raises(ServerTooOld, match=rf"{version}.*6\.2"):
        require_version(f"redis_version:{version}\r\n".encode())
