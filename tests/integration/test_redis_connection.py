"""The pipelined connection: replies in order, errors in their place, limited waiting, recovery by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

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
from producer.redis.scripts import Script

pytestmark = pytest.mark.usefixtures("redis")  # each test begins with empty databases

T = TypeVar("T")
LIMIT = 20.0  # seconds; without limits of its own, a connection to a dead host would take minutes


@pytest.fixture
def incr(tmp_path: Path) -> Script:
    """A script that no server knows yet."""
    path = tmp_path / "incr.lua"
    path.write_text(f"-- {tmp_path}\nreturn redis.call('INCRBY', KEYS[1], ARGV[1])")
    return Script(path)


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[RedisConnection]:
    async with RedisConnections() as redis:
        yield redis.connection(url, **options)


def using(url: str, use: Callable[[RedisConnection], Awaitable[T]], **options: Any) -> T:
    async def main() -> T:
        async with asyncio.timeout(LIMIT), opened(url, **options) as connection:
            return await use(connection)

    return asyncio.run(main())


async def failure(running: Awaitable[Any]) -> str:
    """The text of the `RedisUnavailable` that it raises."""
    with pytest.raises(RedisUnavailable) as caught:
        await running
    return str(caught.value)


def test_the_replies_of_a_batch_come_in_order(redis_server: RedisServer) -> None:
    batch = [("SET", "a", 1), ("INCR", "a"), ("GET", "a"), ("GET", "absent"), ("LRANGE", "absent", 0, -1), ("PING",)]
    assert using(redis_server.url(), lambda connection: connection.run(batch)) == [b"OK", 2, b"2", None, [], b"PONG"]


def test_an_error_reply_does_not_disturb_the_others(redis_server: RedisServer) -> None:
    batch = [("SET", "a", "x"), ("INCR", "a"), ("NO-SUCH-COMMAND",), ("GET", "a")]
    one, two, three, four = using(redis_server.url(), lambda connection: connection.run(batch))
    assert (one, four) == (b"OK", b"x")
    assert isinstance(two, ServerError)
    assert isinstance(three, ServerError)


def test_raise_errors_names_the_kind_of_error_and_no_key(redis_server: RedisServer) -> None:
    replies = using(redis_server.url(), lambda connection: connection.run([("PING",), ("SECRET-WORD",)]))
    with pytest.raises(RedisUnavailable, match="ERR") as caught:
        raise_errors(replies)
    assert "SECRET" not in str(caught.value)
    assert raise_errors([b"OK", 1, None]) == [b"OK", 1, None]


def test_a_thousand_concurrent_batches_get_their_own_replies(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    async def use(connection: RedisConnection) -> list[list[Any]]:
        return await asyncio.gather(*(connection.run([("ECHO", i), ("ECHO", -i)]) for i in range(1000)))

    before = {client["id"] for client in redis.client_list()}
    assert using(redis_server.url(), use) == [[b"%d" % i, b"%d" % -i] for i in range(1000)]
    assert len({client["id"] for client in redis.client_list()} - before) <= 1  # its own, about to be gone


def test_concurrent_batches_open_one_connection(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    before = redis.info("stats")["total_connections_received"]

    async def use(connection: RedisConnection) -> None:
        await asyncio.gather(*(connection.run([("PING",)]) for _ in range(100)))

    using(redis_server.url(), use)
    assert redis.info("stats")["total_connections_received"] == before + 1


def test_concurrent_batches_reach_their_own_databases(redis_server: RedisServer) -> None:
    async def use(connection: RedisConnection) -> None:
        await asyncio.gather(
            *(connection.run([("SET", f"key-{i}", i % 3), ("INCR", "count")], database=i % 3) for i in range(300))
        )
        await connection.run([("SET", "own", 1)])

    using(redis_server.url(2), use)
    for database in range(3):
        with redis_server.client(database) as client:
            assert client.get("count") == b"100"
            assert {client.get(f"key-{i}") for i in range(database, 300, 3)} == {b"%d" % database}
            assert client.exists("own") == (database == 2)


def test_the_database_of_the_url_is_the_default(redis_server: RedisServer) -> None:
    using(redis_server.url(5), lambda connection: connection.run([("SET", "a", 1)]))
    with redis_server.client(5) as client:
        assert client.get("a") == b"1"


def test_a_missing_database_is_an_error(redis_server: RedisServer) -> None:
    async def use(connection: RedisConnection) -> None:
        assert "SELECT" in await failure(connection.run([("PING",)], database=9999))
        assert await connection.run([("PING",)]) == [b"PONG"]

    using(redis_server.url(), use)
    using(redis_server.url(9999), lambda connection: failure(connection.run([("PING",)])))


def test_an_unknown_script_is_loaded(redis_server: RedisServer, incr: Script) -> None:
    batch = [("ECHO", "one"), incr(["n"], [1]), ("ECHO", "two"), incr(["n"], [10])]

    async def use(connection: RedisConnection) -> None:
        assert await connection.run(batch) == [b"one", 1, b"two", 11]
        assert await connection.run(batch) == [b"one", 12, b"two", 22]
        await connection.run([("SCRIPT", "FLUSH")])
        assert await connection.run(batch) == [b"one", 23, b"two", 33]

    using(redis_server.url(), use)


def test_a_script_loaded_late_runs_in_the_right_database(redis_server: RedisServer, incr: Script) -> None:
    async def use(connection: RedisConnection) -> None:
        await asyncio.gather(*(connection.run([incr(["n"], [1])], database=i % 2) for i in range(100)))

    using(redis_server.url(), use)
    for database in range(2):
        with redis_server.client(database) as client:
            assert client.get("n") == b"50"


def test_it_reconnects_after_a_restart_of_the_server(
    new_redis_server: Callable[..., RedisServer], incr: Script
) -> None:
    server = new_redis_server()

    async def use(connection: RedisConnection) -> None:
        assert await connection.run([incr(["n"], [1])]) == [1]
        server.kill()
        await failure(connection.run([incr(["n"], [1])]))
        assert not connection.connected
        server.start()
        assert await connection.run([incr(["n"], [1])]) == [1]
        assert connection.connected

    using(server.url(), use)


def test_it_reconnects_after_its_connection_was_killed(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    async def use(connection: RedisConnection) -> None:
        await connection.run([("CLIENT", "SETNAME", "victim")])
        redis.client_kill_filter(laddr=None, skipme=True, _type="normal")
        with suppress(RedisUnavailable):  # raised unless the loss was noticed before
            await connection.run([("PING",)])
        assert await connection.run([("PING",)]) == [b"PONG"]

    using(redis_server.url(), use)


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "redis://host.invalid:6379"])
def test_an_unreachable_server_is_an_error(url: str) -> None:
    assert "could not be reached" in using(url, lambda connection: failure(connection.run([("PING",)])))


def test_a_server_that_is_frozen_before_the_connection_is_an_error(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    server = new_redis_server()
    server.pause()
    assert using(server.url(), lambda connection: failure(connection.run([("PING",)])))


def test_a_frozen_server_fails_all_who_wait_and_is_used_again(new_redis_server: Callable[..., RedisServer]) -> None:
    server = new_redis_server()

    async def use(connection: RedisConnection) -> None:
        await connection.run([("PING",)])
        server.pause()
        assert set(await asyncio.gather(*(failure(connection.run([("PING",)])) for _ in range(100)))) == {
            protocol.TOO_LATE
        }
        server.resume()
        assert await connection.run([("PING",)]) == [b"PONG"]

    using(server.url(), use)


def test_a_late_reply_is_never_matched_with_another_command(
    new_redis_server: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "ANSWER_TIMEOUT", 0.1)
    server = new_redis_server()

    async def use(connection: RedisConnection) -> None:
        await connection.run([("PING",)])
        server.pause()
        await failure(connection.run([("ECHO", "old")]))
        server.resume()
        assert await connection.run([("ECHO", "new")]) == [b"new"]

    using(server.url(), use)


def test_a_cancelled_caller_does_not_disturb_the_others(redis_server: RedisServer) -> None:
    async def use(connection: RedisConnection) -> None:
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

    using(redis_server.url(), use)


def test_closing_fails_what_is_under_way_and_a_later_batch_reconnects(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    server = new_redis_server()

    async def use(connection: RedisConnection) -> None:
        await connection.run([("PING",)])
        server.pause()
        running = asyncio.create_task(connection.run([("PING",)]))
        await asyncio.sleep(0)
        await connection.close()
        assert await failure(running) == "the connection to Redis was lost"
        opening = asyncio.create_task(connection.run([("PING",)]))
        await asyncio.sleep(0.01)
        await connection.close()
        assert await failure(opening) == "the connection to Redis was closed"
        server.resume()
        assert await connection.run([("PING",)]) == [b"PONG"]

    using(server.url(), use)


def test_batches_for_several_databases_run_in_their_order(redis_server: RedisServer, incr: Script) -> None:
    async def use(connection: RedisConnection) -> None:
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

    using(redis_server.url(), use)


def test_posted_commands_are_executed_in_order(redis_server: RedisServer) -> None:
    async def use(connection: RedisConnection) -> None:
        with pytest.raises(RedisUnavailable):
            connection.post([("PING",)])
        await connection.run([("PING",)])
        connection.post([("RPUSH", "list", 1)])
        connection.post([("RPUSH", "list", 2), ("NO-SUCH-COMMAND",)])
        connection.post([("RPUSH", "list", 3)], database=1)
        assert await connection.run([("LRANGE", "list", 0, -1)]) == [[b"1", b"2"]]
        assert await connection.run([("LRANGE", "list", 0, -1)], database=1) == [[b"3"]]

    using(redis_server.url(), use)


def test_an_unknown_script_that_is_posted_is_loaded(redis_server: RedisServer, incr: Script) -> None:
    async def use(connection: RedisConnection) -> None:
        await connection.run([("SCRIPT", "FLUSH")])
        connection.post([incr(["n"], [1])], database=1)
        await connection.run([("PING",)])  # the post's answer came before this one's
        await asyncio.sleep(0)
        assert await connection.run([("GET", "n")], database=1) == [b"1"]

    using(redis_server.url(), use)


def test_an_unanswered_post_ends_the_connection(
    new_redis_server: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "ANSWER_TIMEOUT", 0.1)
    server = new_redis_server()

    async def use(connection: RedisConnection) -> None:
        await connection.run([("PING",)])
        server.pause()
        connection.post([("PING",)])
        while connection.connected:  # noqa: ASYNC110 - `using` limits the time
            await asyncio.sleep(0.02)
        server.resume()
        assert await connection.run([("PING",)]) == [b"PONG"]

    using(server.url(), use)


def test_each_write_has_its_own_timeout(
    new_redis_server: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "ANSWER_TIMEOUT", 2.0)
    server = new_redis_server()

    async def use(connection: RedisConnection) -> None:
        await connection.run([("PING",)])  # sets the timer that all share
        await asyncio.sleep(1.5)
        server.pause()
        running = asyncio.create_task(connection.run([("PING",)]))
        await asyncio.sleep(0.7)
        assert connection.connected
        server.resume()
        assert await running == [b"PONG"]

    using(server.url(), use)


@pytest.mark.parametrize("password", ["secret", "p:a/s@s w%rd#?"])
def test_it_logs_in_with_the_url_s_password(password: str, new_redis_server: Callable[..., RedisServer]) -> None:
    server = new_redis_server(password=password)
    assert using(server.url(), lambda connection: connection.run([("PING",)])) == [b"PONG"]


def test_it_logs_in_as_the_url_s_user(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    redis.acl_setuser("anna", enabled=True, passwords=["+secret"], commands=["+ping", "+select"])
    url = f"redis://anna:secret@127.0.0.1:{redis_server.port}"
    pong, refused = using(url, lambda connection: connection.run([("PING",), ("GET", "a")]))
    redis.acl_deluser("anna")
    assert pong == b"PONG"
    assert isinstance(refused, ServerError)


@pytest.mark.parametrize(
    ("user", "kind"), [("", "NOAUTH"), (":wrong-secret@", "WRONGPASS"), ("nobody:wrong-secret@", "WRONGPASS")]
)
def test_a_refused_login_is_an_error_of_its_own_without_the_password(
    user: str, kind: str, new_redis_server: Callable[..., RedisServer]
) -> None:
    server = new_redis_server(password="right-secret")
    with pytest.raises(RedisLoginRefused) as caught:
        using(f"redis://{user}127.0.0.1:{server.port}", lambda connection: connection.run([("PING",)]))
    assert str(caught.value) == (f"Redis refused the login ({kind}): check the user and password in VERIFY_REDIS_URL")


def test_a_denied_command_is_an_error_of_its_own(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    redis.acl_setuser("anna", enabled=True, passwords=["+secret"], commands=["+select"])
    [denied] = using(
        f"redis://anna:secret@127.0.0.1:{redis_server.port}", lambda connection: connection.run([("GET", "key")])
    )
    redis.acl_deluser("anna")
    with pytest.raises(RedisLoginRefused, match="NOPERM"):
        raise_errors([denied])


def test_messages_go_to_on_push_and_list_replies_do_not(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    pushed: list[Any] = []

    async def use(connection: RedisConnection) -> None:
        assert await connection.run([("PSUBSCRIBE", "news:*")]) == [[b"psubscribe", b"news:*", 1]]
        redis.publish("news:1", "hello")
        assert await connection.run([("PING",)]) == [[b"pong", b""]]
        assert pushed == [[b"pmessage", b"news:*", b"news:1", b"hello"]]

    async def ask(connection: RedisConnection) -> None:
        assert await connection.run([("LRANGE", "absent", 0, -1), ("EVAL", "return {{1}}", 0)]) == [[], [[1]]]

    using(redis_server.url(), use, on_push=pushed.append)
    using(redis_server.url(), ask, on_push=pushed.append)


def test_on_open_runs_before_all_other_commands(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    async def on_open(connection: RedisConnection) -> None:
        await connection.run([("RPUSH", "log", "opened")])

    async def use(connection: RedisConnection) -> None:
        await asyncio.gather(*(connection.run([("RPUSH", "log", "used")]) for _ in range(3)))
        await connection.close()
        await connection.run([("RPUSH", "log", "used again")])

    using(redis_server.url(), use, on_open=on_open)
    assert redis.lrange("log", 0, -1) == [b"opened", b"used", b"used", b"used", b"opened", b"used again"]


def test_a_connection_whose_on_open_failed_is_not_used(redis_server: RedisServer) -> None:
    openings = 0

    async def on_open(_: RedisConnection) -> None:
        nonlocal openings
        openings += 1
        if openings == 1:
            raise RedisUnavailable

    async def use(connection: RedisConnection) -> None:
        await failure(connection.run([("PING",)]))
        assert await connection.run([("PING",)]) == [b"PONG"]
        assert openings == 2

    using(redis_server.url(), use, on_open=on_open)


def test_a_connection_lost_right_after_its_opening_fails_what_waited_for_it(redis_server: RedisServer) -> None:
    async def lose(connection: RedisConnection) -> None:
        assert connection._protocol is not None
        connection._protocol.transport.abort()
        await connection._protocol.closed

    said = using(redis_server.url(), lambda connection: failure(connection.run([("PING",)])), on_open=lose)
    assert said == "the connection to Redis was lost"


def test_a_command_that_cannot_be_packed_changes_no_database(redis_server: RedisServer) -> None:
    async def use(connection: RedisConnection) -> None:
        with pytest.raises(UnicodeEncodeError):
            await connection.run([("SET", "a", "\ud800")], database=1)
        await connection.run([("SET", "a", "one")], database=1)
        assert await connection.run([("GET", "a")], database=1) == [b"one"]
        assert await connection.run([("GET", "a")], database=0) == [None]

    using(redis_server.url(), use)


def test_garbage_from_the_server_ends_the_connection() -> None:
    async def main() -> None:
        async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        async with await asyncio.start_server(garbage, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with opened(f"redis://127.0.0.1:{port}") as connection:
                await failure(connection.run([("PING",)]))

    asyncio.run(main())


def test_tls_is_used_and_the_certificate_checked(redis_server: RedisServer, tmp_path: Path) -> None:
    context = context_for("localhost", tmp_path / "ca.pem")

    async def main() -> None:
        async with tls_in_front_of(redis_server.port, context) as port:
            async with opened(f"rediss://localhost:{port}?ssl_ca_certs={tmp_path}/ca.pem") as connection:
                assert await connection.run([("PING",)]) == [b"PONG"]
            async with opened(f"rediss://localhost:{port}?ssl_cert_reqs=none") as connection:
                assert await connection.run([("PING",)]) == [b"PONG"]
            async with opened(f"rediss://localhost:{port}") as connection:  # unknown authority
                await failure(connection.run([("PING",)]))
            async with opened(f"rediss://127.0.0.1:{port}?ssl_ca_certs={tmp_path}/ca.pem") as connection:  # wrong name
                await failure(connection.run([("PING",)]))

    asyncio.run(main())


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
