"""A worker whose Redis is down at the start, restarts, hangs, loses its data, is three servers, or speaks TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis as redis_py
from redis.backoff import NoBackoff
from redis.retry import Retry
from support.caller import address, message
from support.process import START_TIMEOUT, eventually
from support.redis_server import RedisServer
from support.rig import Rig
from support.smtp_server import Held
from support.tls_front import context_for, tls_front

from producer.errors import RedisUnavailable
from producer.redis.connection import RedisConnections
from worker.celery_side.connections import Connection

NewServer = Callable[..., RedisServer]
NewRig = Callable[..., Rig]


def test_codes_broker_and_results_may_be_three_servers(new_redis_server: NewServer, new_rig: NewRig) -> None:
    codes, broker, results = (new_redis_server() for _ in range(3))
    rig = new_rig(codes_url=codes.url(5), broker_url=broker.url(6), results_url=results.url(7))
    rig.add_worker()
    email = address()
    assert rig.caller.ask(email) == {"email": email, "error": 0}
    with codes.client(5) as client:
        assert client.ttl(f"code_{email}") > 590
    assert list(rig.server.client().scan_iter()) == []
    # Joins and retries cross the servers too.
    hold = Held("450 4.2.1 later")
    rig.script(email := address(), dot=[hold])
    first = rig.caller.request(email)
    assert hold.reached.wait(60)
    ids = rig.caller.push(*(message({"email": email}) for _ in range(5)))
    eventually(lambda: rig.broker.hlen("verification.parked") == 5)
    hold.release.set()
    assert rig.caller.replies([first, *ids]) == [0] * 6
    assert len(rig.mails_to(email)) == 1


@pytest.mark.slow  # tests/faults/test_databases.py kills the codes database under a worker that runs
def test_a_worker_starts_without_the_codes_database_and_answers_1(new_redis_server: NewServer, new_rig: NewRig) -> None:
    codes = new_redis_server()
    rig = new_rig(codes_url=codes.url(0))
    codes.kill()
    rig.add_worker()
    for back in (codes.start, codes.resume):
        email = address()
        assert rig.caller.ask(email) == {"email": email, "error": 1}
        back()
        eventually(lambda: rig.caller.ask(address())["error"] == 0)
        codes.pause()
    codes.resume()


def test_a_worker_that_starts_before_redis_works_once_redis_is_up(new_redis_server: NewServer, new_rig: NewRig) -> None:
    server = new_redis_server()
    rig = new_rig(server=server)
    server.kill()
    worker = rig.add_worker(wait=False)
    worker.wait_for_log(
        f"waiting for Redis at redis://127.0.0.1:{server.port}/1 (ConnectionError): check VERIFY_BROKER_URL"
    )
    server.start()
    assert rig.caller.ask(address())["error"] == 0


def test_a_worker_survives_the_troubles_of_redis(new_redis_server: NewServer, new_rig: NewRig) -> None:
    server = new_redis_server()
    rig = new_rig(server=server)
    rig.add_worker()

    def serves() -> None:
        assert rig.caller.ask(address())["error"] == 0
        rig.settled()
        assert rig.worker.alive

    serves()
    server.kill()
    server.start()  # empty
    serves()
    server.pause()
    time.sleep(3)  # seconds; longer than a command may take
    server.resume()
    serves()
    rig.codes.flushall()
    rig.codes.script_flush()
    serves()


def test_a_redis_password_is_used_and_appears_in_no_log(new_redis_server: NewServer, new_rig: NewRig) -> None:
    password = "hush-hush:/@%é"
    server = new_redis_server(password=password)
    rig = new_rig(server=server)
    rig.add_worker()
    assert rig.caller.ask(address())["error"] == 0
    server.kill()  # connection errors must not log it either
    rig.worker.wait_for_log("waiting for Redis")
    server.start()
    eventually(lambda: rig.caller.ask(address())["error"] == 0)
    assert "hush" not in rig.worker.log


@pytest.mark.parametrize("which", ["CODES", pytest.param("RESULTS", marks=pytest.mark.slow)])
def test_a_redis_that_is_too_old_ends_the_worker_with_one_line(new_rig: NewRig, old_redis: str, which: str) -> None:
    rig = new_rig()
    rig.settings[f"VERIFY_{which}_URL"] = old_redis
    worker = rig.add_worker(wait=False)
    assert worker.wait(START_TIMEOUT) != 0
    [line] = [line for line in worker.log.splitlines() if '"critical"' in line]
    assert "the Redis server is version 6.0.16; 6.2 or newer is needed" in line


@pytest.mark.parametrize(
    ("query", "known"),
    [
        ("", True),
        ("", False),
        pytest.param("?ssl_cert_reqs=none", False, marks=pytest.mark.slow),
        ("?ssl_cert_reqs=CERT_NONE", False),  # Celery's own name for it
    ],
)
def test_over_tls_a_worker_checks_the_certificate_unless_the_url_says_not_to(
    new_redis_server: NewServer,
    new_rig: NewRig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    query: str,
    known: bool,
) -> None:
    server = new_redis_server(password="hush-hush:/@")
    context = context_for("localhost", tmp_path / "ca.pem")
    if known:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with tls_front(server.port, context) as port:
        url = server.url().replace("redis://", "rediss://").replace(f"127.0.0.1:{server.port}", f"localhost:{port}")
        rig = new_rig(server=server, redis_url=url + query)
        worker = rig.add_worker(wait=False)
        if known or query:
            assert rig.caller.ask(address(), within=START_TIMEOUT)["error"] == 0
        else:
            worker.wait_for_log("waiting for Redis", START_TIMEOUT)
            assert server.client(1).exists("_kombu.binding.verification") == 0  # no command reached it
        assert "hush" not in worker.log


@pytest.mark.parametrize("answer", [b"$-1", b"*0", b":0", b"$5\r\nhello"])
def test_a_server_that_is_no_redis_counts_as_lost(answer: bytes) -> None:
    class Stranger(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                while self.rfile.readline():
                    self.wfile.write(answer + b"\r\n")

    def answer_two() -> None:
        for _ in range(2):
            server.handle_request()

    async def connect(url: str) -> None:
        async with RedisConnections() as connections:
            await connections.connection(url).open()

    with socketserver.TCPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=answer_two, daemon=True).start()
        port = int(server.server_address[1])
        with pytest.raises(RedisUnavailable, match="no Redis server"):
            asyncio.run(connect(f"redis://127.0.0.1:{port}/1"))
        celery = Connection(host="127.0.0.1", port=port, retry=Retry(NoBackoff(), 0))  # type: ignore[no-untyped-call]
        with pytest.raises(redis_py.ConnectionError):
            celery.connect()


def test_messages_that_another_app_holds_on_the_same_broker_are_left_alone(new_rig: NewRig) -> None:
    # kombu's `unacked` is one hash for all queues of a database.
    rig = new_rig(visibility_timeout=1)
    ours, theirs = message({"email": address()}), message({"email": address()})
    stale = {"ours": [ours, "", "verification"], "theirs": [theirs, "", "thumbnails"]}
    for tag, entry in stale.items():
        rig.broker.hset("unacked", tag, json.dumps(entry))
        rig.broker.zadd("unacked_index", {tag: 1})
    rig.add_worker()
    assert rig.caller.replies([ours["headers"]["id"]]) == [0]
    assert rig.broker.hkeys("unacked") == [b"theirs"]
    rig.broker.delete("unacked", "unacked_index")
