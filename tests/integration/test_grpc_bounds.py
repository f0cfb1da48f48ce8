"""What the gRPC API bounds: the memory that hostile clients can make it take, and how long they hold what they hold."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.api_process import ApiProcess
from support.http2 import NO_WINDOW, OPENING, Crowd, begin, call, frames, head, header, message, streams
from support.process import eventually
from support.redis_server import RedisServer

from producer.api.binding import listen
from producer.api.frames import (
    PREFACE,
    ErrorCode,
    Flag,
    FrameType,
    Setting,
    frame,
    reset_frame,
    settings_frame,
    window_frame,
)
from producer.api.http2 import KEEPALIVE_AFTER, MAX_CALLS, MESSAGE_LIMIT, Call, Http2Server
from producer.api.proto import METHOD, SERVICE, GetVarifyReq
from producer.setting_types import Bind

ASK: Final = f"/{SERVICE}/{METHOD}"
WATCH: Final = "/grpc.health.v1.Health/Watch"
REFLECT: Final = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
CONNECTIONS: Final = 60
GROWTH: Final = 10.0  # MB, of 60 connections; without the bounds each attack takes several times as much
LONG: Final = GetVarifyReq(email="x" * (MESSAGE_LIMIT - 100)).SerializeToString()

# What each of the connections sends. Made only when it is sent, as every process of xdist loads this.
ATTACKS: Final[dict[str, Callable[[], bytes]]] = {
    "watchers": lambda: OPENING + b"".join(call(i, WATCH, b"") for i in streams(400)),
    "reflection": lambda: OPENING
    + b"".join(begin(i, REFLECT) + frame(FrameType.DATA, i, message(b"")) for i in streams(400)),
    "calls whose message never comes": lambda: OPENING + b"".join(begin(i, ASK) for i in streams(4000)),
    "half-sent messages": lambda: OPENING
    + b"".join(begin(i, ASK) + frame(FrameType.DATA, i, message(b"x" * 8000, claimed=16000)) for i in streams(100)),
    "answers that nobody takes": lambda: NO_WINDOW + b"".join(call(i, ASK, LONG) for i in streams(60)),
    "headers without an end": lambda: OPENING
    + frame(FrameType.HEADERS, 1, head(ASK))
    + frame(FrameType.CONTINUATION, 1, header("x", "v" * 16000)) * 60,
    "headers that unpack to megabytes": lambda: OPENING
    + frame(FrameType.HEADERS, 1, head(ASK, header("x", "v" * 3900, indexed=True)) + b"\xbe" * 12000, Flag.END_HEADERS),
    "many headers": lambda: OPENING
    + b"".join(begin(i, ASK, *[header(f"x-{n}", "v" * 100) for n in range(120)]) for i in streams(50)),
}  # fmt: skip
# What each sends again and again; it must be hung up on.
FLOODS: Final = {
    "pings": frame(FrameType.PING, 0, b"12345678"),
    "settings": settings_frame({Setting.INITIAL_WINDOW_SIZE: 65535}),
    "windows": window_frame(FrameType.DATA, 1),
    "priorities": frame(FrameType.PRIORITY, 1, b"\x00\x00\x00\x00\x10"),
    "empty data": frame(FrameType.DATA, 1),
    "unknown frames": frame(99, 0),
}


@pytest.fixture(scope="module")
def api(redis_server: RedisServer) -> Iterator[ApiProcess]:
    with ApiProcess({"VERIFY_REDIS_URL": redis_server.url()}) as api:
        yield api


def megabytes(api: ApiProcess) -> float:
    status = Path(f"/proc/{api.pid}/status").read_text("utf-8")
    [size] = re.findall(r"VmRSS:\s+(\d+)", status)
    return int(size) / 1024


def goaway(data: bytes) -> int | None:
    """The error of the frame that ends the connection; None if there is none."""
    errors = [each.error for each in frames(data) if each.kind == FrameType.GOAWAY]
    return errors[-1] if errors else None


def ended(crowd: Crowd) -> list[bytes]:
    """All that comes on each connection until it is closed."""
    connections = list(crowd.connections)
    found = dict.fromkeys(connections, b"")

    def all_closed() -> bool:
        before = list(crowd.connections)
        for connection, data in zip(before, crowd.read(), strict=True):
            found[connection] += data
        return not crowd.connections

    eventually(all_closed, KEEPALIVE_AFTER - 2)  # then it would be closed because it answers no ping
    return list(found.values())


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_connections_take_little_memory_and_others_are_served(api: ApiProcess, name: str) -> None:
    assert api.call("nobody").error == 3
    before = megabytes(api)
    most = before
    with Crowd(api.grpc_port, CONNECTIONS, ATTACKS[name]()) as crowd:
        for _ in range(5):
            assert api.call("nobody", timeout=60).error == 3
            crowd.read()
            most = max(most, megabytes(api))
            time.sleep(0.05)
    assert most - before < GROWTH


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_600_hostile_connections_take_40_megabytes_at_most(redis_server: RedisServer, name: str) -> None:
    """While 50 others ask each second, and all are answered."""
    with ApiProcess({"VERIFY_REDIS_URL": redis_server.url()}) as api, ThreadPoolExecutor(50) as callers:
        assert api.call("nobody").error == 3
        before = most = megabytes(api)
        with Crowd(api.grpc_port, 600, ATTACKS[name]()) as crowd:
            answers = []
            for _ in range(40):
                answers += [callers.submit(api.call, "nobody") for _ in range(10)]
                crowd.read()
                most = max(most, megabytes(api))
                time.sleep(0.2)
            assert {answer.result().error for answer in answers} == {3}
        assert most - before < 40


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_frames_without_calls_ends_its_connection(api: ApiProcess, name: str) -> None:
    with Crowd(api.grpc_port, 1, OPENING + begin(1, ASK)) as crowd:
        crowd.send(FLOODS[name] * 2000)
        assert goaway(ended(crowd)[0]) in {
            ErrorCode.ENHANCE_YOUR_CALM,
            None,
        }  # closing with data unread may reset the connection
    assert api.call("nobody", timeout=60).error == 3


def test_calls_that_are_cancelled_at_once_end_their_connection(api: ApiProcess) -> None:
    with Crowd(api.grpc_port, 1, OPENING) as crowd:
        crowd.send(b"".join(begin(i, ASK) + reset_frame(i, ErrorCode.CANCEL) for i in streams(1000)))
        ended(crowd)


def test_a_client_may_cancel_all_its_calls(api: ApiProcess) -> None:
    calls = [api.stub.future(GetVarifyReq(email="a@example.com")) for _ in range(MAX_CALLS)]
    eventually(lambda: api.metric("verify_api_requests_in_flight", protocol="grpc") == MAX_CALLS)
    for each in calls:
        each.cancel()
    eventually(lambda: api.metric("verify_api_requests_in_flight", protocol="grpc") == 0)
    with Crowd(api.grpc_port, 1, OPENING) as crowd:  # not even young ones, on a connection of their own
        crowd.send(b"".join(begin(i, ASK) for i in streams(MAX_CALLS)))
        crowd.send(b"".join(reset_frame(i, ErrorCode.CANCEL) for i in streams(MAX_CALLS)))
        crowd.send(call(2 * MAX_CALLS + 1, ASK, b""))
        crowd.wait_for(b"grpc-status")


def test_a_connection_watches_our_health_four_times(api: ApiProcess) -> None:
    own = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
    with grpc.insecure_channel(f"127.0.0.1:{api.grpc_port}", options=own) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watchers = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(4)]
        assert {next(each).status for each in watchers} == {health_pb2.HealthCheckResponse.SERVING}
        with pytest.raises(grpc.RpcError) as raised:
            next(stub.Watch(health_pb2.HealthCheckRequest()))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watchers[0].cancel()

        def watched() -> bool:
            try:
                return bool(next(stub.Watch(health_pb2.HealthCheckRequest())))
            except grpc.RpcError:
                return False

        eventually(watched)


@pytest.mark.slow
def test_what_never_comes_is_waited_for_in_vain(api: ApiProcess) -> None:
    with Crowd(api.grpc_port, 1, PREFACE[:10]) as silent, Crowd(api.grpc_port, 1, OPENING + begin(1, ASK)) as waiting:
        waiting.wait_for(b"no message within 5 s")
        ended(silent)


class TestTooManyConnections:
    """With room for three."""

    @pytest.fixture
    async def port(self) -> AsyncIterator[int]:
        async def echo(call: Call) -> bytes | None:
            return await call.message()

        server = Http2Server({"/echo": echo}, lambda _: None, frozenset(), limit=3)
        sockets = listen(Bind("127.0.0.1", 0), "a test")
        await server.start(sockets, None, 10)
        yield sockets[0].getsockname()[1]
        await server.stop(0)

    async def connect(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(OPENING)
        await reader.readexactly(9)  # the server took it in
        return reader, writer

    async def echoed(self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], stream: int = 1) -> bool:
        reader, writer = connection
        writer.write(call(stream, "/echo", b"ping!"))
        try:
            return bool(await reader.readuntil(b"grpc-status\x010"))
        except (EOFError, ConnectionError):
            return False

    async def test_the_oldest_that_never_sent_a_whole_call_goes_first(self, port: int) -> None:
        proved = await self.connect(port)
        assert await self.echoed(proved)
        oldest, younger, newest = [await self.connect(port) for _ in range(3)]
        assert [await self.echoed(each) for each in (oldest, younger, newest)] == [False, True, True]
        # All three have proved themselves: there is no room for another.
        with pytest.raises((EOFError, ConnectionError)):
            await self.connect(port)
        assert await self.echoed(proved, 3)


async def test_a_tls_connection_counts_before_its_handshake() -> None:
    authority = trustme.CA()
    here, there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(here)
    authority.configure_trust(there)

    async def echo(call: Call) -> bytes | None:
        return await call.message()

    server = Http2Server({"/echo": echo}, lambda _: None, frozenset(), limit=3)
    sockets = listen(Bind("127.0.0.1", 0), "a test")
    await server.start(sockets, here, 10)
    port = sockets[0].getsockname()[1]
    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=there)
    writer.write(OPENING + call(1, "/echo", b"ping!"))
    assert await reader.readuntil(b"grpc-status\x010")
    assert await silent[0][0].read() == b""  # it was the oldest
    assert len(server.connections) == 3
    await server.stop(60)
    assert [await each.read() for each, _ in silent[1:]] == [b"", b""]
    for _, each in (*silent, (reader, writer)):
        each.close()
