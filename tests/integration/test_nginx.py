"""`deploy/nginx.conf` in a real nginx, in front of a real API."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.api_process import KEY, KEYS, WITH_KEY, ApiProcess
from support.fake_worker import FakeWorker
from support.process import ROOT, eventually
from support.redis_server import RedisServer

from producer.api.proto import METHOD, SERVICE, GetVarifyReq, GetVarifyRsp

pytestmark = [pytest.mark.tools, pytest.mark.usefixtures("redis")]
A = "a@example.com"
MANY = 100  # requests, more than are let through while they are made


class Proxy:
    """nginx with the shipped file; only ports and certificates are replaced."""

    def __init__(self, api: ApiProcess, directory: Path) -> None:
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost", "127.0.0.1")
        certificate.private_key_and_cert_chain_pem.write_to_path(directory / "verify.pem")
        self._root = authority.cert_pem.bytes()
        http, rpc = free_port(), free_port()
        text = (ROOT / "deploy/nginx.conf").read_text()
        for old, new in (
            ("127.0.0.1:8081", f"127.0.0.1:{api.http_port}"),
            ("127.0.0.1:50051", f"127.0.0.1:{api.grpc_port}"),
            ("listen 443", f"listen 127.0.0.1:{http}"),
            ("listen 50443", f"listen 127.0.0.1:{rpc}"),
            ("/etc/nginx/verify.pem", str(directory / "verify.pem")),
            ("/etc/nginx/verify.key", str(directory / "verify.pem")),
        ):
            assert old in text
            text = text.replace(old, new)
        text = text.replace("listen [::]:", "# listen [::]:")  # a container may have no IPv6
        (directory / "verifyserver.conf").write_text(text)
        paths = "".join(
            f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (directory / "nginx.conf").write_text(
            f"daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log;"
            f"events {{}} http {{ {paths} set_real_ip_from 127.0.0.1; real_ip_header X-Test-Address;"
            f" include {directory}/verifyserver.conf; }}"
        )
        command = [nginx, "-p", str(directory), "-c", str(directory / "nginx.conf")]
        checked = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=120, check=False)
        assert checked.returncode == 0, checked.stderr
        self._process = subprocess.Popen(command)
        context = ssl.create_default_context(cadata=self._root.decode())
        self.http = httpx.Client(base_url=f"https://localhost:{http}", verify=context, timeout=60, trust_env=False)
        credentials = grpc.ssl_channel_credentials(self._root)
        self.channel = grpc.secure_channel(f"localhost:{rpc}", credentials)
        eventually(lambda: _listens(http) and _listens(rpc))

    def call(self, email: str, client: str | None = None) -> Any:
        """`GetVarifyCode`."""
        call = self.channel.unary_unary(f"/{SERVICE}/{METHOD}", GetVarifyReq.SerializeToString, GetVarifyRsp.FromString)
        named = (("x-verify-client", client),) if client else ()
        return call(GetVarifyReq(email=email), timeout=15, metadata=(("authorization", f"Bearer {KEY}"), *named))

    def close(self) -> None:
        """End it."""
        self.http.close()
        self.channel.close()
        self._process.terminate()
        self._process.wait(60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def worker(redis_server: RedisServer) -> Iterator[FakeWorker]:
    with FakeWorker(redis_server) as worker:
        yield worker


@pytest.fixture
def api(redis_server: RedisServer, worker: FakeWorker) -> Iterator[ApiProcess]:  # noqa: ARG001 - it answers
    with ApiProcess({"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_API_KEYS": KEYS}) as api:
        yield api


@pytest.fixture
def proxy(api: ApiProcess, tmp_path: Path) -> Iterator[Proxy]:
    tmp_path.chmod(0o755)
    proxy = Proxy(api, tmp_path)
    yield proxy
    proxy.close()


def ask(proxy: Proxy, email: str = A, client: str | None = None, address: str | None = None) -> httpx.Response:
    """A request for a code; `address`: where nginx takes it to come from."""
    named = {"X-Verify-Client": client} if client else {}
    elsewhere = {"X-Test-Address": address} if address else {}
    body = json.dumps({"email": email})
    return proxy.http.post("/get_varifycode", content=body, headers=WITH_KEY | named | elsewhere)


def is_limited(answers: Iterable[httpx.Response]) -> bool:
    """Whether one of them is refused with error 4. A burst of eleven is let through, and one more every two seconds."""
    return any((answer.status_code, answer.json()["error"]) == (429, 4) for answer in answers)


def test_http_and_grpc_pass_through(proxy: Proxy) -> None:
    assert ask(proxy, "ü@x.example").json() == {"error": 0, "email": "ü@x.example"}
    body = json.dumps({"email": A, "varifycode": "1"})
    assert proxy.http.post("/check_varifycode", content=body, headers=WITH_KEY).json() == {"error": 1003, "email": A}
    assert proxy.http.post("/get_varifycode", content=body).status_code == 401
    assert proxy.http.get("/healthz").json() == {"status": "ok"}
    said = proxy.call(A)
    assert (said.error, said.email, said.code) == (0, A, "")
    stub = health_pb2_grpc.HealthStub(proxy.channel)
    assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


def test_internal_paths_and_large_bodies_are_refused(proxy: Proxy) -> None:
    for path in ("/", "/metrics", "/readyz", "/docs"):
        answer = proxy.http.get(path, headers=WITH_KEY)
        assert (answer.status_code, answer.json()["error"]) == (404, 1001)
    answer = proxy.http.post("/get_varifycode", content=b"x" * 20_000, headers=WITH_KEY)
    assert (answer.status_code, answer.json()["error"]) == (413, 1001)


def test_requests_of_one_address_are_limited(proxy: Proxy) -> None:
    answers = [ask(proxy, address="192.0.2.1") for _ in range(11)]
    assert [answer.status_code for answer in answers] == [200] * 11
    assert is_limited(ask(proxy, address="192.0.2.1") for _ in range(MANY))
    assert ask(proxy, address="192.0.2.2").status_code == 200


def test_the_users_of_a_trusted_backend_are_limited_one_by_one(proxy: Proxy, worker: FakeWorker) -> None:
    assert is_limited(ask(proxy, client="a") for _ in range(MANY))
    assert ask(proxy, client="b").status_code == 200
    assert worker.taken[-1].kwargs == {"email": A, "client": "b"}
    assert is_limited(ask(proxy) for _ in range(MANY))  # who names none shares with all others of this address
    assert ask(proxy, client="c").status_code == 200


def test_over_grpc_they_are_too(proxy: Proxy, worker: FakeWorker) -> None:
    assert proxy.call(A, client="a").error == 0
    assert worker.taken[-1].kwargs["client"] == "a"
    with pytest.raises(grpc.RpcError) as raised:
        [proxy.call(A, client="a") for _ in range(MANY)]
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert proxy.call(A, client="b").error == 0


def test_nobody_else_is_believed(proxy: Proxy, worker: FakeWorker) -> None:
    assert is_limited(ask(proxy, client=f"user {i}", address="192.0.2.1") for i in range(MANY))
    assert all("client" not in each.kwargs for each in worker.taken)


def test_an_ipv6_subscriber_is_a_64(proxy: Proxy) -> None:
    assert is_limited(ask(proxy, address=f"2001:a0a:0:1::{i + 1:x}") for i in range(MANY))
    assert ask(proxy, address="2001:a0a:0:2::1").status_code == 200


def test_without_the_api_nginx_answers_its_error_codes(proxy: Proxy, api: ApiProcess) -> None:
    api.process.terminate()
    assert api.wait() == 0
    answer = ask(proxy)
    assert (answer.status_code, answer.json()["error"]) == (502, 1)
    with pytest.raises(grpc.RpcError) as raised:
        proxy.call(A)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
