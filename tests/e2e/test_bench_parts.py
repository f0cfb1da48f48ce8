"""The parts that measurements lean on: the counting relay, the load on a gRPC API, the peers."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import redis
from support.redis_server import RedisServer

from bench import foreign, peers
from bench.rig import cpu_seconds
from bench.sink import HOST, Count, Sink

ROOT: Final = Path(__file__).parents[2]
HELLO: Final = b"EHLO me\r\n"
OFFERS: Final = b"250-sink\r\n250-PIPELINING\r\n250-8BITMIME\r\n250-AUTH PLAIN\r\n250 SMTPUTF8\r\n"
HEAD: Final = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n"
OKAYS: Final = b"250 ok\r\n250 ok\r\n354 go on\r\n"
# Dots, line ends and their beginnings, none of which ends a mail.
CONTENT: Final = b"Subject: x\r\n\r\n..\r\n.\n\r.\r\n\r\r\n.x\r\n\r\n\n.\r.\r\n..\r\n"
TAKEN: Final = b"250 taken\r\n"

pytestmark = pytest.mark.tools


class Client:
    """A raw connection; with `trusted`, over implicit TLS."""

    def __init__(self, port: int, trusted: Path | None = None) -> None:
        self.socket = socket.create_connection((HOST, port), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if trusted:
            context = ssl.create_default_context(cafile=str(trusted))
            self.socket = context.wrap_socket(self.socket, server_hostname=HOST)
        assert self.read(10) == b"220 sink\r\n"

    def read(self, length: int) -> bytes:
        """Exactly so many bytes."""
        read = b""
        while len(read) < length and (more := self.socket.recv(length - len(read))):
            read += more
        return read

    def ask(self, words: bytes, answer: bytes) -> None:
        """Send `words`; the answer is this, and nothing follows at once."""
        self.socket.sendall(words)
        assert self.read(len(answer)) == answer
        self.socket.setblocking(False)
        with pytest.raises((BlockingIOError, ssl.SSLWantReadError)):
            self.socket.recv(1)
        self.socket.settimeout(60)


def drive(latency: float, act: Callable[[Sink], object], *, tls: bool = False) -> Count:
    """Do this, in a thread, with a sink; what it counted in the end."""

    async def run() -> Count:
        async with Sink(latency, tls=tls) as sink:
            await asyncio.to_thread(act, sink)
            return await sink.count()

    return asyncio.run(run())


def pieces(stream: bytes, seed: int) -> Iterator[bytes]:
    """The stream in pieces of random sizes, most of them small."""
    dice = random.Random(seed)
    while stream:
        size = dice.choice((1, 1, 2, 3, 5, 20, 200))
        yield stream[:size]
        stream = stream[size:]


def test_commands_have_their_answers() -> None:
    def act(sink: Sink) -> None:
        client = Client(sink.port)
        client.ask(b"XCOUNT\r\n", b"250 mails=0 connections=0 most=0\r\n")
        client.ask(b"helo me\r\n", b"250 sink\r\n")
        client.ask(HELLO, OFFERS)
        client.ask(b"NOOP\r\n", b"250 ok\r\n")
        client.ask(b"AUTH PLAIN AGEAYg==\r\n", b"235 welcome\r\n")
        client.ask(b"RCPT TO:<b@example.com>\r\n", b"503 bad sequence of commands\r\n")
        client.ask(b"DATA\r\n", b"503 bad sequence of commands\r\n")
        client.ask(b"MAIL FROM:<a@example.com>\r\nDATA\r\n", b"250 ok\r\n503 bad sequence of commands\r\n")
        client.ask(b"RSET\r\n", b"250 ok\r\n")
        client.ask(b"BDAT 3\r\n" + b"x" * 9000 + b"\r\n", b"500 unknown command\r\n" * 2)
        client.ask(HEAD, OKAYS)
        client.ask(CONTENT, b"")
        client.ask(b".\r\n", TAKEN)
        client.ask(HEAD, OKAYS)
        client.ask(b".\r\n", TAKEN)  # a mail without content
        client.ask(b"XCOUNT\r\n", b"250 mails=2 connections=1 most=1\r\n")
        client.socket.sendall(b"QUIT\r\nNOOP\r\n")
        assert client.read(100) == b"221 bye\r\n"

    assert drive(0, act) == Count(2, 0, 1)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("latency", [0, 0.003])
def test_any_split_of_a_pipelined_stream_is_the_same_stream(latency: float, tls: bool) -> None:
    mails = 20
    stream = HELLO + (HEAD + CONTENT + b".\r\n") * mails + b"QUIT\r\n"
    answers = OFFERS + (OKAYS + TAKEN) * mails + b"221 bye\r\n"

    def act(sink: Sink) -> None:
        where = (sink.tls_port, sink.trusted) if tls else (sink.port, None)
        for seed in range(5):
            client = Client(*where)
            for piece in pieces(stream, seed):
                client.socket.sendall(piece)
            assert client.read(len(answers) + 1) == answers
        client = Client(*where)
        client.socket.sendall(stream)
        assert client.read(len(answers) + 1) == answers

    assert drive(latency, act, tls=tls) == Count(6 * mails, 0, 1)


def test_who_speaks_no_tls_or_is_silent_holds_up_nobody_who_does() -> None:
    def act(sink: Sink) -> None:
        plain, _silent = (socket.create_connection((HOST, sink.tls_port), timeout=60) for _ in range(2))
        plain.sendall(HELLO)
        while plain.recv(100):  # an alert, then the end
            pass
        clients = [Client(sink.tls_port, sink.trusted), Client(sink.port)]  # the second port speaks none
        for client in clients:
            client.ask(HELLO, OFFERS)

    assert drive(0, act, tls=True).most == 2


def test_each_certificate_is_made_for_one_sink() -> None:
    def act(sink: Sink) -> None:
        drive(0, lambda other: trusted.append(sink.trusted.read_bytes() == other.trusted.read_bytes()), tls=True)
        with pytest.raises(ssl.SSLCertVerificationError):
            ssl.create_default_context().wrap_socket(
                socket.create_connection((HOST, sink.tls_port), timeout=60), server_hostname=HOST
            )

    trusted: list[bool] = []
    drive(0, act, tls=True)
    assert trusted == [False]


def test_a_mail_waits_for_its_answer_and_only_its_own_connection_with_it() -> None:
    latency, many = 3.0, 100

    def act(sink: Sink) -> None:
        clients = [Client(sink.port) for _ in range(many)]
        for client in clients:
            client.ask(HELLO + HEAD, OFFERS + OKAYS)
        began = time.monotonic()
        for client in clients:
            # The next transaction comes in the same segment as the final dot; its answers are late too.
            client.socket.sendall(CONTENT + b".\r\n" + HEAD)
        clients[0].socket.sendall(b".\r\n")
        other = Client(sink.port)
        other.ask(b"XCOUNT\r\n", b"250 mails=0 connections=100 most=100\r\n")
        for client in clients:
            assert client.read(len(TAKEN + OKAYS)) == TAKEN + OKAYS
        assert time.monotonic() - began >= latency
        assert clients[0].read(len(TAKEN)) == TAKEN
        assert time.monotonic() - began >= 2 * latency
        for client in clients:
            client.socket.close()

    count = drive(latency, act)
    assert (count.mails, count.most) == (many + 1, many)


def test_answers_to_one_segment_leave_in_one() -> None:
    def act(sink: Sink) -> None:
        client = Client(sink.port)
        client.ask(HELLO + HEAD, OFFERS + OKAYS)
        client.socket.sendall(b".\r\n" + HEAD)
        assert client.socket.recv(1000) == TAKEN + OKAYS

    drive(0, act)
    drive(0.01, act)


def test_who_does_not_read_is_not_lost() -> None:
    def act(sink: Sink) -> None:
        client = Client(sink.port)
        client.socket.settimeout(0.5)
        sent, refused = 0, False
        while not refused:  # until the sockets between are full of answers, and then of commands
            try:
                sent += client.socket.send((b"NOOP\r\n" * 50_000)[sent % 6 :])
            except TimeoutError:
                refused = True
        Client(sink.port).ask(b"NOOP\r\n", b"250 ok\r\n")
        client.socket.settimeout(60)
        answers = b"250 ok\r\n" * (sent // 6)
        assert client.read(len(answers)) == answers
        client.ask(b"NOOP\r\n"[sent % 6 :] or b"NOOP\r\n", b"250 ok\r\n")

    drive(0, act)


def test_the_count_is_waited_for() -> None:
    latency = 0.05

    async def run() -> None:
        async with Sink(latency) as sink:
            client = await asyncio.to_thread(Client, sink.port)
            began = time.monotonic()
            client.socket.sendall(HELLO + (HEAD + b".\r\n") * 3)
            assert await sink.until(1) >= began + latency
            last, second = await asyncio.gather(sink.until(3), sink.until(2))
            assert second >= began + 2 * latency
            assert last >= began + 3 * latency
            assert (await sink.count()).mails == 3

    asyncio.run(run())


def ends(pid: int) -> bool:
    """Whether the process is gone, or soon will be."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def killed_while(script: str) -> list[int]:
    """Run `script`, kill it when it has printed process ids; these."""
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    return pids


