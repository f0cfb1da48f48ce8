"""TLS and mutual TLS at HTTP and gRPC, in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
import httpx
import pytest
import trustme
from support.api_process import KEY, KEYS, STOP_WITHIN, WITH_KEY, ApiProcess
from support.fake_worker import FakeWorker
from support.process import ROOT, eventually
from support.redis_server import RedisServer

from producer.api.proto import METHOD, SERVICE, GetVarifyReq, GetVarifyRsp
from producer.api.tls import certificates
from producer.errors import BadSetting
from producer.settings import load

pytestmark = pytest.mark.usefixtures("redis")  # the shared server is empty at first

A: Final = "a@example.com"
ASK: Final = "/get_varifycode"
HOST: Final = "127.0.0.1"


class Files:
    """The PEM files that the settings name, and who signed them."""

    def __init__(self, folder: Path, *, mutual: bool = False) -> None:
        self.ca = trustme.CA()
        self.clients = trustme.CA()
        self.cert, self.key, self.client_ca = (folder / name for name in ("cert.pem", "key.pem", "clients.pem"))
        self.clients.cert_pem.write_to_path(self.client_ca)
        self.mutual = mutual
        self.renew()

    @property
    def settings(self) -> dict[str, str]:
        paths = {"VERIFY_TLS_CERT": str(self.cert), "VERIFY_TLS_KEY": str(self.key)}
        return paths | ({"VERIFY_TLS_CLIENT_CA": str(self.client_ca)} if self.mutual else {})

    def renew(self) -> None:
        """A new authority's certificate and key, as a renewal writes them: beside the old ones, then in their place."""
        self.ca = trustme.CA()
        issued = self.ca.issue_cert(HOST)
        for path, blobs in ((self.cert, issued.cert_chain_pems), (self.key, [issued.private_key_pem])):
            new = path.with_suffix(".new")
            new.write_bytes(b"".join(blob.bytes() for blob in blobs))
            new.replace(path)

    def context(self, client: trustme.LeafCert | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.ca.cert_pem.bytes().decode())
        if client is not None:
            client.configure_cert(context)
        return context

    def https(self, api: ApiProcess, client: trustme.LeafCert | None = None) -> int:
        """The error code that a request over HTTPS is answered with, on a connection of its own."""
        url = f"https://{HOST}:{api.http_port}{ASK}"
        body = json.dumps({"email": A}).encode()
        with httpx.Client(verify=self.context(client), trust_env=False, timeout=60) as http:
            return int(http.post(url, content=body, headers=WITH_KEY).json()["error"])

    def grpc(self, api: ApiProcess, client: trustme.LeafCert | None = None) -> int:
        """The same over gRPC."""
        pair = () if client is None else (client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes())
        credentials = grpc.ssl_channel_credentials(self.ca.cert_pem.bytes(), *pair)
        with grpc.secure_channel(f"{HOST}:{api.grpc_port}", credentials) as channel:
            call = channel.unary_unary(f"/{SERVICE}/{METHOD}", GetVarifyReq.SerializeToString, GetVarifyRsp.FromString)
            answer: Any = call(GetVarifyReq(email=A), timeout=60, metadata=(("authorization", f"Bearer {KEY}"),))
            return int(answer.error)


@pytest.fixture
def plain(redis_server: RedisServer) -> dict[str, str]:
    return {"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_API_KEYS": KEYS}


@pytest.fixture
def worker(redis_server: RedisServer) -> Iterator[FakeWorker]:
    with FakeWorker(redis_server) as worker:
        yield worker


@pytest.fixture
def asking() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def unreachable(call: Callable[[], object]) -> bool:
    """Whether the call fails before there is an answer."""
    try:
        call()
    except grpc.RpcError as exc:
        code: grpc.StatusCode = exc.code()
        return code is grpc.StatusCode.UNAVAILABLE
    except (httpx.TransportError, ssl.SSLError, OSError):
        return True
    return False


