"""The verbs, seen through the blocking client; and its threads, forks and end. Real Redis, fake worker.

The blocking client runs the asyncio client, so what is shown of a verb here holds for both.
"""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis as redis_py
from support.fake_worker import FakeWorker, Taken, connections, exit_child, pending, read, settings
from support.process import ROOT, eventually
from support.redis_server import RedisServer
from support.tcp_proxy import TRICKLE_ANSWERS, TcpProxy

from producer.aio import AsyncVerificationClient
from producer.client import VerificationClient
from producer.contract import CheckResult, ErrorCode, Reply
from producer.errors import RedisLoginRefused, RedisUnavailable, ServerTooOld
from producer.settings import Settings

pytestmark = pytest.mark.usefixtures("redis")  # the shared server is empty at first

A = "a@example.com"
SOON = 10.0  # seconds; 3 are promised, and a busy machine takes longer: without a limit it would be minutes
NewServer = Callable[..., RedisServer]


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[VerificationClient]:
    with VerificationClient(settings(redis_server)) as client:
        yield client
        assert waiting(client) == 0


def waiting(client: VerificationClient) -> int:
    return 0 if client._thread is None else pending(client._thread.client)


def threads() -> int:
    return sum(each.name == "verification-client" for each in threading.enumerate())


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.monotonic()
    try:
        return call(), time.monotonic() - start
    except RedisUnavailable as exc:
        return exc, time.monotonic() - start


def all_verbs(client: VerificationClient) -> list[tuple[Any, float]]:
    """The outcome of each verb, and its seconds; all three run at once."""
    verbs = [lambda: client.request(A), lambda: client.enqueue(A), lambda: client.check(A, "1")]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(timed, verbs))


def assert_redis_err(outcomes: list[tuple[Any, float]]) -> None:
    (reply, _), (failure, _), (result, _) = outcomes
    assert reply == Reply(A, ErrorCode.REDIS_ERR)
    assert isinstance(failure, RedisUnavailable)
    assert result == CheckResult(A, ErrorCode.REDIS_ERR)
    assert max(seconds for _, seconds in outcomes) < SOON


@pytest.mark.parametrize("verb", ["request", "enqueue", "check"])
def test_a_verb_has_the_signature_and_the_docs_of_the_asyncio_client(verb: str) -> None:
    ours, theirs = getattr(VerificationClient, verb), getattr(AsyncVerificationClient, verb)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert ours.__doc__ == theirs.__doc__
    assert not inspect.iscoroutinefunction(ours)


def test_the_reply_holds_the_address_as_given(client: VerificationClient, redis_server: RedisServer) -> None:
    with FakeWorker(redis_server) as worker:
        assert client.request(" A@Example.com ", purpose="login", locale="en", client="me") == Reply(
            " A@Example.com ", ErrorCode.SUCCESS
        )
    [taken] = worker.taken
    assert taken.kwargs == {"email": " A@Example.com ", "purpose": "login", "locale": "en", "client": "me"}
    assert abs(taken.headers["enqueued_at"] - time.time()) < 60


def test_200_threads_share_two_connections(client: VerificationClient, redis_server: RedisServer) -> None:
    before = connections(redis_server)
    emails = [f"user{i}@example.com" for i in range(200)]
    with FakeWorker(redis_server, error=lambda kwargs: int(kwargs["email"][4:-12]) % 7):
        with ThreadPoolExecutor(200) as pool:
            replies = list(pool.map(client.request, emails))
        assert len(connections(redis_server) - before) == 2
    assert replies == [Reply(email, ErrorCode(i % 7)) for i, email in enumerate(emails)]
    assert threads() == 1


def test_invalid_input_is_answered_without_redis() -> None:
    with VerificationClient(Settings(redis_url="redis://127.0.0.1:1")) as client:
        assert client.request("nobody") == Reply("nobody", ErrorCode.INVALID_ADDRESS)
        assert client.request({"no": "address"}).error is ErrorCode.INVALID_ADDRESS
        assert client.request(A, purpose="Not One").error is ErrorCode.EXCEPTION
        for verb in (client.request, client.enqueue):
            with pytest.raises(ValueError, match="client must be"):
                verb(A, client="c" * 65)
        assert client.check(A, "1", purpose="Not One").error is ErrorCode.VARIFY_EXPIRED
        assert client.check(A, 123456).error is ErrorCode.VARIFY_CODE_ERR  # type: ignore[arg-type]