def test_the_relay_ends_with_its_parent() -> None:
    script = "import asyncio, bench.sink\nasync def run():\n async with bench.sink.Sink(0) as sink:\n"
    script += "  print(sink.pid, flush=True); await asyncio.sleep(60)\nasyncio.run(run())"
    [pid] = killed_while(script)
    assert ends(pid)


def test_the_relay_ends_with_its_block() -> None:
    async def run() -> int:
        async with Sink(0) as sink:
            os.kill(sink.pid, 0)
            return sink.pid

    assert ends(asyncio.run(run()))


class FakeApi(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic to the type checker only
    """A gRPC server's answers: Success, but 4 to every tenth address, and none at all to every hundredth."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        assert details.method == "/message.VarifyService/GetVarifyCode"
        return grpc.unary_unary_rpc_method_handler(self.answer)

    async def answer(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        assert request[:2] == bytes([0x0A, len(request) - 2])
        email = request[2:].decode()
        self.asked.append(email)
        number = int(email.partition("@")[0].removeprefix("caller"))
        if number % 100 == 99:
            await context.abort(grpc.StatusCode.UNAVAILABLE)
        error = b"\x08\x04" if number % 10 == 9 else b""
        return error + bytes([0x12, len(request) - 2]) + request[2:]


def call(*, callers: int, seconds: float = 0, count: int = 0) -> tuple[list[str], dict[str, Any]]:
    """Load an API server so; the addresses that it was asked for, and what the load found."""

    async def run() -> tuple[list[str], dict[str, Any]]:
        api = FakeApi()
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((api,))
        port = server.add_insecure_port(f"{HOST}:0")
        await server.start()
        found = await asyncio.to_thread(
            peers.load, port, callers=callers, seconds=seconds, count=count, prefix="caller"
        )
        await server.stop(None)
        return api.asked, found

    return asyncio.run(run())


@pytest.mark.parametrize("callers", [1, 64])
def test_each_call_is_for_an_address_of_its_own_and_is_counted(callers: int) -> None:
    asked, found = call(callers=callers, count=3000)  # more bytes than an API server takes at first
    assert sorted(asked) == sorted(f"caller{number}@example.com" for number in range(3000))
    assert found["count"] == 2700
    assert found["answers"] == {"0": 2700, "4": 270, "none": 30}
    assert 0 < found["p50"] <= found["p90"] <= found["p99"] < 1000 * found["seconds"]
    assert 0 < found["cpu"] <= found["seconds"]


def test_calls_end_in_time() -> None:
    asked, found = call(callers=8, seconds=0.5)
    assert found["seconds"] == 0.5
    assert sum(found["answers"].values()) == len(asked)
    assert found["answers"]["0"] - 8 <= found["count"] <= found["answers"]["0"]


def test_a_server_that_is_down_is_reported() -> None:
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        with pytest.raises(peers.LoadFailed, match="cannot connect"):
            peers.load(closed.getsockname()[1], callers=1, count=1, prefix="caller")


@pytest.fixture(scope="module")
def installed() -> None:
    """What the peers need."""
    if shutil.which("npm") is None:
        pytest.skip("peers on Node need npm")
    peers.install()


@pytest.mark.timeout(300)  # the first one installs them
@pytest.mark.usefixtures("installed", "redis")
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_a_peer_does_its_job(peer: peers.Peer, redis_server: RedisServer) -> None:
    count = 300

    async def run() -> tuple[int, tuple[int, ...], float]:
        if not peer.answers_grpc:
            peers.fill(peer, redis_url=redis_server.url(), count=100)
            peers.fill(peer, redis_url=redis_server.url(), count=200, first=100)
        async with Sink(0) as sink:
            with peers.running(
                peer, redis_url=redis_server.url(), relay_port=sink.port, connections=4, processes=2
            ) as running:
                if peer.answers_grpc:
                    found = await asyncio.to_thread(peers.load, running.port, callers=8, count=count, prefix="user")
                    assert found["answers"] == {"0": count}
                async with asyncio.timeout(60):
                    await sink.until(count)
                    while not complete():  # noqa: ASYNC110 - the last replies are on their way, and no event tells
                        await asyncio.sleep(0.05)
                used = sum(map(cpu_seconds, running.pids))
            return (await sink.count()).mails, running.pids, used

    def complete() -> bool:
        found = peers.counts(redis_server.url())
        marks = 0 if peer.name == "old" else count
        return found == peers.Counts(codes=count, marks=marks, replies=0 if peer.answers_grpc else count)

    before = foreign.moment()
    mails, pids, used = asyncio.run(run())
    assert mails == count
    assert foreign.moment().ours - before.ours >= used > 0  # whoever has ended still counts as ours
    assert len(pids) == (1 if peer.name == "old" else 3)
    assert all(ends(pid) for pid in pids)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("installed", "redis")
def test_the_old_server_mails_over_tls_as_well(redis_server: RedisServer) -> None:
    [old] = [peer for peer in peers.PEERS if peer.name == "old"]

    async def run() -> int:
        async with Sink(0, tls=True) as sink:
            with peers.running(
                old,
                redis_url=redis_server.url(),
                relay_port=sink.tls_port,
                connections=1,
                processes=1,
                trusted=sink.trusted,
            ) as running:
                found = await asyncio.to_thread(peers.load, running.port, callers=8, count=40, prefix="user")
            assert found["answers"] == {"0": 40}
            return (await sink.count()).mails

    assert asyncio.run(run()) == 40
    with redis.Redis.from_url(redis_server.url()) as store:
        assert len(store.get("code_user0@example.com")) == 4
        assert 0 < store.ttl("code_user0@example.com") <= 600


@pytest.mark.usefixtures("installed", "redis")
@pytest.mark.parametrize("name", ["old_best", "bullmq", "dramatiq", "celery"])
def test_a_peer_ends_with_its_parent(name: str, redis_server: RedisServer) -> None:
    script = "import time\nfrom bench import peers\n"
    script += f"[peer] = [peer for peer in peers.PEERS if peer.name == {name!r}]\n"
    script += f"where = dict(redis_url={redis_server.url()!r}, relay_port=1, connections=1, processes=2)\n"
    script += "with peers.running(peer, **where) as running:\n print(*running.pids, flush=True); time.sleep(60)"
    pids = killed_while(script)
    assert len(pids) == 3
    assert all(ends(pid) for pid in pids)


@pytest.mark.usefixtures("installed")
def test_versions_are_told() -> None:
    assert {"node", "python", "bullmq", "nodemailer", "dramatiq", "celery"} <= peers.versions().keys()
