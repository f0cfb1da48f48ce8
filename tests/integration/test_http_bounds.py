"""Strangers cannot fill the HTTP API's memory, and the connections that they hold open go first."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import trustme
import uvicorn
from support.api_process import ApiProcess, answer_of, request_bytes
from support.attacks import Attacker, forget_peak, memory, peak_memory
from support.http_attacks import ATTACKS
from support.process import WAIT_TIMEOUT
from support.redis_server import RedisServer

from producer.api import http_connection, tls_connection
from producer.api.http_connection import HttpConnections

CONNECTIONS = 60
MEGABYTES = 6.0
GROWTH = 12.0  # MB, of which the allocator's own share is a third; without the bounds, most attacks take 40 and more
GET, HOLD = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"GET /hold HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
TLS_GROWTH = 9.0  # MB; uvloop's own TLS takes 16
OVER_TLS = ("pipelined GETs", "slow bodies", "large bodies", "slow bodies")
LONG = b"GET /long HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process' peak of memory")


@pytest.fixture(scope="module")
def api(redis_server: RedisServer) -> Iterator[ApiProcess]:
    with ApiProcess({"VERIFY_REDIS_URL": redis_server.url()}) as api:
        yield api


@pytest.fixture(scope="module")
def idle(api: ApiProcess) -> float:
    """MB of the process that has served each kind of request."""
    for path in ("/openapi.json", "/metrics", "/healthz", "/nothing"):
        for _ in range(20):
            api.http.get(path)
    for _ in range(20):
        api.get_code("nobody")
        api.check("nobody", "1")
    return memory(api.pid)


@linux
class TestMemory:
    @pytest.mark.parametrize("name", ATTACKS)
    def test_an_attack_does_not_fill_it(self, api: ApiProcess, idle: float, name: str) -> None:
        forget_peak(api.pid)
        with Attacker(api.http_port, ATTACKS[name], connections=CONNECTIONS, megabytes=MEGABYTES) as attacker:
            attacker.wait_until_spent()
            for _ in range(3):  # each waits its turn behind what was sent before
                with api.knock(GET) as honest:
                    assert answer_of(honest)[0] == 200
            assert peak_memory(api.pid) - idle < GROWTH


class TestPipelining:
    def test_every_request_is_answered_in_order(self, api: ApiProcess) -> None:
        bodies = [json.dumps({"email": f"nobody {i}"}).encode() for i in range(300)]
        with api.knock(b"".join(request_bytes("/get_varifycode", body) for body in bodies)) as connection:
            connection.shutdown(socket.SHUT_WR)
            received = b""
            while data := connection.recv(65536):
                received += data
        assert [f'"nobody {i}"'.encode() in answer for i, answer in enumerate(received.split(b"HTTP/1.1 200")[1:])] == [
            True
        ] * 300

    @pytest.mark.parametrize("size", [1, 7, 100])
    def test_wherever_the_stream_is_cut(self, api: ApiProcess, size: int) -> None:
        chunked = GET.replace(b"GET", b"POST").replace(b"healthz", b"get_varifycode")
        chunked = chunked[:-2] + b"Transfer-Encoding: chunked\r\n\r\n8;x=y\r\n" + b'{"email"' + b"\r\nb\r\n"
        chunked += b': "nobody"}\r\n0\r\nTrailer: x\r\n\r\n'
        stream = (chunked + request_bytes("/check_varifycode", b'{"email": "b"}') + GET) * 3
        with api.knock() as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(stream), size):
                connection.sendall(stream[at : at + size])
            connection.shutdown(socket.SHUT_WR)
            received = b""
            while data := connection.recv(65536):
                received += data
        answers = [answer.partition(b"\r\n\r\n")[2] for answer in received.split(b"HTTP/1.1 200 OK\r\n")[1:]]
        once = [
            b'{"error": 3, "email": "nobody"}',
            b'{"error": 1001, "detail": "varifycode is missing"}',
            b'{"status": "ok"}',
        ]
        assert answers == once * 3


class TestRefused:
    def test_more_than_100_headers(self, api: ApiProcess) -> None:
        for count, status in ((99, 200), (100, 431)):
            with api.knock(GET[:-2] + b"X: y\r\n" * count + b"\r\n") as connection:
                assert answer_of(connection)[0] == status

    def test_chunks_that_are_mostly_framing(self, api: ApiProcess) -> None:
        head = b"POST /get_varifycode HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        with api.knock(head + b"1\r\nx\r\n" * 2000) as connection:
            status, headers, body = answer_of(connection)
        assert (status, headers["connection"], json.loads(body)["error"]) == (413, "close", 1001)


async def app(scope: Any, _receive: Any, send: Any) -> None:
    """Answers at once, but for /hold; at length for /long."""
    if scope["path"] == "/long":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(400):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    if scope["path"] == "/hold":
        await asyncio.sleep(WAIT_TIMEOUT)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def server(
    limit: int | HttpConnections, tls: ssl.SSLContext | None = None, on_evicted: Callable[[], None] = lambda: None
) -> AsyncIterator[int]:
    """A server that takes so many connections; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: Any = limit if isinstance(limit, HttpConnections) else HttpConnections(limit, tls, on_evicted)
    server = uvicorn.Server(
        uvicorn.Config(app, http=connections.new, lifespan="off", log_config=None, timeout_graceful_shutdown=0)
    )
    server.capture_signals = suppress  # type: ignore[method-assign, assignment]  # they are pytest's
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, WAIT_TIMEOUT)