def test_without_a_worker_the_answer_is_timeout(redis_server: RedisServer) -> None:
    with VerificationClient(settings(redis_server, reply_timeout=0.5)) as client:
        reply, seconds = timed(lambda: client.request(A))
        assert reply == Reply(A, ErrorCode.TIMEOUT)
        assert 0.5 <= seconds < SOON
        assert waiting(client) == 0
    with redis_server.client(1) as broker:
        assert broker.llen("verification") == 1


def test_every_key_has_a_ttl(client: VerificationClient, redis_server: RedisServer) -> None:
    with FakeWorker(redis_server):
        client.request(A)
    client.check(A, "1")
    for database in range(3):
        with redis_server.client(database) as redis:
            assert all(redis.pttl(key) > 0 for key in redis.scan_iter())


def test_a_code_is_checked(client: VerificationClient, redis: redis_py.Redis) -> None:
    redis.set("code_" + A, "123456", ex=60)
    redis.set("code:login:" + A, "654321", ex=60)
    assert client.check(A, "000000") == CheckResult(A, ErrorCode.VARIFY_CODE_ERR)
    assert client.check(A, "654321", purpose="login").error is ErrorCode.SUCCESS
    assert client.check(A, "123456").error is ErrorCode.SUCCESS
    assert client.check(A, "123456").error is ErrorCode.VARIFY_EXPIRED


class TestEnqueue:
    def test_it_returns_the_id_and_does_not_wait(self, client: VerificationClient, redis_server: RedisServer) -> None:
        given = client.enqueue(A)
        assert str(uuid.UUID(given)) == given
        with redis_server.client(1) as broker:
            assert [read(raw).request_id for raw in broker.lrange("verification", 0, -1)] == [given]

    def test_the_same_id_may_be_sent_again(self, client: VerificationClient, redis_server: RedisServer) -> None:
        assert [client.enqueue(A, request_id="order 7") for _ in range(2)] == ["order 7"] * 2
        with redis_server.client(1) as broker:
            messages = [read(raw) for raw in broker.lrange("verification", 0, -1)]
        assert [(each.request_id, each.kwargs) for each in messages] == [("order 7", {"email": A})] * 2

    def test_it_pushes_again_with_the_same_id_if_the_confirmation_was_lost(self, redis_server: RedisServer) -> None:
        with (
            TcpProxy(redis_server.port) as proxy,
            VerificationClient(settings(redis_server, broker_url=proxy.url(1))) as client,
        ):
            client.enqueue(A)
            proxy.cut_after(b"LPUSH")
            given = client.enqueue(A, request_id="mine")
        with redis_server.client(1) as broker:
            ids = [read(raw).request_id for raw in broker.lrange("verification", 0, 1)]
        assert given == "mine"
        assert ids == ["mine", "mine"]

    @pytest.mark.parametrize("request_id", ["", 7, b"x", "a\nb", "\ud800", "x" * 256, "é" * 128])
    def test_an_invalid_id_is_refused(self, client: VerificationClient, request_id: Any) -> None:
        with pytest.raises(ValueError, match="request_id"):
            client.enqueue(A, request_id=request_id)

    @pytest.mark.parametrize("email", [b"a@example.com", {1, 2}, object(), float("nan")])
    def test_a_value_that_json_cannot_hold_is_refused(self, client: VerificationClient, email: Any) -> None:
        with pytest.raises(TypeError, match="email"):
            client.enqueue(email)

    def test_it_does_not_check_the_address(self, client: VerificationClient, redis_server: RedisServer) -> None:
        for email in (None, 7, ["a"], "", "nobody", "a\r\n@b"):
            client.enqueue(email)
        with redis_server.client(1) as broker:
            assert broker.llen("verification") == 6


