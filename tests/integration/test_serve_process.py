"""`python -m producer serve` as an operator meets it: how it starts, what it refuses, how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.api_process import KEY, KEYS, WITH_KEY, ApiProcess, answer_of, request_bytes
from support.caller import address
from support.fake_worker import FakeWorker
from support.process import ROOT, eventually
from support.redis_server import RedisServer
from support.rig import Rig, code_in

from producer.api.binding import CannotListen, listen, require_permission
from producer.api.proto import GetVarifyReq
from producer.setting_types import Bind
from producer.settings import load

A = "a@example.com"
ASK = "/get_varifycode"
NOBODY = "redis://127.0.0.1:1"
REDIS_BOUND = 3.0  # seconds, by contract
NewServer = Callable[..., RedisServer]
pytestmark = pytest.mark.usefixtures("redis")  # the shared server is empty at first


@pytest.fixture
def settings(redis_server: RedisServer) -> dict[str, str]:
    return {"VERIFY_REDIS_URL": redis_server.url()}


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def refused(*options: str, **given: str) -> str:
    """The one line on stderr with which it does not start."""
    api = ApiProcess({"VERIFY_REDIS_URL": NOBODY, **given}, *options)
    try:
        api.start(wait=False)
        assert api.wait(60) == 2
        [line] = api.log.splitlines()
        return line
    finally:
        api.close()


class TestStarting:
    def test_help_names_every_option_and_the_settings(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "producer", "serve", "--help"],
            cwd=ROOT,
            env={"COLUMNS": "200", "NO_COLOR": "1", "VERIFY_HTTP_BIND": "nonsense"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        for word in (
            *("--http-bind", "--grpc-bind", "--share-port", "--probe-bind", "--log-level", "--help"),
            *("Exit status", "/readyz", "reflection"),
        ):
            assert word in done.stdout
        for name in (
            "HTTP_BIND",
            "GRPC_BIND",
            "API_KEYS",
            "ALLOW_PLAINTEXT",
            "MAX_QUEUE",
            "REPLY_TIMEOUT",
            "REDIS_URL",
        ):
            assert f"VERIFY_{name}" in done.stdout

    def test_beyond_loopback_it_asks_for_keys(self) -> None:
        line = refused(VERIFY_GRPC_BIND="0.0.0.0:0", VERIFY_TLS_CERT="cert.pem", VERIFY_TLS_KEY="key.pem")
        assert line.startswith("VERIFY_GRPC_BIND: 0.0.0.0:0 is beyond loopback; set VERIFY_API_KEYS, or VERIFY_ALLOW")

    def test_beyond_loopback_keys_are_enough_and_plaintext_is_a_warning(
        self, settings: dict[str, str], caplog: pytest.LogCaptureFixture
    ) -> None:
        everywhere = {"VERIFY_HTTP_BIND": "0.0.0.0:0", "VERIFY_GRPC_BIND": "0.0.0.0:0", "VERIFY_API_KEYS": KEYS}
        with ApiProcess({**settings, **everywhere}) as api:
            assert api.post(ASK, {"email": "nobody"}, headers=WITH_KEY)["error"] == 3
            assert api.call("nobody", key=KEY).error == 3
            logged = [json.loads(line) for line in api.log.splitlines()]
            warned = [each["event"] for each in logged if each["level"] == "warning" and "unencrypted" in each["event"]]
            assert [text.partition(":")[0] for text in warned] == ["VERIFY_HTTP_BIND", "VERIFY_GRPC_BIND"]
        require_permission(load({**everywhere, "VERIFY_ALLOW_PLAINTEXT": "1"}, dotenv=None))
        assert caplog.records == []

    def test_a_busy_port_is_one_line(self, taken: int) -> None:
        line = refused(VERIFY_GRPC_BIND=f"127.0.0.1:{taken}")
        assert line == f"VERIFY_GRPC_BIND: cannot listen on 127.0.0.1:{taken} (Address already in use)"

    def test_a_place_that_is_not_ours_is_one_line(self) -> None:
        line = refused(VERIFY_HTTP_BIND="192.0.2.1:80", VERIFY_ALLOW_PLAINTEXT="1")
        assert line.startswith("VERIFY_HTTP_BIND: cannot listen on 192.0.2.1:80 (")
        with pytest.raises(CannotListen, match="has no address"):
            listen(Bind("no-such-host.invalid", 1), "a test")

    @pytest.mark.slow
    def test_a_bad_setting_is_one_line(self) -> None:
        assert refused("--http-bind", "8081") == "VERIFY_HTTP_BIND: '8081' is not allowed; allowed: host:port"

    @pytest.mark.parametrize(
        "missing",
        ["grpc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fastapi", "uvicorn", "prometheus_client"))],
    )
    def test_a_missing_extra_is_named(self, tmp_path: Path, missing: str) -> None:
        (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('none', name={missing!r})")
        assert refused(PYTHONPATH=f"{tmp_path}:{ROOT}") == f"The API needs {missing}: pip install 'verifyserver[api]'"

    @pytest.mark.slow
    def test_what_is_allowed_to_listen_beyond_loopback_does(self, settings: dict[str, str]) -> None:
        open_to_all = {"VERIFY_GRPC_BIND": "0.0.0.0:0", "VERIFY_ALLOW_PLAINTEXT": "1"}
        with ApiProcess({**settings, **open_to_all}, "--http-bind", "0.0.0.0:0") as api:
            assert api.get_code("nobody")["error"] == api.call("nobody").error == 3

    def test_without_uvloop_it_serves_at_all_addresses_of_localhost(
        self, settings: dict[str, str], redis_server: RedisServer, tmp_path: Path
    ) -> None:
        (tmp_path / "uvloop.py").write_text("raise ModuleNotFoundError('none', name='uvloop')")
        settings |= {"VERIFY_HTTP_BIND": "localhost:0", "VERIFY_GRPC_BIND": "localhost:0"}
        with FakeWorker(redis_server), ApiProcess({**settings, "PYTHONPATH": f"{tmp_path}:{ROOT}"}) as api:
            for found in {info[4][0] for info in socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)}:
                socket.create_connection((str(found), api.http_port), 5).close()
                socket.create_connection((str(found), api.grpc_port), 5).close()
            assert api.get_code(A)["error"] == api.call(A).error == 0
            api.signal(signal.SIGTERM)
            assert api.wait() == 0
            assert "stopped" in api.log.splitlines()[-1]

    def test_the_old_servers_config_is_enough(self, redis_server: RedisServer, tmp_path: Path) -> None:
        config = tmp_path / "config.json"
        redis = {"host": "127.0.0.1", "port": redis_server.port, "passwd": ""}
        config.write_text(json.dumps({"email": {"user": "x@example.com", "pass": "p"}, "redis": redis, "mysql": {}}))
        with FakeWorker(redis_server), ApiProcess({"VERIFY_CONFIG": str(config)}) as api:
            assert api.call(A).error == 0


class TestRedisTrouble:
    def test_down_at_start_then_up(self, new_redis_server: NewServer) -> None:
        server = new_redis_server()
        server.stop()
        with ApiProcess({"VERIFY_REDIS_URL": server.url()}) as api:
            eventually(
                lambda: "Redis cannot be reached (broker, results, codes): check VERIFY_REDIS_URL; until" in api.log
            )
            assert api.get_code(A) == {"error": 1, "email": A}
            assert api.call(A).error == 1
            assert api.check(A, "1") == {"error": 1, "email": A}
            answer = api.http.get("/readyz")
            assert (answer.status_code, answer.json()["broker"]) == (503, False)
            assert api.http.get("/healthz").status_code == 200
            assert api.metric("verify_broker_up") == 0
            server.start()
            with FakeWorker(server):
                assert api.get_code(A)["error"] == 0
                assert api.call(A).error == 0
            assert api.check(A, "1")["error"] == 1003

    def test_a_refused_login_is_told_apart_in_readyz(self, new_redis_server: NewServer) -> None:
        server = new_redis_server(password="right")
        with ApiProcess({"VERIFY_REDIS_URL": server.url().replace("right", "wrong")}) as api:
            eventually(
                lambda: (
                    "codes): check the user and password in VERIFY_REDIS_URL, and VERIFY_REDIS_PASSWORD; until"
                    in api.log
                )
            )
            answer = api.http.get("/readyz")
            assert answer.status_code == 503
            assert answer.json()["problem"] == "Redis refused the login (broker, results, codes)"

    def test_hung_and_back(self, new_redis_server: NewServer) -> None:
        server = new_redis_server()
        with ApiProcess({"VERIFY_REDIS_URL": server.url()}) as api, FakeWorker(server):
            assert api.get_code(A)["error"] == 0
            server.pause()
            verbs: list[Callable[[], object]] = [
                lambda: api.get_code(A)["error"],
                lambda: api.call(A).error,
                lambda: api.check(A, "1")["error"],
                lambda: api.http.get("/readyz").status_code,
                lambda: api.http.get("/healthz").status_code,
            ]
            with ThreadPoolExecutor(8) as pool:
                said = list(pool.map(lambda verb: verb(), verbs))
            assert said == [1, 1, 1, 503, 200]
            server.resume()
            eventually(lambda: api.get_code(A)["error"] == 0)


class TestStopping:
    @pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
    def test_what_was_accepted_is_answered(
        self, settings: dict[str, str], redis_server: RedisServer, number: signal.Signals
    ) -> None:
        go = threading.Event()

        def hold(*_: object) -> None:
            go.wait(10)

        with (
            FakeWorker(redis_server, before=hold) as worker,
            ApiProcess(settings) as api,
            ThreadPoolExecutor(40) as pool,
        ):
            by_http = [pool.submit(api.get_code, f"h{i}@example.com") for i in range(20)]
            by_grpc = [api.stub.future(GetVarifyReq(email=f"g{i}@example.com")) for i in range(20)]
            watching = health_pb2_grpc.HealthStub(api.channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
            idle = [api.knock(), api.knock(b"POST /get"), api.knock(port=api.grpc_port)]
            eventually(
                lambda: sum(api.metric("verify_api_requests_in_flight", protocol=d) for d in ("http", "grpc")) == 40
            )
            api.signal(number)
            assert next(watching).status == health_pb2.HealthCheckResponse.NOT_SERVING
            for port in (api.http_port, api.grpc_port):
                eventually(lambda port=port: not listens(port))  # type: ignore[misc]
            assert api.alive
            go.set()
            assert [each.result()["error"] for each in by_http] == [0] * 20
            assert [each.result().error for each in by_grpc] == [0] * 20
            assert api.wait() == 0
            assert len(worker.taken) == 40
            for each in idle:
                each.close()

    def test_without_a_reply_it_is_a_timeout_long_before_the_reply_timeout(self, settings: dict[str, str]) -> None:
        with ApiProcess({**settings, "VERIFY_REPLY_TIMEOUT": "60"}) as api, ThreadPoolExecutor(4) as pool:
            asked = pool.submit(api.get_code, A), pool.submit(lambda: api.call(A).error)
            half = api.knock(request_bytes(ASK, b"x" * 100)[:-50])
            eventually(lambda: api.metric("verify_api_requests_in_flight", protocol="http") == 1)
            eventually(lambda: api.metric("verify_api_requests_in_flight", protocol="grpc") == 1)
            api.signal(signal.SIGTERM)
            assert answer_of(half)[0] == 408
            assert asked[0].result() == {"error": 6, "email": A}
            assert asked[1].result() == 6
            assert api.wait() == 0
            half.close()

    def test_a_second_signal_ends_it_without_the_answers(self, settings: dict[str, str]) -> None:
        with ApiProcess({**settings, "VERIFY_REPLY_TIMEOUT": "60"}) as api:
            call = api.stub.future(GetVarifyReq(email=A))
            eventually(lambda: api.metric("verify_api_requests_in_flight", protocol="grpc") == 1)
            api.signal(signal.SIGTERM)
            eventually(lambda: "shutting down" in api.log)
            api.signal(signal.SIGTERM)
            assert api.wait() == 128 + signal.SIGTERM
            with pytest.raises(grpc.RpcError):
                call.result()


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:  # the listener closed during the handshake: the next attempt tells
        return True
    return True


def test_from_the_api_to_the_mailbox_and_back(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    rig.add_worker()
    with ApiProcess(rig.settings, "--log-level", "debug") as api:
        assert api.http.get("/readyz").json()["workers"] == 1
        by_http, by_grpc = address("http"), address("grpc")
        assert api.get_code(by_http, locale="en") == {"error": 0, "email": by_http}
        said = api.call(by_grpc)
        assert (said.error, said.email, said.code) == (0, by_grpc, "")
        for email in (by_http, by_grpc):
            code = code_in(rig.mails_to(email)[0])
            assert rig.codes.get(f"code_{email}") == code.encode()
            assert [api.check(email, each)["error"] for each in ("wrong", code, code)] == [1004, 0, 1003]
            assert code not in api.log
            assert email not in api.log
        rig.worker.kill()
        eventually(lambda: api.http.get("/readyz").status_code == 503)
        rig.add_worker()
        eventually(lambda: api.http.get("/readyz").status_code == 200)


def test_clients_that_do_not_read_hold_nobody_up(settings: dict[str, str], redis_server: RedisServer) -> None:
    one = request_bytes(ASK, json.dumps({"email": A}).encode())
    with FakeWorker(redis_server), ApiProcess(settings) as api:
        unread = [api.knock(one) for _ in range(300)]
        eventually(lambda: api.metric("verify_api_requests_total", protocol="http", error="0", verb="request") == 300)
        assert httpx.get(f"http://127.0.0.1:{api.http_port}/healthz", trust_env=False).status_code == 200
        for each in unread:
            each.close()
