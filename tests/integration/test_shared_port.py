"""`serve --share-port`: API processes on one port, of which one replaces another and no request is lost."""

from __future__ import annotations

import asyncio
import configparser
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
from support.api_process import STOP_WITHIN, TIMEOUT, ApiProcess, answer_of, request_bytes
from support.fake_worker import FakeWorker
from support.http2 import OPENING, Crowd, call
from support.process import ROOT, START_TIMEOUT, free_port
from support.redis_server import RedisServer

from bench.restart.__main__ import measure
from producer.api import shared_port
from producer.api.binding import CannotListen, listen
from producer.api.frames import field
from producer.api.proto import METHOD, SERVICE, GetVarifyReq
from producer.api.shared_port import SharedPorts
from producer.setting_types import Bind

NAME = "VERIFY_HTTP_BIND"
WAITING = 20  # connections
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Linux only"),
    pytest.mark.usefixtures("redis"),  # the shared server is empty at first
]


@pytest.fixture
def settings(redis_server: RedisServer) -> Iterator[dict[str, str]]:
    with FakeWorker(redis_server):
        yield {"VERIFY_REDIS_URL": redis_server.url()}


class TestReplacing:
    def failures(self, settings: dict[str, str], way: str, *, requests: int, seconds: float, most: int) -> object:
        outcomes, replacements = measure(settings, way, requests=requests, seconds=seconds, most=most)
        assert replacements >= 1
        assert sum(each.sent for each in outcomes.values()) == requests
        return {name: each.failed for name, each in outcomes.items() if each.failed}

    def test_under_load_no_request_is_refused(self, settings: dict[str, str]) -> None:
        assert self.failures(settings, "together", requests=300, seconds=3, most=1) == {}

    @pytest.mark.slow
    @pytest.mark.parametrize("way", ["together", "late", "failing"])
    def test_again_and_again_no_request_is_refused(self, settings: dict[str, str], way: str) -> None:
        assert self.failures(settings, way, requests=2000, seconds=20, most=10) == {}


def test_what_waits_to_be_accepted_is_served_after_sigterm(settings: dict[str, str]) -> None:
    """With an address for probes, which is this process' own."""
    request = request_bytes("/get_varifycode", json.dumps({"email": "nobody"}).encode())
    with ApiProcess(settings, "--share-port", "--probe-bind", "127.0.0.1:0") as api:
        found = re.search(r"this process alone answers HTTP on \S+:(\d+)", api.log)
        assert found
        assert httpx.get(f"http://127.0.0.1:{found[1]}/healthz", trust_env=False).status_code == 200
        api.pause()
        ports = [api.http_port] * WAITING + [int(found[1])]
        waiting = [api.knock(request, port=port) for port in ports]
        email = GetVarifyReq(email="nobody").SerializeToString()
        with Crowd(api.grpc_port, WAITING, OPENING + call(1, f"/{SERVICE}/{METHOD}", email)) as crowd:
            api.signal(signal.SIGTERM)
            api.resume()
            for each in waiting:
                status, _, body = answer_of(each)
                assert (status, json.loads(body)["error"]) == (200, 3)
                each.close()
            for each in crowd.connections:
                each.settimeout(TIMEOUT)
                answer = b"".join(iter(lambda each=each: each.recv(65536), b""))  # type: ignore[misc]
                assert field(b"grpc-status", b"0") in answer
        assert api.wait() == 0


@pytest.mark.slow
def test_the_unit_starts_what_the_docs_say(settings: dict[str, str], redis_server: RedisServer) -> None:
    """`systemctl start` waits until the process answers on its own port, and only then the old one is stopped."""
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.read(ROOT / "deploy/verify-api@.service")
    service = unit["Service"]
    port = str(free_port())
    start, ready = (shlex.split(service[each].replace("%i", port)) for each in ("ExecStart", "ExecStartPost"))
    assert start[1:4] == ["-m", "producer", "serve"]
    with redis_server.client(1) as broker, ApiProcess(settings, *start[4:]) as api:
        broker.zadd("verification.workers", {"alive": time.time() + START_TIMEOUT})
        subprocess.run(["curl", *ready[1:]], check=True, timeout=START_TIMEOUT)
        assert api.stop() == 0
    assert float(service["TimeoutStopSec"]) > STOP_WITHIN