class TestRedisUnavailable:
    def test_a_server_that_is_down_is_redis_err_until_it_is_back(self, new_redis_server: NewServer) -> None:
        server = new_redis_server()
        server.kill()
        with VerificationClient(settings(server)) as client:
            assert_redis_err(all_verbs(client))
            server.start()
            with FakeWorker(server):
                assert client.request(A).error is ErrorCode.SUCCESS
            server.kill()
            assert_redis_err(all_verbs(client))
            server.start()
            with FakeWorker(server):
                assert client.request(A).error is ErrorCode.SUCCESS
            assert waiting(client) == 0

    def test_a_frozen_server_is_redis_err_until_it_wakes(self, new_redis_server: NewServer) -> None:
        server = new_redis_server()
        with VerificationClient(settings(server)) as client, FakeWorker(server):
            assert client.request(A).error is ErrorCode.SUCCESS
            client.check(A, "1")
            server.pause()
            try:
                assert_redis_err(all_verbs(client))
            finally:
                server.resume()
            assert client.request(A).error is ErrorCode.SUCCESS
            assert waiting(client) == 0

    def test_a_server_that_trickles_is_redis_err(self, redis_server: RedisServer) -> None:
        with (
            TcpProxy(redis_server.port) as proxy,
            VerificationClient(
                settings(redis_server, codes_url=proxy.url(0), broker_url=proxy.url(1), results_url=proxy.url(2))
            ) as client,
        ):
            client.enqueue(A)
            client.check(A, "1")
            proxy.mode, proxy.seconds_a_byte = TRICKLE_ANSWERS, 0.9
            assert_redis_err(all_verbs(client))

    def test_nothing_is_pushed_while_replies_cannot_be_received(self, redis_server: RedisServer) -> None:
        with VerificationClient(settings(redis_server, results_url="redis://127.0.0.1:1/2")) as client:
            assert client.request(A) == Reply(A, ErrorCode.REDIS_ERR)
        with redis_server.client(1) as broker:
            assert broker.llen("verification") == 0

    def test_a_refused_login_is_redis_err_and_the_log_says_why(
        self, new_redis_server: NewServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        server = new_redis_server(password="right")
        with VerificationClient(Settings(redis_url=f"redis://:wrong@127.0.0.1:{server.port}")) as client:
            outcomes = all_verbs(client)
        assert_redis_err(outcomes)
        assert isinstance(outcomes[1][0], RedisLoginRefused)
        lines = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
        assert len(lines) == 2  # of `request` and `check`; `enqueue` raises
        assert all("refused the login (WRONGPASS): check the user and password" in line for line in lines)

    def test_a_server_that_is_too_old_is_an_exception(
        self, client: VerificationClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("producer.redis.connection.OLDEST", (99, 0))
        for verb in (lambda: client.request(A), lambda: client.enqueue(A), lambda: client.check(A, "1")):
            with pytest.raises(ServerTooOld, match="is needed"):
                verb()


class TestReplies:
    def test_a_half_open_connection_is_replaced(self, redis_server: RedisServer) -> None:
        with (
            TcpProxy(redis_server.port) as proxy,
            VerificationClient(settings(redis_server, results_url=proxy.url(2))) as client,
            FakeWorker(redis_server, before=lambda *_: proxy.mute_open()),
        ):
            assert client.request(A).error is ErrorCode.SUCCESS

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"{",
            b"\xff\xfe",
            b"null",
            b"[]",
            b"7",
            b'{"result": null}',
            b'{"result": {"email": "a", "error": "0"}}',
            b'{"result": {"email": "a", "error": []}}',
            b'{"status": "FAILURE", "result": {"exc_type": "X"}}',
            b"[" * 100_000,
        ],
        ids=lambda payload: payload[:24].decode(errors="replace"),
    )
    def test_an_invalid_reply_is_ignored(
        self, client: VerificationClient, redis_server: RedisServer, payload: bytes
    ) -> None:
        def disturb(worker: FakeWorker, taken: Taken) -> None:
            key = f"celery-task-meta-{taken.request_id}"
            worker.results.publish(key, payload)
            worker.results.publish(key[:-1], payload)  # an unknown id
            worker.results.publish(key[:-17] + "\udcff".encode(errors="surrogateescape").hex(), payload)

        with FakeWorker(redis_server, before=disturb):
            assert client.request(A).error is ErrorCode.SUCCESS

    def test_a_late_or_second_reply_does_no_harm(self, redis_server: RedisServer) -> None:
        with VerificationClient(settings(redis_server, reply_timeout=0.3)) as client:
            assert client.request(A).error is ErrorCode.TIMEOUT

            def twice(worker: FakeWorker, taken: Taken) -> None:
                payload = '{"status": "SUCCESS", "result": {"email": "a@example.com", "error": 0}}'
                worker.results.publish(f"celery-task-meta-{taken.request_id}", payload)

            with FakeWorker(redis_server, before=twice):
                assert client.request(A).error is ErrorCode.SUCCESS


