"""The pipelined connection: replies in order, errors in place, bounded answers, and recovery by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis as redis_py
from support.redis_server import RedisServer
from support.tls_front import context_for, tls_in_front_of

from producer.errors import RedisLoginRefused, RedisUnavailable, ServerTooOld
from producer.redis import protocol as wire
from producer.redis.connection import RedisConnection, RedisConnections, ServerError, raise_errors, require_version
from producer.redis.scripts import Script

pytestmark = pytest.mark.usefixtures("redis")  # each test begins with empty databases

T = TypeVar("T")
BOUND = 3.0  # seconds within which the contract wants to hear that Redis is down


@pytest.fixture
def incr(tmp_path: Path) -> Script:
    """A script of the test's own, which no server has seen."""
    path = tmp_path / "incr.lua"
    path.write_text(f"-- {tmp_path}\nreturn redis.call('INCRBY', KEYS[1], ARGV[1])")
    return Script(path)


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[RedisConnection]:
    async with RedisConnections() as redis:
        yield redis.connection(url, **options)


def using(url: str, use: Callable[[RedisConnection], Awaitable[T]], **options: Any) -> T:
    """Run `use` with a link that is closed afterwards."""

    async def main() -> T:
        async with opened(url, **options) as link:
            return await use(link)

    return asyncio.run(main())


async def fails(running: Awaitable[Any]) -> tuple[float, str]:
    """Seconds until it said that Redis is unavailable, and what it said."""
    start = time.monotonic()
    with pytest.raises(RedisUnavailable) as caught:
        await running
    return time.monotonic() - start, str(caught.value)


def test_the_replies_of_a_batch_come_in_order(redis_server: RedisServer) -> None:
    batch = [("SET", "a", 1), ("INCR", "a"), ("GET", "a"), ("GET", "none"), ("LRANGE", "none", 0, -1), ("PING",)]
    assert using(redis_server.url(), lambda link: link.run(batch)) == [b"OK", 2, b"2", None, [], b"PONG"]


def test_an_error_reply_stands_in_its_place_and_the_others_are_there(redis_server: RedisServer) -> None:
    batch = [("SET", "a", "x"), ("INCR", "a"), ("NO-SUCH-COMMAND",), ("GET", "a")]
    one, two, three, four = using(redis_server.url(), lambda link: link.run(batch))
    assert (one, four) == (b"OK", b"x")
    assert isinstance(two, ServerError)
    assert isinstance(three, ServerError)


def test_raise_errors_tells_the_kind_of_the_error_and_nothing_of_its_keys(redis_server: RedisServer) -> None:
    replies = using(redis_server.url(), lambda link: link.run([("PING",), ("SECRET-WORD",)]))
    with pytest.raises(RedisUnavailable, match="ERR") as caught:
        raise_errors(replies)
    assert "SECRET" not in str(caught.value)
    assert raise_errors([b"OK", 1, None]) == [b"OK", 1, None]


def test_a_thousand_batches_at_once_each_get_their_own_replies(
    redis: redis_py.Redis, redis_server: RedisServer
) -> None:
    async def use(link: RedisConnection) -> list[list[Any]]:
        return await asyncio.gather(*(link.run([("ECHO", i), ("ECHO", -i)]) for i in range(1000)))

    before = {client["id"] for client in redis.client_list()}
    assert using(redis_server.url(), use) == [[b"%d" % i, b"%d" % -i] for i in range(1000)]
    assert len({client["id"] for client in redis.client_list()} - before) <= 1  # its own, about to be gone