@dataclass
class Caller:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        """Send it, and wait for the answer if there will be one soon."""
        self.writer.write(data)
        if data == GET:
            await self.reader.readuntil(b"ok")
        else:
            await asyncio.sleep(0.1)  # so that the server has seen it

    async def is_closed(self) -> bool:
        """Whether the server hangs up."""
        with suppress(ConnectionError):
            return not await asyncio.wait_for(self.reader.read(1), WAIT_TIMEOUT)
        return True

    @property
    def is_open(self) -> bool:
        return not self.reader.at_eof() and self.reader.exception() is None


async def connect(port: int, data: bytes, tls: ssl.SSLContext | None = None) -> Caller:
    caller = Caller(*await asyncio.open_connection("127.0.0.1", port, ssl=tls))
    await caller.send(data)
    return caller


@pytest.mark.anyio
class TestTooManyConnections:
    async def test_the_oldest_that_sent_no_whole_request_goes_first(self) -> None:
        evictions: list[bool] = []
        async with server(limit=5, on_evicted=lambda: evictions.append(True)) as port:
            held, old, half, silent, late = [await connect(port, each) for each in (HOLD, GET, b"GET / H", b"", GET)]
            alive = [held, old, half, silent, late]
            for gone in (half, silent, old, late):
                alive.append(await connect(port, HOLD))
                alive.remove(gone)
                assert await gone.is_closed()
                assert all(each.is_open for each in alive)
            assert await (await connect(port, b"")).is_closed()  # all others wait for an answer
            assert len(evictions) == 5
            for each in (*alive, old, half, silent, late):
                each.writer.close()

    async def test_an_answer_makes_a_connection_the_last_of_the_idle(self) -> None:
        async with server(limit=2) as port:
            first, second = await connect(port, GET), await connect(port, GET)
            await first.send(GET)
            third = await connect(port, GET)
            assert await second.is_closed()
            assert first.is_open
            for each in (first, second, third):
                each.writer.close()


@pytest.mark.anyio
class TestUnreadAnswers:
    async def test_a_client_that_reads_nothing_is_cut_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http_connection, "READ_TIMEOUT", 0.3)
        async with server(limit=9) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
            writer.write(LONG)  # more than the buffers on the way hold
            writer.write(GET)
            await asyncio.sleep(1)
            received = 0
            with suppress(ConnectionError):
                while data := await asyncio.wait_for(reader.read(2**20), WAIT_TIMEOUT):
                    received += len(data)
            assert received < 400 * 65536
            writer.close()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def here(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def there(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.mark.anyio
class TestTls:
    async def test_a_connection_counts_before_its_handshake(self, here: ssl.SSLContext, there: ssl.SSLContext) -> None:
        async with server(limit=3, tls=here) as port:
            callers = [await connect(port, HOLD, there)]
            first, second = await connect(port, b""), await connect(port, b"\x16\x03\x01")
            for gone in (first, second):
                callers.append(await connect(port, HOLD, there))
                assert await gone.is_closed()
            assert all(each.is_open for each in callers)
            for each in (*callers, first, second):
                each.writer.close()

    async def test_a_handshake_that_does_not_end_is_cut_off(
        self, here: ssl.SSLContext, there: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tls_connection, "HANDSHAKE_TIMEOUT", 0.3)
        async with server(limit=9, tls=here) as port:
            callers = [await connect(port, each) for each in (b"", b"\x16\x03\x01\x40\x00")]
            assert [await each.is_closed() for each in callers] == [True, True]
            caller = await connect(port, GET, there)
            for each in (*callers, caller):
                each.writer.close()


@linux
class TestTlsMemory:
    @pytest.fixture
    def encrypted(self, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
        folder = tmp_path_factory.mktemp("tls")
        issued = trustme.CA().issue_cert("127.0.0.1")
        issued.private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
        paths = dict.fromkeys(("VERIFY_TLS_CERT", "VERIFY_TLS_KEY"), str(folder / "both.pem"))
        with ApiProcess({"VERIFY_REDIS_URL": redis_server.url(), **paths}) as api:
            yield api

    def test_attacks_over_tls_do_not_fill_it_one_after_the_other(self, encrypted: ApiProcess) -> None:
        idle = memory(encrypted.pid)
        for name in OVER_TLS:
            attack, megabytes = ATTACKS[name], MEGABYTES * 4
            with Attacker(
                encrypted.http_port, attack, connections=CONNECTIONS, megabytes=megabytes, tls=True
            ) as attacker:
                attacker.wait_until_spent()
        assert peak_memory(encrypted.pid) - idle < TLS_GROWTH


@pytest.mark.anyio
class TestShutdown:
    async def test_the_next_answer_on_each_connection_is_its_last_and_says_so(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http_connection, "LAST_REQUESTS", WAIT_TIMEOUT)
        connections = HttpConnections(10)
        async with server(connections) as port:
            fresh, idle = await connect(port, b""), await connect(port, GET)
            waiting = asyncio.create_task(connections.take_last_requests())
            await asyncio.sleep(0.1)
            for caller in (fresh, idle):
                assert not waiting.done()
                caller.writer.write(GET)
                assert b"connection: close" in await caller.reader.readuntil(b"ok")
                assert await caller.is_closed()
            await waiting  # for no longer than that

    async def test_an_idle_connection_does_not_hold_it_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http_connection, "LAST_REQUESTS", 0.1)
        connections = HttpConnections(10)
        async with server(connections) as port:
            idle = await connect(port, GET)
            await asyncio.wait_for(connections.take_last_requests(), WAIT_TIMEOUT)
        assert await idle.is_closed()