class TestFork:
    def test_parent_and_child_can_both_use_it(self, client: VerificationClient, redis_server: RedisServer) -> None:
        with FakeWorker(redis_server):
            assert client.request(A).error is ErrorCode.SUCCESS
            pid = os.fork()
            if not pid:
                exit_child(lambda: client.request(A).error is ErrorCode.SUCCESS)
            for _ in range(5):
                assert client.request(A).error is ErrorCode.SUCCESS
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def test_a_child_does_not_keep_the_parent_s_connections_open(self, redis_server: RedisServer) -> None:
        before = connections(redis_server)
        client = VerificationClient(settings(redis_server))
        client.enqueue(A)
        client.check(A, "1")
        assert len(connections(redis_server) - before) == 2
        receive, send = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(send)
            exit_child(lambda: os.read(receive, 1) == b"")
        client.close()
        eventually(lambda: not connections(redis_server) - before)
        os.close(send)
        os.close(receive)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def test_a_fork_during_requests(self, client: VerificationClient, redis_server: RedisServer) -> None:
        with FakeWorker(redis_server), ThreadPoolExecutor(20) as pool:
            replies = [pool.submit(client.request, A) for _ in range(100)]
            pid = os.fork()
            if not pid:
                exit_child(lambda: client.request(A).error is ErrorCode.SUCCESS)
            assert {reply.result().error for reply in replies} == {ErrorCode.SUCCESS}
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class TestClose:
    def test_it_ends_the_thread_and_the_connections(self, redis_server: RedisServer) -> None:
        before = connections(redis_server)
        client = VerificationClient(settings(redis_server))
        with FakeWorker(redis_server):
            client.request(A)
        client.check(A, "1")
        client.close()
        assert threads() == 0
        eventually(lambda: not connections(redis_server) - before)
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.request(A)

    def test_waiting_requests_are_answered_timeout(self, redis_server: RedisServer) -> None:
        client = VerificationClient(settings(redis_server))
        with ThreadPoolExecutor() as pool:
            replies = [pool.submit(client.request, A) for _ in range(5)]
            with redis_server.client(1) as broker:
                eventually(lambda: broker.llen("verification") == 5)
            eventually(lambda: waiting(client) == 5)  # each push is confirmed, only the replies are missing
            client.close()
            assert {reply.result(60).error for reply in replies} == {ErrorCode.TIMEOUT}

    def test_a_collected_client_closes_itself(self, redis_server: RedisServer) -> None:
        before = connections(redis_server)
        client: VerificationClient | None = VerificationClient(settings(redis_server))
        assert client is not None
        client.enqueue(A)
        client = None
        gc.collect()
        eventually(lambda: threads() == 0 and not connections(redis_server) - before)

    def test_an_interrupted_caller_leaves_nothing_behind(self, redis_server: RedisServer) -> None:
        program = f"""
import signal, sys, time, threading
from producer.aio import AsyncVerificationClient
from producer.client import VerificationClient
from producer.settings import Settings
client = VerificationClient(Settings(redis_url={redis_server.url()!r}, reply_timeout=60))
main = threading.get_ident()
threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
try:
    client.request({A!r})
except KeyboardInterrupt:
    time.sleep(0.1)
    here = client._thread.client._on_loop
    sys.exit(len(here.publisher._waiting) + len(here.replies._waiting))
sys.exit(9)
"""
        assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=20, check=False).returncode == 0


def test_a_caller_loads_neither_celery_nor_a_mail_or_web_stack() -> None:
    program = (
        "import sys, producer.client, producer.aio\n"
        "bad = {'celery', 'kombu', 'vine', 'smtplib', 'aiosmtplib', 'jinja2', 'orjson', 'fastapi', 'uvicorn', 'grpc',"
        " 'typer', 'rich', 'worker', 'celeryconfig'}\n"
        "sys.exit(' '.join(sorted(bad & sys.modules.keys())) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
