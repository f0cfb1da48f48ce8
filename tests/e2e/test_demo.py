"""The demo verifies each step, reports a failure, and leaves nothing running, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.redis_server import RedisServer

from demo.processes import GRPC_PORT, HOST, HTTP_PORT
from producer.settings import PREFIX

ROOT = Path(__file__).parents[2]
TIMEOUT = 90.0  # seconds; the machine may be busy
STAYS = "Mails appear here"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc"),
    pytest.mark.timeout(240),
]


class Demo:
    """A running demo, and everything that it started."""

    def __init__(self, directory: Path, *words: str, **settings: str) -> None:
        self._mark = f"DEMO_MARK={uuid.uuid4()}"
        # Where it makes its files; they too must be gone in the end.
        self.directory = directory
        name, _, value = self._mark.partition("=")
        env = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "demo", *words],
            cwd=ROOT,
            env=env | {name: value, "TMPDIR": str(directory)} | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def output(self) -> str:
        """What it printed so far."""
        return "".join(self.lines)

    def ends(self) -> int:
        """Wait for its end; the exit status."""
        status = self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        return status

    def processes(self) -> list[int]:
        """The processes that carry its mark: itself, and what it started."""
        return [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdecimal() and self._mark.encode() in _environment(entry)
        ]


def _environment(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return []  # gone meanwhile, or another user's


def until(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    """Wait for `condition`; `what` explains a failure."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    """Starts demos, and waits until one that stays has printed its last hint; none outlives its test."""
    demos: list[Demo] = []

    def begin(*words: str, **settings: str) -> Demo:
        demo = Demo(tmp_path, *words, **settings)
        demos.append(demo)
        if "--once" not in words:
            until(lambda: STAYS in demo.output(), demo.output)
        return demo

    yield begin
    for demo in demos:
        for pid in demo.processes():
            os.kill(pid, signal.SIGKILL)
        demo.process.wait()


def nothing_is_left(demo: Demo) -> None:
    until(lambda: not demo.processes(), demo.processes)
    until(lambda: not list(demo.directory.iterdir()), lambda: list(demo.directory.iterdir()))


def test_once_shows_every_step(start: Callable[..., Demo]) -> None:
    demo = start("--once")
    assert demo.ends() == 0, demo.output()
    output = demo.output()
    assert "embedded" in output
    [code] = set(re.findall(r"in Redis +code_demo-\w+@\S+ = (\d{6})", output))
    assert output.count(code) >= 4  # mail, key, key again, right check
    assert len(re.findall(r'reply +{"error": 0, ', output)) == 3  # two requests, the right check
    assert "the same code came again" in output
    assert '"error": 1004, ' in output
    assert f'"varifycode": "{code}"}}' in output
    assert re.search(r'reply +error: 0  email: "\S+-grpc@example.com"  code: ""', output)
    [other] = re.findall(r"in Redis +code_\S+-grpc@\S+ = (\d{6})", output)
    assert output.count(other) == 1
    assert re.search(r"✓ the code in the mail is the one in code_\S+-grpc@", output)
    assert "✗" not in output
    nothing_is_left(demo)


@pytest.mark.slow
def test_a_given_redis_is_used_as_it_is_and_busy_ports_are_no_obstacle(
    start: Callable[..., Demo], redis_server: RedisServer
) -> None:
    with redis_server.client() as client, contextlib.ExitStack() as stack:
        client.flushall()
        client.set("code_someone@example.com", "a1b2")
        for port in (HTTP_PORT, GRPC_PORT):
            with contextlib.suppress(OSError):  # busy already
                listener = stack.enter_context(socket.socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the API does
                listener.bind((HOST, port))
                listener.listen()
        demo = start("--once", VERIFY_REDIS_URL=redis_server.url(), VERIFY_LOCALE="en", VERIFY_QUEUE="not-taken")
        assert demo.ends() == 0, demo.output()
        assert "yours" in demo.output()
        assert "verification code" in demo.output()
        assert client.get("code_someone@example.com") == b"a1b2"
    assert f"({HTTP_PORT} is busy)" in demo.output()
    assert f"({GRPC_PORT} is busy)" in demo.output()
    nothing_is_left(demo)


def test_requests_of_others_are_not_taken(start: Callable[..., Demo], redis_server: RedisServer) -> None:
    with redis_server.client(1) as broker:
        broker.flushall()
        broker.lpush("verification", "{}")
        demo = start("--once", VERIFY_REDIS_URL=redis_server.url())
        assert demo.ends() == 1
        assert "requests wait on its queue" in demo.output()
        assert broker.llen("verification") == 1
        broker.flushall()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://:secret@127.0.0.1:1", "VERIFY_REDIS_URL, redis://***@127.0.0.1:1, cannot be used"),
        pytest.param("localhost", "VERIFY_REDIS_URL: the value is not allowed", marks=pytest.mark.slow),
        ("old", "6.2 or newer is needed"),
    ],
)
def test_an_unusable_redis_is_a_clear_error(start: Callable[..., Demo], old_redis: str, url: str, why: str) -> None:
    demo = start("--once", VERIFY_REDIS_URL=old_redis if url == "old" else url)
    assert demo.ends() == 1
    assert why in demo.output()
    assert "secret" not in demo.output()
    assert "Traceback" not in demo.output()
    nothing_is_left(demo)


@pytest.mark.slow
def test_it_stays_up_until_sigterm_ends_it(start: Callable[..., Demo]) -> None:
    demo = start()
    assert len(demo.processes()) >= 5  # itself, Redis, a worker, the API, Flower
    demo.process.terminate()
    assert demo.ends() == 0
    assert "Traceback" not in demo.output()
    nothing_is_left(demo)


def test_it_stays_up_until_ctrl_c_and_what_it_suggests_works(start: Callable[..., Demo]) -> None:
    demo = start()
    # Every page that it names answers.
    pages = re.findall(r"^  (open this|HTTP API|its metrics|Flower) +(http://\S+)", demo.output(), re.MULTILINE)
    assert [name for name, _ in pages] == ["open this", "HTTP API", "its metrics", "Flower"]
    for _, url in pages:
        with OPENER.open(url, timeout=TIMEOUT) as page:
            assert page.status == 200
    # The demo page comes first, links to Flower and shows the mails that were sent.
    assert demo.output().split("http://")[1].startswith(pages[0][1].removeprefix("http://"))
    with OPENER.open(f"{pages[0][1]}demo/facts", timeout=TIMEOUT) as facts:
        assert json.load(facts)["flower"] == pages[-1][1]
    with OPENER.open(f"{pages[0][1]}demo/inbox", timeout=TIMEOUT) as inbox:
        assert len(json.load(inbox)["mails"]) == 3
    # The commands that it suggests use its settings, and the mail shows.
    assert "VERIFY_RESEND_COOLDOWN=2\n" in suggested(demo, "settings")
    suggested(demo, "send you@example.com")
    until(lambda: "you@example.com  " in demo.output().partition("a mail arrived")[2], demo.output)
    demo.process.send_signal(signal.SIGINT)
    assert demo.ends() == 0
    assert "Traceback" not in demo.output()
    nothing_is_left(demo)


def suggested(demo: Demo, words: str) -> str:
    """What the suggested command with these words prints."""
    found = re.search(rf"^ +(\(\. \S+; \S+ -m producer {words}\))$", demo.output(), re.MULTILINE)
    assert found, demo.output()
    done = subprocess.run(
        ["sh", "-c", found[1]], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_nothing_outlives_a_killed_demo(start: Callable[..., Demo]) -> None:
    demo = start()
    assert len(demo.processes()) >= 5  # itself, Redis, a worker, the API, Flower
    demo.process.kill()
    demo.process.wait()
    nothing_is_left(demo)


@pytest.mark.parametrize(("module", "status"), [("demo", -signal.SIGINT), ("worker", 130)])
def test_ctrl_c_while_it_is_being_loaded_prints_nothing(tmp_path: Path, module: str, status: int) -> None:
    (tmp_path / "rich.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n", encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (status, "")


@pytest.mark.slow
def test_a_dead_worker_ends_it_with_a_reason(start: Callable[..., Demo]) -> None:
    demo = start()
    found = re.search(r"\(pid (\d+)\)", demo.output())
    assert found
    os.kill(int(found[1]), signal.SIGKILL)
    assert demo.ends() == 1
    assert "the worker process has ended (SIGKILL)" in demo.output()
    nothing_is_left(demo)