@pytest.mark.usefixtures("worker")
class TestServing:
    def test_with_keys_and_tls_both_serve_beyond_loopback_and_take_a_renewed_certificate(
        self, plain: dict[str, str], tmp_path: Path
    ) -> None:
        files = Files(tmp_path)
        beyond = {"VERIFY_HTTP_BIND": "0.0.0.0:0", "VERIFY_GRPC_BIND": "0.0.0.0:0"}
        with ApiProcess({**plain, **files.settings, **beyond}) as api:
            assert files.https(api) == files.grpc(api) == 0
            assert unreachable(lambda: api.http.get("/healthz"))
            assert unreachable(lambda: api.call(A, timeout=60))
            old = files.cert.read_bytes(), files.key.read_bytes(), files.ca
            files.renew()
            assert files.https(api) == files.grpc(api) == 0
            assert api.log.count("the renewed TLS certificate is in use") == 1
            # A certificate whose key has not come yet: the one before stays.
            new = files.ca
            files.cert.write_bytes(old[0])
            assert files.https(api) == files.grpc(api) == 0
            assert api.log.count("is not the key of the certificate") == 1
            files.key.write_bytes(old[1])
            files.ca = old[2]
            assert files.https(api) == files.grpc(api) == 0
            files.ca = new
            assert unreachable(lambda: files.https(api))
            assert unreachable(lambda: files.grpc(api))

    @pytest.mark.filterwarnings("ignore:.*TLSv1_1:DeprecationWarning")
    def test_only_tls_1_2_and_newer_are_spoken(self, plain: dict[str, str], tmp_path: Path) -> None:
        files = Files(tmp_path)
        with ApiProcess({**plain, **files.settings}) as api:
            for port in (api.http_port, api.grpc_port):
                for version, spoken in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
                    context = files.context()
                    context.set_ciphers("DEFAULT:@SECLEVEL=0")
                    context.set_alpn_protocols(["h2", "http/1.1"])
                    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_1, version
                    with socket.create_connection((HOST, port), 60) as bare:
                        if spoken:
                            context.wrap_socket(bare, server_hostname=HOST).close()
                        else:
                            with pytest.raises((ssl.SSLError, OSError)):
                                context.wrap_socket(bare, server_hostname=HOST)

    def test_with_a_client_ca_only_its_clients_are_served(self, plain: dict[str, str], tmp_path: Path) -> None:
        files = Files(tmp_path, mutual=True)
        known, foreign = files.clients.issue_cert("app"), trustme.CA().issue_cert("app")
        with ApiProcess({**plain, **files.settings}) as api:
            assert files.https(api, known) == files.grpc(api, known) == 0
            for client in (None, foreign):
                assert unreachable(lambda: files.https(api, client))  # noqa: B023 - called at once
                assert unreachable(lambda: files.grpc(api, client))  # noqa: B023
            # Another authority in its place: who was known is not any more.
            files.clients = trustme.CA()
            files.clients.cert_pem.write_to_path(files.client_ca)
            newcomer = files.clients.issue_cert("app")
            assert files.https(api, newcomer) == files.grpc(api, newcomer) == 0
            assert unreachable(lambda: files.https(api, known))
            assert unreachable(lambda: files.grpc(api, known))

    @pytest.mark.parametrize("mutual", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_the_containers_health_check_speaks_tls(self, plain: dict[str, str], tmp_path: Path, mutual: bool) -> None:
        files = Files(tmp_path, mutual=mutual)
        command = [sys.executable, "-ISB", str(ROOT / "deploy/health.py")]
        with ApiProcess({**plain, **files.settings}) as api:
            for path, status in (("/healthz", 0), *([] if mutual else [("/nothing", 1)])):
                done = subprocess.run(
                    [*command, str(api.http_port), path],
                    env={**os.environ, **files.settings},
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                )
                assert done.returncode == status, done.stdout + done.stderr


def test_sigterm_answers_what_was_accepted_over_tls(
    plain: dict[str, str], redis_server: RedisServer, tmp_path: Path, asking: ThreadPoolExecutor
) -> None:
    files = Files(tmp_path)
    with ApiProcess({**plain, **files.settings, "VERIFY_REPLY_TIMEOUT": "60"}) as api:
        answers = [asking.submit(ask, api) for ask in (files.https, files.grpc)]
        with redis_server.client(1) as broker:
            eventually(lambda: broker.llen("verification") == 2)
        stopping = threading.Thread(target=api.terminate)
        stopping.start()
        eventually(lambda: "shutting down" in api.log)
        with FakeWorker(redis_server):
            assert [answer.result(STOP_WITHIN) for answer in answers] == [0, 0]
        stopping.join()


class TestBadFiles:
    """What is wrong is said at start, in one line, with the setting's name."""

    def problem(self, settings: dict[str, str]) -> str:
        with pytest.raises(BadSetting) as caught:
            certificates(load(settings, dotenv=None))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_without_files_there_is_no_tls(self) -> None:
        assert certificates(load({}, dotenv=None)) is None

    @pytest.mark.parametrize(("given", "missing"), [
        (["CERT"], "KEY"), (["KEY"], "CERT"), (["CLIENT_CA"], "CERT"), (["CERT", "CLIENT_CA"], "KEY"),
    ])  # fmt: skip
    def test_a_missing_setting(self, tmp_path: Path, given: list[str], missing: str) -> None:
        files = Files(tmp_path, mutual=True).settings
        line = self.problem({f"VERIFY_TLS_{name}": files[f"VERIFY_TLS_{name}"] for name in given})
        assert line.startswith(f"VERIFY_TLS_{missing} is not set")

    @pytest.mark.parametrize("name", ["CERT", "KEY", "CLIENT_CA"])
    @pytest.mark.parametrize("content", [None, b"", b"nonsense", b"\xff", b"-----BEGIN CERTIFICATE-----\nAA==\n"])
    def test_a_file_that_is_not_what_it_should_be(self, tmp_path: Path, name: str, content: bytes | None) -> None:
        settings = Files(tmp_path, mutual=True).settings
        path = Path(settings[f"VERIFY_TLS_{name}"])
        path.unlink() if content is None else path.write_bytes(content)
        assert self.problem(settings).startswith(f"VERIFY_TLS_{name}: {str(path)!r} ")

    def test_another_certificates_key(self, tmp_path: Path) -> None:
        files = Files(tmp_path)
        trustme.CA().issue_cert(HOST).private_key_pem.write_to_path(files.key)
        said = f"VERIFY_TLS_KEY: '{files.key}' is not the key of the certificate in VERIFY_TLS_CERT '{files.cert}'"
        assert self.problem(files.settings) == said

    @pytest.mark.slow
    def test_a_bad_file_stops_the_process_at_start(self, tmp_path: Path) -> None:
        missing = str(tmp_path / "none.pem")
        api = ApiProcess({"VERIFY_TLS_CERT": missing, "VERIFY_TLS_KEY": missing})
        try:
            api.start(wait=False)
            assert api.wait(60) == 2
            assert api.log.startswith(f"VERIFY_TLS_CERT: {missing!r} cannot be read (No such file or directory)")
            assert api.log.count("\n") == 1
        finally:
            api.close()