def test_a_crowd_opens_one_connection(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    before = redis.info("stats")["total_connections_received"]

    async def use(link: RedisConnection) -> None:
        await asyncio.gather(*(link.run([("PING",)]) for _ in range(100)))

    using(redis_server.url(), use)
    assert redis.info("stats")["total_connections_received"] == before + 1


def test_concurrent_batches_for_several_databases_each_reach_theirs(redis_server: RedisServer) -> None:
    async def use(link: RedisConnection) -> None:
        await asyncio.gather(
            *(link.run([("SET", f"key-{i}", i % 3), ("INCR", "count")], database=i % 3) for i in range(300))
        )
        await link.run([("SET", "own", 1)])

    using(redis_server.url(2), use)
    for database in range(3):
        with redis_server.client(database) as client:
            assert client.get("count") == b"100"
            assert {client.get(f"key-{i}") for i in range(database, 300, 3)} == {b"%d" % database}
            assert client.exists("own") == (database == 2)


def test_the_database_of_the_url_is_the_default(redis_server: RedisServer) -> None:
    using(redis_server.url(5), lambda link: link.run([("SET", "a", 1)]))
    with redis_server.client(5) as client:
        assert client.get("a") == b"1"


def test_a_database_that_the_server_lacks_is_an_error(redis_server: RedisServer) -> None:
    async def use(link: RedisConnection) -> None:
        assert "SELECT" in (await fails(link.run([("PING",)], database=9999)))[1]
        assert await link.run([("PING",)]) == [b"PONG"]

    using(redis_server.url(), use)
    using(redis_server.url(9999), lambda link: fails(link.run([("PING",)])))


def test_a_script_is_loaded_when_the_server_does_not_know_it(redis_server: RedisServer, incr: Script) -> None:
    batch = [("ECHO", "one"), incr(["n"], [1]), ("ECHO", "two"), incr(["n"], [10])]

    async def use(link: RedisConnection) -> None:
        assert await link.run(batch) == [b"one", 1, b"two", 11]
        assert await link.run(batch) == [b"one", 12, b"two", 22]
        await link.run([("SCRIPT", "FLUSH")])
        assert await link.run(batch) == [b"one", 23, b"two", 33]

    using(redis_server.url(), use)


def test_a_script_that_is_loaded_late_runs_in_its_batchs_database(redis_server: RedisServer, incr: Script) -> None:
    async def use(link: RedisConnection) -> None:
        await asyncio.gather(*(link.run([incr(["n"], [1])], database=i % 2) for i in range(100)))

    using(redis_server.url(), use)
    for database in range(2):
        with redis_server.client(database) as client:
            assert client.get("n") == b"50"


def test_it_reconnects_after_the_server_was_restarted(
    new_redis_server: Callable[..., RedisServer], incr: Script
) -> None:
    server = new_redis_server()

    async def use(link: RedisConnection) -> None:
        assert await link.run([incr(["n"], [1])]) == [1]
        server.kill()
        await fails(link.run([incr(["n"], [1])]))
        assert not link.connected
        server.start()
        assert await link.run([incr(["n"], [1])]) == [1]
        assert link.connected

    using(server.url(), use)


def test_it_recovers_when_its_connection_is_killed(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    async def use(link: RedisConnection) -> None:
        await link.run([("CLIENT", "SETNAME", "victim")])
        redis.client_kill_filter(laddr=None, skipme=True, _type="normal")
        with suppress(RedisUnavailable):  # unless the news came first
            await link.run([("PING",)])
        assert await link.run([("PING",)]) == [b"PONG"]

    using(redis_server.url(), use)


def test_a_dead_server_is_told_at_once() -> None:
    server = RedisServer()
    seconds, _ = using(server.url(), lambda link: fails(link.run([("PING",)])))
    server.close()
    assert seconds < BOUND


def test_a_host_that_does_not_exist_is_told_in_time() -> None:
    seconds, _ = using("redis://host.invalid:6379", lambda link: fails(link.run([("PING",)])))
    assert seconds < BOUND


def test_a_server_that_hangs_before_the_connection_is_told_in_time(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    server = new_redis_server()
    server.pause()
    seconds, _ = using(server.url(), lambda link: fails(link.run([("PING",)])))
    assert seconds < BOUND


def test_a_server_that_hangs_is_told_in_time_to_all_that_wait_and_is_used_again_when_it_is_back(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    server = new_redis_server()

    async def use(link: RedisConnection) -> None:
        await link.run([("PING",)])
        server.pause()
        told = await asyncio.gather(*(fails(link.run([("PING",)])) for _ in range(100)))
        assert max(seconds for seconds, _ in told) < BOUND
        server.resume()
        assert await link.run([("PING",)]) == [b"PONG"]

    using(server.url(), use)


def test_a_late_reply_is_never_taken_for_anothers(
    new_redis_server: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "ANSWER_TIMEOUT", 0.1)
    server = new_redis_server()

    async def use(link: RedisConnection) -> None:
        await link.run([("PING",)])
        server.pause()
        await fails(link.run([("ECHO", "old")]))
        server.resume()
        assert await link.run([("ECHO", "new")]) == [b"new"]

    using(server.url(), use)


def test_a_caller_that_is_cancelled_does_not_disturb_the_others(redis_server: RedisServer) -> None:
    async def use(link: RedisConnection) -> None:
        tasks = [asyncio.create_task(link.run([("ECHO", i)])) for i in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()  # while the connection opens
        assert await asyncio.gather(*tasks[1::2]) == [[b"%d" % i] for i in range(1, 20, 2)]
        tasks = [asyncio.create_task(link.run([("ECHO", i)])) for i in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()  # while the reply is on its way
        assert await asyncio.gather(*tasks[1::2]) == [[b"%d" % i] for i in range(1, 20, 2)]

    using(redis_server.url(), use)


def test_closing_fails_what_is_under_way_and_a_later_batch_opens_anew(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    server = new_redis_server()

    async def use(link: RedisConnection) -> None:
        await link.run([("PING",)])
        server.pause()
        running = asyncio.create_task(link.run([("PING",)]))
        await asyncio.sleep(0)
        await link.close()
        assert (await fails(running))[0] < 0.5
        opening = asyncio.create_task(link.run([("PING",)]))
        await asyncio.sleep(0.01)
        await link.close()
        assert (await fails(opening))[0] < 0.5
        server.resume()
        assert await link.run([("PING",)]) == [b"PONG"]

    using(server.url(), use)


def test_batches_for_several_databases_leave_in_one_write_and_run_in_their_order(
    redis_server: RedisServer, incr: Script
) -> None:
    async def use(link: RedisConnection) -> None:
        one, two, none, three = await link.run_all(
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
        assert none == []
        assert three == [1]
        assert await link.run([("INCR", "n")], database=2) == [2]
        assert "SELECT" in (await fails(link.run_all([(0, [("PING",)]), (9999, [("PING",)])])))[1]

    using(redis_server.url(), use)


def test_what_is_posted_is_written_at_once_and_in_order(redis_server: RedisServer) -> None:
    async def use(link: RedisConnection) -> None:
        with pytest.raises(RedisUnavailable):
            link.post([("PING",)])
        await link.run([("PING",)])
        link.post([("RPUSH", "list", 1)])
        link.post([("RPUSH", "list", 2), ("NO-SUCH-COMMAND",)])
        link.post([("RPUSH", "list", 3)], database=1)
        assert await link.run([("LRANGE", "list", 0, -1)]) == [[b"1", b"2"]]
        assert await link.run([("LRANGE", "list", 0, -1)], database=1) == [[b"3"]]

    using(redis_server.url(), use)


def test_a_script_that_is_posted_is_loaded_when_the_server_does_not_know_it(
    redis_server: RedisServer, incr: Script
) -> None:
    async def use(link: RedisConnection) -> None:
        await link.run([("SCRIPT", "FLUSH")])
        link.post([incr(["n"], [1])], database=1)
        await link.run([("PING",)])  # the post's answer came before this one's
        await asyncio.sleep(0)
        assert await link.run([("GET", "n")], database=1) == [b"1"]

    using(redis_server.url(), use)


def test_a_post_that_is_not_answered_ends_the_connection(
    new_redis_server: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "ANSWER_TIMEOUT", 0.1)
    server = new_redis_server()

    async def use(link: RedisConnection) -> None:
        await link.run([("PING",)])
        server.pause()
        link.post([("PING",)])
        await asyncio.sleep(0.3)
        assert not link.connected
        server.resume()
        assert await link.run([("PING",)]) == [b"PONG"]

    using(server.url(), use)


def test_an_answer_counts_from_its_own_write(
    new_redis_server: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "ANSWER_TIMEOUT", 0.4)
    server = new_redis_server()

    async def use(link: RedisConnection) -> None:
        await link.run([("PING",)])  # sets the timer that all share
        await asyncio.sleep(0.3)
        server.pause()
        running = asyncio.create_task(link.run([("PING",)]))
        await asyncio.sleep(0.2)
        assert link.connected
        server.resume()
        assert await running == [b"PONG"]

    using(server.url(), use)


@pytest.mark.parametrize("password", ["secret", "p:a/s@s w%rd#?"])
def test_it_logs_in_with_the_password_of_the_url(password: str, new_redis_server: Callable[..., RedisServer]) -> None:
    server = new_redis_server(password=password)
    assert using(server.url(), lambda link: link.run([("PING",)])) == [b"PONG"]


def test_it_logs_in_as_the_user_of_the_url(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    redis.acl_setuser("anna", enabled=True, passwords=["+secret"], commands=["+ping", "+select"])
    url = f"redis://anna:secret@127.0.0.1:{redis_server.port}"
    pong, refused = using(url, lambda link: link.run([("PING",), ("GET", "a")]))
    redis.acl_deluser("anna")
    assert pong == b"PONG"
    assert isinstance(refused, ServerError)


@pytest.mark.parametrize(
    ("user", "kind"), [("", "NOAUTH"), (":wrong-secret@", "WRONGPASS"), ("nobody:wrong-secret@", "WRONGPASS")]
)
def test_a_refused_login_is_told_apart_without_the_password(
    user: str, kind: str, new_redis_server: Callable[..., RedisServer]
) -> None:
    server = new_redis_server(password="right-secret")
    with pytest.raises(RedisLoginRefused) as caught:
        using(f"redis://{user}127.0.0.1:{server.port}", lambda link: link.run([("PING",)]))
    assert str(caught.value) == (f"Redis refused the login ({kind}): check the user and password in VERIFY_REDIS_URL")


def test_a_denied_command_is_told_apart(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    redis.acl_setuser("anna", enabled=True, passwords=["+secret"], commands=["+select"])
    [denied] = using(f"redis://anna:secret@127.0.0.1:{redis_server.port}", lambda link: link.run([("GET", "key")]))
    redis.acl_deluser("anna")
    with pytest.raises(RedisLoginRefused, match="NOPERM"):
        raise_errors([denied])


def test_what_is_pushed_goes_to_its_listener_and_empty_replies_do_not(
    redis: redis_py.Redis, redis_server: RedisServer
) -> None:
    pushed: list[Any] = []

    async def use(link: RedisConnection) -> None:
        assert await link.run([("PSUBSCRIBE", "news:*")]) == [[b"psubscribe", b"news:*", 1]]
        redis.publish("news:1", "hello")
        assert await link.run([("PING",)]) == [[b"pong", b""]]
        assert pushed == [[b"pmessage", b"news:*", b"news:1", b"hello"]]

    async def ask(link: RedisConnection) -> None:
        assert await link.run([("LRANGE", "none", 0, -1), ("EVAL", "return {{1}}", 0)]) == [[], [[1]]]

    using(redis_server.url(), use, on_push=pushed.append)
    using(redis_server.url(), ask, on_push=pushed.append)


def test_what_is_to_be_done_at_each_opening_is_done_before_all_else(
    redis: redis_py.Redis, redis_server: RedisServer
) -> None:
    async def greet(link: RedisConnection) -> None:
        await link.run([("RPUSH", "log", "opened")])

    async def use(link: RedisConnection) -> None:
        await asyncio.gather(*(link.run([("RPUSH", "log", "used")]) for _ in range(3)))
        await link.close()
        await link.run([("RPUSH", "log", "used again")])

    using(redis_server.url(), use, on_open=greet)
    assert redis.lrange("log", 0, -1) == [b"opened", b"used", b"used", b"used", b"opened", b"used again"]


def test_a_connection_whose_opening_failed_is_not_used(redis_server: RedisServer) -> None:
    greetings = 0

    async def greet(_link: RedisConnection) -> None:
        nonlocal greetings
        greetings += 1
        if greetings == 1:
            raise RedisUnavailable

    async def use(link: RedisConnection) -> None:
        await fails(link.run([("PING",)]))
        assert await link.run([("PING",)]) == [b"PONG"]
        assert greetings == 2

    using(redis_server.url(), use, on_open=greet)


def test_a_connection_lost_right_after_its_opening_fails_what_waited_for_it(redis_server: RedisServer) -> None:
    async def lose(link: RedisConnection) -> None:
        assert link._protocol is not None
        link._protocol.transport.abort()
        await link._protocol.closed

    async def main() -> None:
        async with opened(redis_server.url(), on_open=lose) as link:
            taken, _ = await fails(asyncio.wait_for(link.run([("PING",)]), 1))
            assert taken < 0.5

    asyncio.run(main())


def test_what_cannot_be_packed_changes_no_database(redis_server: RedisServer) -> None:
    async def main() -> None:
        async with opened(redis_server.url()) as link:
            with pytest.raises(UnicodeEncodeError):
                await link.run([("SET", "a", "\ud800")], database=1)
            await link.run([("SET", "a", "one")], database=1)
            assert await link.run([("GET", "a")], database=1) == [b"one"]
            assert await link.run([("GET", "a")], database=0) == [None]

    asyncio.run(main())


def test_garbage_from_the_server_ends_the_connection() -> None:
    async def main() -> None:
        async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        async with await asyncio.start_server(garbage, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with opened(f"redis://127.0.0.1:{port}") as link:
                seconds, _ = await fails(link.run([("PING",)]))
        assert seconds < BOUND

    asyncio.run(main())


def test_tls_is_spoken_and_the_certificate_checked(redis_server: RedisServer, tmp_path: Path) -> None:
    context = context_for("localhost", tmp_path / "ca.pem")

    async def main() -> None:
        async with tls_in_front_of(redis_server.port, context) as port:
            async with opened(f"rediss://localhost:{port}?ssl_ca_certs={tmp_path}/ca.pem") as link:
                assert await link.run([("PING",)]) == [b"PONG"]
            async with opened(f"rediss://localhost:{port}?ssl_cert_reqs=none") as link:
                assert await link.run([("PING",)]) == [b"PONG"]
            async with opened(f"rediss://localhost:{port}") as link:  # an authority that nobody knows
                assert (await fails(link.run([("PING",)])))[0] < BOUND
            async with opened(f"rediss://127.0.0.1:{port}?ssl_ca_certs={tmp_path}/ca.pem") as link:  # another's name
                assert (await fails(link.run([("PING",)])))[0] < BOUND

    asyncio.run(main())


def test_urls_that_mean_one_server_and_one_user_are_known() -> None:
    redis = RedisConnections()
    one = redis.connection("redis://user:a@host:1/0")
    assert one.server == redis.connection("redis://user:a@host:1/5").server
    for other in ("redis://user:a@host:2/0", "redis://other:a@host:1/0", "rediss://user:a@host:1/0"):
        assert one.server != redis.connection(other).server


@pytest.mark.parametrize("version", ["6.2.0", "6.10", "7.2.4", "255.255.255"])
def test_these_servers_are_new_enough(version: str) -> None:
    require_version(f"# Server\r\nredis_version:{version}\r\nserver_name:valkey\r\n".encode())


@pytest.mark.parametrize("version", ["2.8.0", "5.0.14", "6.0.16", "6.1.240"])
def test_an_older_server_is_refused_by_name(version: str) -> None:
    with pytest.raises(ServerTooOld, match=rf"{version}.*6\.2"):
        require_version(f"redis_version:{version}\r\n".encode())


def test_the_server_under_test_is_new_enough(redis_server: RedisServer) -> None:
    (info,) = using(redis_server.url(), lambda link: link.run([("INFO", "server")]))
    require_version(info)