class TestSockets:
    def test_a_process_without_the_option_is_told_of_it(self) -> None:
        shared = SharedPorts()
        [listener] = listen(Bind("127.0.0.1", 0), NAME, shared)
        bind = Bind("127.0.0.1", listener.getsockname()[1])
        with listener, pytest.raises(CannotListen) as caught:
            listen(bind, NAME)
        assert str(caught.value) == (
            f"{NAME}: cannot listen on {bind} (Address already in use); the API there shares its port with those that"
            " have --share-port"
        )

    def test_a_process_with_the_option_is_told_that_the_other_lacks_it(self) -> None:
        [listener] = listen(Bind("127.0.0.1", 0), NAME)
        bind = Bind("127.0.0.1", listener.getsockname()[1])
        for _ in range(2):  # the first attempt leaves nothing behind
            with pytest.raises(CannotListen) as caught:
                listen(bind, NAME, SharedPorts())
            assert str(caught.value) == (
                f"{NAME}: cannot share {bind} (Address already in use): what listens there is no API with"
                " --share-port, or listens at another address; end it, or choose another port"
            )
        listener.close()
        listen(bind, NAME, SharedPorts())[0].close()

    def test_a_process_that_does_not_answer_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shared_port, "ANSWER_TIMEOUT", 0.1)
        frozen = SharedPorts()
        [listener] = listen(Bind("127.0.0.1", 0), NAME, frozen)
        bind = Bind("127.0.0.1", listener.getsockname()[1])
        with listener, pytest.raises(CannotListen) as caught:
            listen(bind, NAME, SharedPorts())
        assert str(caught.value) == f"{NAME}: cannot share {bind} (the API that listens there does not answer; end it)"

    @pytest.mark.anyio
    async def test_another_users_process_gets_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shared = SharedPorts()
        [listener] = listen(Bind("127.0.0.1", 0), NAME, shared)
        bind = Bind("127.0.0.1", listener.getsockname()[1])
        shared.serve()
        monkeypatch.setattr(os, "geteuid", lambda: -1)
        with listener, pytest.raises(CannotListen, match="belongs to another user; start this one as that user"):
            listen(bind, NAME, SharedPorts())
        shared.close()

    @pytest.mark.anyio
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    async def test_the_port_passes_from_process_to_process_and_ends_with_the_last(self, host: str) -> None:
        bind = Bind(host, free_port())
        previous: tuple[SharedPorts, list[socket.socket]] | None = None
        with socket.socket() as client:
            for _ in range(3):
                shared = SharedPorts()
                sockets = await asyncio.to_thread(listen, bind, NAME, shared)
                shared.serve()
                if previous is None:
                    client.connect(("127.0.0.1", bind.port))  # and waits
                else:
                    close(*previous)
                previous = shared, sockets
            assert previous
            [listener] = [each for each in previous[1] if each.family == socket.AF_INET]
            accepted, peer = listener.accept()
            assert peer == client.getsockname()
            accepted.close()
            close(*previous)
        listen(bind, NAME)[0].close()

    @pytest.mark.anyio
    async def test_of_those_that_start_at_once_all_listen(self) -> None:
        bind = Bind("127.0.0.1", free_port())
        ports = [SharedPorts() for _ in range(4)]

        async def start(shared: SharedPorts) -> socket.socket:
            [listener] = await asyncio.to_thread(listen, bind, NAME, shared)
            shared.serve()
            return listener

        listeners = await asyncio.gather(*(start(each) for each in ports))
        assert {each.getsockname()[1] for each in listeners} == {bind.port}
        for shared, listener in zip(ports, listeners, strict=True):
            close(shared, [listener])


def close(shared: SharedPorts, sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()
    shared.close()
